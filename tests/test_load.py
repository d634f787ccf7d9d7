"""`kernelgraft.load`: any module filled from a checkpoint, with kernels put in on the way."""

import io
import json
import os
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from torch.nn import functional as F

import kernelgraft
from kernelgraft import KernelConfig, graft_of
from kernelgraft.checkpoint import progress
from kernelgraft.errors import CheckpointError, PlanError
from leftovers import open_files

REPOSITORY = Path(__file__).parent / "repositories" / "plain.py"
FUSED = KernelConfig({(("Norm", "blocks.*.norm"), ("Gate", "blocks.*.mlp")): f"{REPOSITORY}:FastBlock"})
SINGLE = KernelConfig({"Gate": f"{REPOSITORY}:FastMLP"})
H, INNER = 8, 12


class Norm(nn.Module):
    def __init__(self, hidden, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.rand(hidden) + 0.5)

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Gate(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.w1 = nn.Linear(hidden, inner, bias=False)
        self.w2 = nn.Linear(hidden, inner, bias=False)
        self.w3 = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    def __init__(self, hidden, inner, scale):
        super().__init__()
        self.norm, self.mlp = Norm(hidden), Gate(hidden, inner)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)
        self.register_buffer("shift", torch.zeros(hidden))

    def forward(self, x):
        return x + self.scale * self.mlp(self.norm(x)) + self.shift


