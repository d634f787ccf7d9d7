"""Models streamed to files: what Transformers' own `save_pretrained` writes, without a copy of the model."""

import copy
import errno
import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import kernelgraft
import tiny
from allocations import Allocations
from forked import forked
from kernelgraft.conversion.lazy import eager_steps
from kernelgraft.errors import SaveError
from kills import kill_at
from leftovers import assert_nothing_left
from test_models import CASES
from transformers_state import Snapshot
from twins import assert_same_state

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.transformers

RECORD = "kernelgraft.json"
SIZES = ["50GB", "9KB", 4000]


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


def theirs(model, folder, **options):
    """What Transformers writes for a model of its own."""
    model.save_pretrained(folder, **options)
    return files(folder)


def ours(model, folder, **options):
    """What we write, our record left out."""
    kernelgraft.save_pretrained(model, folder, **options)
    return {name: content for name, content in files(folder).items() if name != RECORD}


def grafted(kind="llama", seed=0, **changes):
    """An untouched model and the same one with kernels."""
    twin = tiny.model(kind, seed, **changes)
    model = copy.deepcopy(twin)
    kernelgraft.graft(model, tiny.guide_config())
    return twin, model


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_grafted_model(case, size, tmp_path):
    twin = tiny.model(case.kind, **case.changes)
    model = copy.deepcopy(twin)
    kernelgraft.graft(model, case.config)
    with eager_steps() as eager:
        model.save_pretrained(tmp_path / "model", max_shard_size=size)
    assert eager.total == 0
    assert (tmp_path / "model" / RECORD).exists()
    (tmp_path / "model" / RECORD).unlink()
    assert files(tmp_path / "model") == theirs(twin, tmp_path / "twin", max_shard_size=size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_an_untouched_model(kind, tied, size, tmp_path):
    model = tiny.model(kind, **({"tie_word_embeddings": tied} if kind != "vit" else {}))
    found = ours(model, tmp_path / "ours", max_shard_size=size)
    assert found == theirs(model, tmp_path / "theirs", max_shard_size=size)
    assert not (tmp_path / "ours" / RECORD).exists()


def test_weights_that_lie_in_one_memory_and_beside_each_other(tmp_path):
    model = tiny.model("llama")
    mlp = model.model.layers[0].mlp
    memory = torch.stack([mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()])
    mlp.gate_proj.weight, mlp.up_proj.weight = (nn.Parameter(part) for part in memory)
    mlp.down_proj.weight = nn.Parameter(torch.zeros(4, *mlp.down_proj.weight.shape)[1])
    for size in SIZES:
        found = ours(model, tmp_path / f"ours{size}", max_shard_size=size)
        assert found == theirs(model, tmp_path / f"theirs{size}", max_shard_size=size)


def test_tied_weights_that_the_class_does_not_know_of_are_refused_as_by_transformers(tmp_path):
    model = tiny.model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(RuntimeError, match="shared tensors"):
        kernelgraft.save_pretrained(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_no_copy_is_made(kind, tmp_path):
    case = next(case for case in CASES if case.kind == kind and len(case.kernels) == 2)
    model = tiny.model(kind, **case.changes)
    kernelgraft.graft(model, case.config)
    with Allocations() as allocations:
        kernelgraft.save_pretrained(model, tmp_path, max_shard_size="50KB")
    largest = max((nbytes for nbytes, _ in allocations.found.values()), default=0)
    assert largest <= 512, allocations.found


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "fp16"},
        {"variant": "fp16", "max_shard_size": "20KB"},
        {"save_original_format": False},
        {"save_peft_format": False, "token": "none"},
    ],
    ids=str,
)
def test_arguments_of_transformers(options, tmp_path):
    for kind in ("llama", "qwen3_moe"):
        model = tiny.model(kind)
        assert ours(model, tmp_path / f"o{kind}", **options) == theirs(model, tmp_path / f"t{kind}", **options)


def test_a_state_dict_that_is_given(tmp_path):
    twin = tiny.model("qwen3_moe")
    model = copy.deepcopy(twin)
    kernelgraft.graft(model, next(case for case in CASES if case.kind == "qwen3_moe").config)
    halves = {name: tensor.half() for name, tensor in twin.state_dict().items() if "embed" not in name}
    given = dict(halves)
    assert ours(model, tmp_path / "ours", state_dict=given) == theirs(twin, tmp_path / "twin", state_dict=dict(halves))
    assert list(given) == list(halves)


def test_positional_arguments(tmp_path):
    twin, model = grafted()
    model.save_pretrained(tmp_path / "model", True, None, False, "20KB")
    twin.save_pretrained(tmp_path / "twin", True, None, False, "20KB")
    (tmp_path / "model" / RECORD).unlink()
    assert files(tmp_path / "model") == files(tmp_path / "twin")
    assert len(files(tmp_path / "model")) > 5


