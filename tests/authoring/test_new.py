"""A repository made by `new`, untouched: it is right, it passes `check`, it is in the Hub's layout."""

import itertools
import json
import sys
import tomllib
from pathlib import Path

import kernels
import pytest
import torch
import transformers
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
from made import check, config_of, run_its_tests, skeleton
from torch import nn
from transformers.utils import is_kernels_available

import kernelgraft
import tiny
from kernelgraft.authoring.members import GatedMLP, Norm, TwoLayerMLP, recognize
from kernelgraft.authoring.new import new
from kernelgraft.errors import AuthoringError

pytestmark = pytest.mark.transformers

numbers = itertools.count()


def name():
    """No two repositories of a process may share one."""
    return f"made-{next(numbers)}"


FUSIONS = {
    "qwen3": (["RMSNorm", "MLP"], ("post_attention_layernorm", "mlp")),
    "phi3": (["RMSNorm", "MLP"], ("post_attention_layernorm", "mlp")),
    "gemma3": (["RMSNorm", "MLP", "RMSNorm"], ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm")),
    "vit": (["LayerNorm", "MLP"], ("layernorm_after", "mlp")),
}


def same_logits(kind, config):
    model = tiny.model(kind)
    expected = tiny.logits(model, kind)
    with kernelgraft.graft(model, config) as graft:
        torch.testing.assert_close(tiny.logits(model, kind), expected, rtol=1e-4, atol=1e-5)
        assert graft.calls.kernel > 0


@pytest.mark.parametrize(
    ("kind", "triton", "merge"),
    [("qwen3", False, True), ("phi3", True, True), ("gemma3", True, False), ("vit", False, True)],
)
def test_a_fusion_is_found_in_the_model_and_passes_check(kind, triton, merge, tmp_path):
    classes, children = FUSIONS[kind]
    model = skeleton(kind)
    made = new(name(), fuses=classes, model=model, folder=tmp_path, triton=triton, merge=merge)
    assert [place.rpartition(".")[2] for place in made.replaces] == list(children)
    report = check(made.folder, model)
    assert (report.findings, report.not_checked) == ((), ()), str(report)
    assert len(kernelgraft.plan(model, config_of(made)).sites) == tiny.config(kind).num_hidden_layers
    same_logits(kind, config_of(made))


@pytest.mark.parametrize(
    ("kind", "replaces", "with_model"),
    [("qwen3", "RMSNorm", False), ("qwen3", "MLP", False), ("cohere", "LayerNorm", True), ("bert", "LayerNorm", True)],
)
def test_a_single_module_passes_check(kind, replaces, with_model, tmp_path):
    made = new(name(), replaces=replaces, model=skeleton(kind) if with_model else None, folder=tmp_path)
    report = check(made.folder, skeleton(kind))
    assert (report.findings, report.not_checked) == ((), ()), str(report)
    same_logits(kind, config_of(made))


@pytest.mark.parametrize("replaces", ["Attention", "DecoderLayer", "RotaryEmbedding"])
def test_a_module_of_no_known_formula_begins_with_its_own_code(replaces, tmp_path):
    made = new(name(), replaces=replaces, model=skeleton("qwen3"), folder=tmp_path)
    report = check(made.folder, skeleton("qwen3"))
    assert (report.findings, report.not_checked) == ((), ()), str(report)
    same_logits("qwen3", config_of(made))


def test_the_tests_of_a_copy_pass_in_a_small_model(tmp_path):
    made = new("copied", replaces="Attention", model=skeleton("qwen3", num_hidden_layers=4), folder=tmp_path)
    done = run_its_tests(made)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((Path(made.folder) / "tests" / "config.json").read_text())["num_hidden_layers"] == 2


class Blur(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(1, 1, 3))

    def forward(self, x):
        return torch.conv1d(x, self.kernel, padding=1)


def test_code_of_a_model_that_no_test_could_build_is_not_copied(tmp_path):
    with pytest.raises(AuthoringError, match="no model of Transformers"):
        new("blur", replaces="Blur", model=nn.Sequential(Blur()), folder=tmp_path)
    assert not list(tmp_path.iterdir())


LOADED = {
    "a norm": ({"replaces": "RMSNorm"}, "Qwen3RMSNorm"),
    "an MLP": ({"replaces": "MLP", "model": "qwen3"}, "Qwen3MLP"),
    "a fusion": ({"fuses": ["RMSNorm", "MLP"], "model": "qwen3"}, None),
}


@pytest.mark.skipif(not is_kernels_available(), reason="this Transformers takes the installed kernels for too old")
@pytest.mark.parametrize("what", LOADED)
def test_the_loader_of_transformers_takes_it(what, tmp_path, qwen3_folder, monkeypatch):
    """Up to the binding of forwards, which Transformers does on an accelerator alone, and not from local folders."""
    options, target = LOADED[what]
    given = {**options, "model": skeleton(options["model"]) if "model" in options else None}
    made = new(name(), folder=tmp_path, **given)
    (entry,) = config_of(made).entries
    mapping = {target or entry.target: f"{made.folder}:{made.kernel}"}
    expected = tiny.logits(transformers.AutoModelForCausalLM.from_pretrained(qwen3_folder), "qwen3")
    monkeypatch.setattr(transformers.PreTrainedModel, "set_use_kernels", lambda *_, **__: None)
    # What Transformers registers for its loader, it registers for the whole process.
    monkeypatch.setattr(transformers.monkey_patching, "_monkey_patch_mapping_cache", {})
    monkeypatch.setattr(transformers.conversion_mapping, "_checkpoint_conversion_mapping_cache", None)
    config = transformers.KernelConfig(mapping, use_local_kernel=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(qwen3_folder, use_kernels=True, kernel_config=config)
    layouts = [each for each in model.modules() if type(each).__name__ == f"{made.kernel}Layout"]
    assert layouts
    kernel = vars(sys.modules[type(layouts[0]).__module__])[made.kernel]
    for layout in layouts:
        layout.forward = kernel.forward.__get__(layout)
    torch.testing.assert_close(tiny.logits(model, "qwen3"), expected, rtol=1e-4, atol=1e-5)


def test_an_untouched_kernel_is_verified(tmp_path):
    model = tiny.model("qwen3", num_hidden_layers=1)
    fused = new(name(), fuses=["RMSNorm", "MLP"], model=skeleton("qwen3"), folder=tmp_path, triton=True)
    with kernelgraft.graft(model, config_of(fused)) as graft:
        verified = graft.verify()
        assert verified.passed, str(verified)


def test_gate_and_up_are_merged_or_kept(tmp_path):
    for merge, expected in ((True, {"gate_up_proj", "down_proj"}), (False, {"gate_proj", "up_proj", "down_proj"})):
        made = new(name(), replaces="MLP", model=skeleton("qwen3"), folder=tmp_path, merge=merge)
        grafted = tiny.model("qwen3")
        kernelgraft.graft(grafted, config_of(made))
        assert {each.partition(".")[0] for each, _ in grafted.model.layers[0].mlp.named_parameters()} == expected


def test_its_own_tests_pass(tmp_path):
    made = new("own-tests", replaces="RMSNorm", folder=tmp_path, triton=True)
    done = run_its_tests(made)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout


def test_the_repository_is_in_the_layout_of_the_hub(tmp_path):
    made = new("HubNorm", replaces="RMSNorm", folder=tmp_path)
    folder = tmp_path / "hub-norm"
    assert (made.folder, made.kernel) == (str(folder), "HubNorm")
    assert [str(each) for each in Build.open(folder).general.backends] == ["cpu", "cuda"]
    ids = set()
    for backend in ("cpu", "cuda"):
        build = folder / "build" / f"torch-{backend}"
        metadata = Metadata.read_from_file(build / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, build))
        assert str(metadata.name) == "hub-norm"
        ids.add(metadata.id)
    assert len(ids) == 2
    assert kernels.get_local_kernel(folder, backend="cpu").layers.HubNorm.__name__ == "HubNorm"
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: kernels\n")
    assert {f"tests/test_{'hub_norm'}.py", "kernels.toml", "torch-ext/hub_norm/layers.py"} <= set(made.files)
    assert tomllib.loads((folder / "kernels.toml").read_text())["kernel"][0]["replaces"] == "RMSNorm"
    assert json.loads(json.dumps(made.to_json())) == made.to_json() | {
        "replaces": ["RMSNorm"],
        "files": list(made.files),
    }


def test_transformers_own_rules_say_the_same_as_the_packing(tmp_path):
    made = new(name(), fuses=["RMSNorm", "MLP"], model=skeleton("qwen3"), folder=tmp_path)
    by_packing = str(kernelgraft.plan(skeleton("qwen3"), config_of(made)).kinds[0].program)
    code = next(Path(made.folder).glob("torch-ext/*/kernel.py"))
    code.write_text(code.read_text().replace("    packing = {", "    not_used = {"))
    assert str(kernelgraft.plan(skeleton("qwen3"), config_of(made)).kinds[0].program) == by_packing


# --- what a module computes is found by trying it


class Swapped(nn.Module):
    """Its names say the opposite of what they do."""

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Linear(8, 8)
        self.gate_proj = nn.Linear(8, 8)
        self.down_proj = nn.Linear(8, 8)
        self.act = nn.GELU()

    def forward(self, x):
        return self.down_proj(self.act(self.up_proj(x)) * self.gate_proj(x))


class Halves(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.both, self.out, self.act, self.first = nn.Linear(8, 32), nn.Linear(16, 8), nn.SiLU(), first

    def forward(self, x):
        a, b = self.both(x).chunk(2, dim=-1)
        return self.out(self.act(a) * b if self.first else a * self.act(b))


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x):
        return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight


def test_formulas_are_told_apart():
    assert recognize(tiny.model("gemma3").model.norm).formula.__name__ == "rms_norm_offset"
    assert recognize(tiny.model("llama").model.norm).formula.__name__ == "rms_norm"
    assert recognize(nn.RMSNorm(8, eps=1e-5)).eps_value == 1e-5
    assert isinstance(recognize(nn.LayerNorm(8)), Norm)
    assert recognize(Swapped()) == GatedMLP("up_proj", "gate_proj", "down_proj", "act", True, False, "x")
    assert recognize(Halves(True)).gate_first
    assert not recognize(Halves(False)).gate_first
    assert isinstance(recognize(tiny.model("vit").vit.layers[0].mlp), TwoLayerMLP)
    for other in (Strange(), nn.Linear(8, 8), tiny.model("llama").model.layers[0].self_attn, nn.Identity()):
        assert recognize(other) is None


# --- refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, ["--replaces RMSNorm", "--fuses RMSNorm,MLP"]),
        ({"replaces": "Attention"}, ["RMSNorm and MLP", "--model"]),
        ({"fuses": ["RMSNorm", "MLP"]}, ["--model DIR"]),
        ({"fuses": ["RMSNorm"], "model": "qwen3"}, ["two classes or more"]),
        ({"fuses": ["RMSNorm", "Attention"], "model": "qwen3"}, ["Qwen3Attention", "a norm, a gated MLP"]),
        ({"replaces": "LayerNorm", "model": "qwen3"}, ["'LayerNorm'"]),
        ({"fuses": ["MLP", "Attention"], "model": "qwen3"}, ["its own output", "mlp + "]),
        ({"fuses": ["RMSNorm", "Conv2d"], "model": "qwen3"}, ["Conv2d", "Qwen3RMSNorm"]),
        ({"fuses": ["RMSNorm", "MLP"], "model": "qwen3", "at": ["norm", "mlp"]}, ["post_attention_layernorm,mlp"]),
        ({"replaces": "LayerNorm", "model": "vit", "triton": True}, ["Triton template", "LayerNorm"]),
    ],
)
def test_what_cannot_be_made_says_why_and_leaves_nothing(options, said, tmp_path):
    model = skeleton(options["model"]) if "model" in options else None
    with pytest.raises(AuthoringError) as error:
        new("refused", folder=tmp_path, **{**options, "model": model})
    for words in said:
        assert words in str(error.value)
    assert not list(tmp_path.iterdir())


def test_names_and_folders(tmp_path):
    assert new("RMSNormMLP", replaces="RMSNorm", folder=tmp_path).folder == str(tmp_path / "rms-norm-mlp")
    assert new("my_fast-norm", replaces="RMSNorm", folder=tmp_path).kernel == "MyFastNorm"
    with pytest.raises(AuthoringError, match="is there already"):
        new("my-fast-norm", replaces="RMSNorm", folder=tmp_path)
    with pytest.raises(AuthoringError, match="cannot be a name"):
        new("../x", replaces="RMSNorm", folder=tmp_path)
    with pytest.raises(AuthoringError, match="two of them at least"):
        new("x", replaces="RMSNorm", folder=tmp_path)