class Tower(nn.Module):
    """Tokens in, tokens out; the embedding and the head may be one parameter."""

    def __init__(self, tied=False, num_blocks=2):
        super().__init__()
        self.embed = nn.Embedding(16, H)
        self.blocks = nn.ModuleList(Block(H, INNER, 0.5 + index) for index in range(num_blocks))
        self.head = nn.Linear(H, 16, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


IDS = torch.arange(6).reshape(2, 3)
ON_META = {"example_inputs": torch.zeros(1, 2, dtype=torch.long)}


def tower(seed=0, **kwargs):
    torch.manual_seed(seed)
    with kernelgraft.recorded():
        made = Tower(**kwargs).eval()
    with torch.no_grad():
        for block in made.blocks:
            block.shift.normal_()
    return made


def on_meta(**kwargs):
    with torch.device("meta"), kernelgraft.recorded():
        return Tower(**kwargs).eval()


@pytest.fixture
def file(tmp_path):
    return saved(tower(), tmp_path)


def saved(model, folder):
    save_model(model, str(folder / "model.safetensors"))
    return folder / "model.safetensors"


def assert_same_state(model, expected):
    found, wanted = model.state_dict(), expected.state_dict()
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("config", [None, FUSED, SINGLE], ids=["none", "fused", "single"])
@pytest.mark.parametrize("make", [on_meta, lambda: tower(seed=1)], ids=["meta", "real"])
def test_a_module_on_meta_or_with_values_gets_those_of_the_file(make, config, file):
    plain, model = tower(), make()
    assert kernelgraft.load(model, file, config, **ON_META) is model
    assert_same_state(model, plain)
    assert [block.scale.item() for block in model.blocks] == [0.5, 1.5]
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert torch.equal(model(IDS), plain(IDS))
    if config is None:
        assert graft_of(model) is None
    else:
        assert graft_of(model).calls.kernel == 2
        graft_of(model).remove()
        assert_same_state(model, plain)


def test_a_module_with_values_keeps_its_parameters(file):
    model = tower(seed=1)
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    kernelgraft.load(model, file)
    for name, parameter in model.named_parameters():
        assert (parameter, parameter.data_ptr()) == before[name], name


def test_requires_grad_stays_as_the_module_has_it(file):
    model = on_meta()
    model.embed.requires_grad_(False)
    model.blocks[0].mlp.requires_grad_(False)
    kernelgraft.load(model, file, FUSED, **ON_META)
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not asked["embed.weight"]
    assert asked["head.weight"]
    assert not asked["blocks.0.norm.w12"]
    assert asked["blocks.0.norm.scale"]
    assert asked["blocks.1.norm.w12"]


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
@pytest.mark.parametrize("make", [on_meta, lambda tied: tower(seed=1, tied=tied)], ids=["meta", "real"])
def test_tied_parameters_stay_tied_whichever_of_them_the_file_has(make, kept, tmp_path):
    plain = tower(tied=True)
    state = {name: tensor for name, tensor in plain.state_dict().items() if not name.startswith(("embed", "head"))}
    save_file({**state, kept: plain.embed.weight.detach()}, tmp_path / "model.safetensors")
    model = kernelgraft.load(make(tied=True), tmp_path, FUSED, **ON_META)
    assert model.head.weight is model.embed.weight
    assert_same_state(model, plain)
    assert torch.equal(model(IDS), plain(IDS))


def test_values_come_in_the_modules_dtype(file):
    model, plain = on_meta().to(torch.bfloat16), tower().to(torch.bfloat16)
    kernelgraft.load(model, file, FUSED, **ON_META)
    assert_same_state(model, plain)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    live = kernelgraft.load(tower(seed=1).to(torch.bfloat16), file)
    assert_same_state(live, plain)


def test_a_device_is_where_new_parameters_are(file):
    model = kernelgraft.load(on_meta(), file, SINGLE, device="cpu")
    assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {torch.device("cpu")}


def test_tensors_by_name_are_a_checkpoint_too():
    plain = tower()
    model = kernelgraft.load(on_meta(), plain.state_dict(), FUSED, **ON_META)
    assert_same_state(model, plain)
    assert torch.equal(model(IDS), plain(IDS))


def test_all_names_that_do_not_fit_are_in_one_error(tmp_path):
    state = tower().state_dict()
    del state["blocks.1.mlp.w2.weight"], state["blocks.0.shift"]
    state["blocks.0.mlp.w4.weight"] = torch.zeros(2)
    state["head.weight"] = torch.zeros(16, H + 1)
    save_file(state, tmp_path / "model.safetensors")
    for model in (on_meta(), tower(seed=1)):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(CheckpointError) as error:
            kernelgraft.load(model, tmp_path, FUSED, **ON_META)
        text = str(error.value)
        assert "missing: blocks.0.shift, blocks.1.mlp.w2.weight" in text
        assert "unexpected: blocks.0.mlp.w4.weight" in text
        assert "of another shape: head.weight (model [16, 8], checkpoint [16, 9])" in text
        assert "Tower" in text
        assert graft_of(model) is None
        assert all(now.is_meta or torch.equal(now, before[name]) for name, now in model.state_dict().items())


def test_a_refused_graft_leaves_the_module_as_it_was(file):
    wrong = KernelConfig({(("Norm", "blocks.*.norm"), ("Linear", "blocks.*.mlp")): f"{REPOSITORY}:FastBlock"})
    model = tower(seed=1)
    with pytest.raises(PlanError, match="names the path but not the class"):
        kernelgraft.load(model, file, wrong, **ON_META)
    assert_same_state(model, tower(seed=1))
    on = on_meta()
    with pytest.raises(PlanError, match="names the path but not the class"):
        kernelgraft.load(on, file, wrong, **ON_META)
    assert all(tensor.is_meta for tensor in on.state_dict().values())


def test_a_grafted_module_is_refused_with_what_does_it(file):
    model = kernelgraft.load(on_meta(), file, FUSED, **ON_META)
    for config in (None, SINGLE):
        with pytest.raises(PlanError, match=r"grafted already.*load_state_dict"):
            kernelgraft.load(model, file, config)
    graft_of(model).update(load_file(file))
    assert_same_state(model, tower())


def test_a_buffer_that_no_checkpoint_has_must_be_makeable(file):
    with torch.device("meta"):
        model = Tower().eval()
    with pytest.raises(CheckpointError, match=r"blocks\.0\.scale is a non-persistent buffer.*recorded\(\)"):
        kernelgraft.load(model, file)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_making_a_buffer_again_does_not_move_the_random_state(file):
    model = on_meta()
    before = torch.get_rng_state()
    kernelgraft.load(model, file, SINGLE)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_single_module_needs_its_constructor_arguments_and_says_so(file):
    with torch.device("meta"):
        model = Tower(num_blocks=2).eval()
    for block in model.blocks:
        block.scale = torch.tensor(0.5)
    with pytest.raises(PlanError, match=r"FastMLPLayout wants what Gate\.__init__ got.*recorded\(\)"):
        kernelgraft.load(model, file, SINGLE)


def offsets(change):
    """A header with other offsets of its first tensor."""

    def changed(header):
        name = min(name for name in header if name != "__metadata__")
        first, last = header[name]["data_offsets"]
        header[name]["data_offsets"] = change(first, last)
        return json.dumps(header)

    return changed


BAD = {
    "no JSON": lambda header: json.dumps(header)[:-1] + ",",
    "nested": lambda _: '{"a":' * 10_000,
    "a name twice": lambda header: "{" + ",".join([json.dumps(header)[1:-1]] * 2) + "}",
    "offsets that overlap": offsets(lambda first, last: [first + 4, last + 4]),
    "offsets that are negative": offsets(lambda first, last: [-4, last]),
    "offsets past the end": offsets(lambda first, last: [first, last + (1 << 40)]),
    "a shape that does not match": lambda header: json.dumps(header).replace('"shape": [8', '"shape": [9'),
    "a negative shape": lambda header: json.dumps(header).replace('"shape": [8', '"shape": [-8'),
    "a shape that is not whole": lambda header: json.dumps(header).replace('"shape": [8', '"shape": [8.0'),
}


def spoilt(file, how):
    """Make the file a bad one."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    if how == "truncated":
        raw = raw[:-40]
    elif how == "a header of absurd length":
        raw = (1 << 62).to_bytes(8, "little") + raw[8:]
    else:
        header = BAD[how](json.loads(raw[8 : 8 + length])).encode()
        raw = len(header).to_bytes(8, "little") + header + raw[8 + length :]
    file.write_bytes(raw)


@pytest.mark.parametrize("way", ["live", "meta", "update"])
@pytest.mark.parametrize("how", ["truncated", "a header of absurd length", *BAD])
def test_a_bad_file_changes_nothing(how, way, file, tmp_path):
    spoilt(file, how)
    model = on_meta() if way == "meta" else tower(seed=1)
    graft = kernelgraft.graft(model, FUSED, example_inputs=IDS) if way == "update" else None
    before = {name: (tensor, tensor.clone()) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    read = partial(kernelgraft.load, model, config=FUSED, **ON_META) if graft is None else graft.update
    with pytest.raises(CheckpointError, match=re.escape(str(file))):
        read(file)
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert list(after) == list(before)
    for name, (same, values) in before.items():
        assert after[name] is same
        assert same.is_meta or torch.equal(same, values)
    assert open_files(tmp_path) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_load_and_a_save_show_their_progress(file, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_WORTH_A_BAR", 0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    model = kernelgraft.load(on_meta(), file, FUSED, **ON_META)
    assert re.search(r"Reading weights: 100%.*B/s", sys.stderr.getvalue())
    monkeypatch.setattr(sys, "stderr", Terminal())
    kernelgraft.save_pretrained(model, tmp_path / "saved")
    assert re.search(r"Writing weights: 100%.*B/s", sys.stderr.getvalue())


def test_no_file_stays_open(file, tmp_path):
    def open_files():
        return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_there(fd))

    def _is_there(fd):
        return os.path.lexists(f"/proc/self/fd/{fd}")

    kernelgraft.load(on_meta(), file, FUSED, **ON_META)
    before = open_files()
    model = kernelgraft.load(on_meta(), file, FUSED, **ON_META)
    assert open_files() == before
    with pytest.raises(CheckpointError):
        kernelgraft.load(Norm(3), file)
    with pytest.raises(PlanError):
        kernelgraft.load(on_meta(), file, KernelConfig({"Nothing": f"{REPOSITORY}:FastMLP"}))
    assert open_files() == before
    assert_same_state(model, tower())


def test_a_saved_module_is_the_untouched_ones_file(file, tmp_path):
    model = kernelgraft.load(on_meta(tied=False), file, FUSED, **ON_META)
    kernelgraft.save_pretrained(model, tmp_path / "new" / "folder")
    found, wanted = load_file(tmp_path / "new" / "folder" / "model.safetensors"), load_file(file)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