def test_a_device_map_with_the_cpu_in_it(tmp_path):
    tiny.model("qwen3_moe").save_pretrained(tmp_path / "source")
    model = tiny.model_class("qwen3_moe").from_pretrained(tmp_path / "source", device_map={"": "cpu"})
    model.hf_device_map = {"": "cpu"}
    with pytest.warns(UserWarning, match="offloaded"):
        found = ours(model, tmp_path / "ours", max_shard_size="20KB")
    with pytest.warns(UserWarning, match="offloaded"):
        assert found == theirs(model, tmp_path / "theirs", max_shard_size="20KB")


def test_a_class_that_saves_more(tmp_path):
    class Special(tiny.model_class("llama")):
        def save_pretrained(self, save_directory, *args, **kwargs):
            self.config.special = True
            super().save_pretrained(save_directory, *args, **kwargs)
            (Path(save_directory) / "special.txt").write_text(f"{type(self).__name__} {self.num_parameters()}")

    model = Special(tiny.config("llama"))
    found = ours(model, tmp_path / "ours")
    assert found == theirs(model, tmp_path / "theirs")
    assert "special.txt" in found
    model.__class__ = tiny.model_class("llama")
    kernelgraft.graft(model, tiny.guide_config())


CUSTOM = """
from transformers import LlamaConfig, LlamaForCausalLM

class CustomConfig(LlamaConfig):
    model_type = "custom-llama"

class CustomForCausalLM(LlamaForCausalLM):
    config_class = CustomConfig

CustomConfig.register_for_auto_class()
CustomForCausalLM.register_for_auto_class("AutoModelForCausalLM")
"""


def test_code_of_one_s_own_comes_along(tmp_path, monkeypatch):
    (tmp_path / "custom_llama_code.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    import custom_llama_code

    model = custom_llama_code.CustomForCausalLM(custom_llama_code.CustomConfig(**tiny.DECODER))
    found = ours(model, tmp_path / "ours")
    assert found == theirs(model, tmp_path / "theirs")
    assert "custom_llama_code.py" in found
    del sys.modules["custom_llama_code"]


# --- what is not for us


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path):
    _, model = grafted()
    model.save_pretrained(tmp_path / "model", is_main_process=False)
    assert list((tmp_path / "model").iterdir()) == []


def test_a_file_in_the_place_of_the_folder(tmp_path):
    _, model = grafted()
    (tmp_path / "file").write_text("mine")
    model.save_pretrained(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_pushing_is_transformers_own(tmp_path, monkeypatch):
    twin, model = grafted()
    pushed = []
    for name in ("create_repo", "create_and_tag_model_card"):
        monkeypatch.setattr(transformers.modeling_utils, name, lambda *_, **__: None, raising=False)
    monkeypatch.setattr(type(twin), "_upload_modified_files", lambda self, folder, *_, **__: pushed.append(str(folder)))

    class Api:
        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})

    class Card:
        def save(self, path):
            Path(path).write_text("card")

    monkeypatch.setattr(transformers.modeling_utils, "hf_api", Api, raising=False)
    monkeypatch.setattr(
        transformers.modeling_utils, "create_repo", lambda name, **_: Api().create_repo(name), raising=False
    )
    monkeypatch.setattr(transformers.modeling_utils, "create_and_tag_model_card", lambda *_, **__: Card())
    model.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="me/model")
    assert pushed == [str(tmp_path / "model")]
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == twin.state_dict().keys()
    assert (tmp_path / "model" / RECORD).exists()


def test_what_transformers_cannot_be_replaced_in_it_does_itself(tmp_path, monkeypatch):
    """A version of it whose `save_pretrained` is made of other functions."""
    twin, model = grafted()
    monkeypatch.setattr(kernelgraft.compat, "saving_class", lambda *_: None)
    assert ours(model, tmp_path / "ours") == theirs(twin, tmp_path / "theirs")
    assert (tmp_path / "ours" / RECORD).exists()


# --- into a folder that has a checkpoint


def test_single_files_and_shards_take_each_other_s_place(tmp_path):
    models = [tiny.model("llama", seed) for seed in range(4)]
    for model, size in zip(models, ["50GB", "20KB", "20KB", "50GB"], strict=True):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / "tokenizer.json").write_text("theirs")
        found = ours(model, tmp_path / "folder", max_shard_size=size)
        expected = theirs(model, tmp_path / f"{size}{id(model)}", max_shard_size=size)
        assert found == expected | {"tokenizer.json": b"theirs"}
        assert_same_state(type(model).from_pretrained(tmp_path / "folder").state_dict(), model.state_dict())


def test_into_the_folder_that_the_weights_are_mapped_from(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path)
    model = tiny.model_class("llama").from_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kernelgraft.save_pretrained(model, tmp_path, max_shard_size="20KB")
    kernelgraft.save_pretrained(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert_same_state(type(model).from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_the_record_of_another_model_does_not_stay(tmp_path):
    twin, model = grafted()
    kernelgraft.save_pretrained(model, tmp_path)
    assert (tmp_path / RECORD).exists()
    kernelgraft.save_pretrained(twin, tmp_path)
    assert not (tmp_path / RECORD).exists()


@pytest.mark.parametrize("size", ["50GB", "20KB"])
def test_a_disk_that_fills_up_leaves_the_old_checkpoint(size, tmp_path, monkeypatch):
    old, new = tiny.model("llama", 0), tiny.model("llama", 1).half()
    kernelgraft.save_pretrained(old, tmp_path / "folder", max_shard_size=size)
    before = files(tmp_path / "folder")
    write, calls = os.pwrite, []

    def pwrite(fd, data, offset):
        calls.append(offset)
        if len(calls) == (1 if size == "50GB" else 2):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(SaveError, match=r"Saving into .*folder failed: No space left on device") as error:
        kernelgraft.save_pretrained(new, tmp_path / "folder", max_shard_size=size)
    assert error.value.errno == errno.ENOSPC
    assert files(tmp_path / "folder") == before
    assert_nothing_left(tmp_path / "folder")


def test_ctrl_c_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old, new = tiny.model("llama", 0), tiny.model("llama", 1)
    kernelgraft.save_pretrained(old, tmp_path / "folder", max_shard_size="20KB")
    before = files(tmp_path / "folder")
    write, calls = os.pwrite, []

    def pwrite(fd, data, offset):
        calls.append(offset)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(KeyboardInterrupt):
        kernelgraft.save_pretrained(new, tmp_path / "folder", max_shard_size="20KB")
    assert files(tmp_path / "folder") == before
    assert_nothing_left(tmp_path / "folder")


@pytest.mark.parametrize("others", [{}, {"logs/run.txt": b"theirs"}], ids=["", "a subfolder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kill_at_20_random_moments(dtype, others, tmp_path):
    """The config has the dtype in it: with another one both change in one step, and the record goes."""
    twin, old = grafted("llama", 0)
    new = tiny.model("llama", 1).to(dtype)
    folder = tmp_path / "folder"
    for name, content in others.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(content)

    def run(n):
        count = kill_at(n)
        kernelgraft.save_pretrained(new, folder, max_shard_size="20KB")
        (tmp_path / "count").write_text(f"{count[0]}")

    kernelgraft.save_pretrained(old, folder, max_shard_size="20KB")
    assert forked(run, 0) == "done"
    steps = int((tmp_path / "count").read_text())
    found = []
    for n in sorted(random.Random(0).sample(range(1, steps + 1), 20)):
        kernelgraft.save_pretrained(old, folder, max_shard_size="20KB")
        assert forked(run, n) == "killed"
        loaded = type(twin).from_pretrained(folder)
        expected = "old" if loaded.dtype == twin.dtype and same(loaded, twin) else "new"
        for each in (loaded, kernelgraft.AutoModelForCausalLM.from_pretrained(folder)):
            assert_same_state(each.state_dict(), (twin if expected == "old" else new).state_dict())
        assert (folder / RECORD).exists() == (expected == "old")
        assert others.items() <= files(folder).items()
        found.append(expected)
    assert found == sorted(found, reverse=True), "first the old one, then the new one"
    kernelgraft.save_pretrained(new, folder)
    assert_nothing_left(tmp_path / "folder")


def test_a_kill_at_any_time(tmp_path):
    old, new = tiny.model("llama", 0), tiny.model("llama", 1).half()
    folder = tmp_path / "folder"
    for after in random.Random(1).choices(range(60), k=8):
        kernelgraft.save_pretrained(old, folder)
        ended = forked(lambda: kernelgraft.save_pretrained(new, folder, max_shard_size="20KB"), kill_after=after / 1000)
        assert ended in ("killed", "done")
        loaded = type(old).from_pretrained(folder)
        assert_same_state(loaded.state_dict(), (old if loaded.dtype == old.dtype else new).state_dict())


def same(one, other):
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_nothing_of_it_stays_in_transformers(tmp_path):
    twin, model = grafted()
    kernelgraft.save_pretrained(twin, tmp_path / "first")  # what this imports is there now
    before = Snapshot()
    kernelgraft.save_pretrained(model, tmp_path / "second", max_shard_size="20KB")
    assert before.changes() == []


def test_a_save_says_nothing_of_its_own_on_the_way(tmp_path, capsys, caplog):
    model = tiny.model("llama")
    kernelgraft.save_pretrained(model, tmp_path)
    assert "kernelgraft" not in "".join((*capsys.readouterr(), caplog.text))


# --- plain modules


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight


def test_a_plain_module_in_shards(tmp_path):
    model = Tied()
    kernelgraft.save_pretrained(model, tmp_path / "shards", max_shard_size=200)
    kernelgraft.save_pretrained(model, tmp_path / "single")
    names = sorted(files(tmp_path / "shards"))
    assert len(names) > 2
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [name for name in names if name.endswith(".safetensors")]
    for folder in ("shards", "single"):
        loaded = kernelgraft.load(Tied(), tmp_path / folder)
        assert_same_state(loaded.state_dict(), model.state_dict())


def test_arguments_that_only_transformers_takes(tmp_path):
    with pytest.raises(TypeError, match="variant"):
        kernelgraft.save_pretrained(Tied(), tmp_path / "model", variant="fp16")
    assert not (tmp_path / "model").exists()
