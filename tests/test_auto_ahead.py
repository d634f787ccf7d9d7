"""Bytes that are read while the rest of a load is found out: on a GPU in earnest, and here on the CPU."""

import os
import sys
import threading

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import kernelgraft
import tiny
from kernelgraft import KernelConfig, auto
from kernelgraft.checkpoint import positioned
from kernelgraft.checkpoint.ahead import ReadAhead
from kernelgraft.errors import CheckpointError, KernelGraftError
from leftovers import assert_nothing_left
from test_auto import assert_same
from test_models import CASES

pytestmark = pytest.mark.transformers

NOTHING = KernelConfig({}, inherit_mapping=False)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(auto, "_is_worth_it", lambda _: True)


@pytest.fixture
def ahead(monkeypatch):
    """The names of what is read ahead, a set for each time that some was added; and those that a model then got."""
    found = {"added": [], "taken": set()}
    add, tensor_for = ReadAhead.add, ReadAhead.tensor_for

    def adds(self, names):
        before = set(self._tensors)
        add(self, names)
        found["added"].append({source.name for source in self._tensors.keys() - before})

    def takes(self, lazy):
        value = tensor_for(self, lazy)
        if value is not None:
            found["taken"].add(lazy.whole_source.name)
        return value

    monkeypatch.setattr(ReadAhead, "add", adds)
    monkeypatch.setattr(ReadAhead, "tensor_for", takes)
    return found


def load(folder, config=NOTHING, cls=transformers.AutoModelForCausalLM, **kwargs):
    return kernelgraft.from_pretrained(cls, folder, **{"kernel_config": config, "device_map": "cpu", **kwargs})


def plain_load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **kwargs)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_kind_is_what_transformers_loads(kind, checkpoint, ahead):
    cls = tiny.model_class(kind)
    model = load(checkpoint(kind), cls=cls)
    assert_same(model, cls.from_pretrained(checkpoint(kind)), kind)
    assert ahead["taken"] == ahead["added"][0] > set()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kernel_gets_its_parameters(case, checkpoint, ahead):
    cls, folder = tiny.model_class(case.kind), checkpoint(case.kind, **case.changes)
    state = load(folder, case.config, cls=cls).state_dict()
    expected = cls.from_pretrained(folder).state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert ahead["taken"] == set.union(*ahead["added"]) > set()


def test_first_what_no_kernel_asks_for_and_with_the_plan_what_none_packs(qwen3_folder, ahead):
    load(qwen3_folder, tiny.guide_config())
    first, second = ahead["added"]
    layer = "model.layers.0"
    assert {"model.embed_tokens.weight", f"{layer}.self_attn.q_proj.weight"} <= first
    assert {f"{layer}.mlp.down_proj.weight", f"{layer}.post_attention_layernorm.weight"} <= second
    assert not any("gate_proj" in name or "up_proj" in name for name in first | second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_what_is_cast_is_not_read_ahead(dtype, qwen3_folder, ahead):
    assert_same(load(qwen3_folder, dtype=dtype), plain_load(qwen3_folder, dtype=dtype))
    assert ahead["taken"] == set()


def test_what_comes_out_otherwise_is_read_once_more(qwen3_folder, ahead, monkeypatch):
    """A dtype that Transformers keeps for some parameters is not known when they are read ahead."""
    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "_keep_in_fp32_modules_strict", ["q_proj"])
    folder = qwen3_folder
    model, plain = (f(folder, dtype=torch.float32) for f in (load, plain_load))
    assert_same(model, plain)
    model, plain = (f(folder, dtype="auto") for f in (load, plain_load))
    assert_same(model, plain)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_tied(tied, checkpoint):
    folder = checkpoint("llama", tie_word_embeddings=tied)
    model = load(folder)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert_same(model, plain_load(folder), "llama")


def test_shards_are_read_ahead(tmp_path, ahead):
    tiny.model("qwen3").save_pretrained(tmp_path, max_shard_size="20KB")
    assert_same(load(tmp_path, tiny.guide_config()), plain_load(tmp_path))
    assert len(ahead["taken"]) > 10


def test_a_subfolder_is_left_to_transformers(tmp_path, ahead):
    tiny.model("qwen3").save_pretrained(tmp_path / "inner")
    tiny.model("llama").save_pretrained(tmp_path)  # what must not be read
    assert_same(load(tmp_path, subfolder="inner"), plain_load(tmp_path, subfolder="inner"))
    assert ahead["added"] == []


def test_files_that_transformers_does_not_use_are_let_go(tmp_path, qwen3_folder, monkeypatch):
    save_file(load_file(qwen3_folder / "model.safetensors"), tmp_path / "other.safetensors")
    monkeypatch.setattr(auto, "_plain_files", lambda *_: [tmp_path / "other.safetensors"])
    assert_same(load(qwen3_folder), plain_load(qwen3_folder))
    assert_nothing_left(tmp_path)


def test_missing_and_unexpected_tensors_are_reported_as_ever(tmp_path, qwen3_folder):
    tiny.model("qwen3").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["extra.weight"] = state.pop("model.norm.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, info = load(tmp_path, output_loading_info=True)
    _, expected = plain_load(tmp_path, output_loading_info=True)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert set(info[key]) == set(expected[key]), key
    assert set(info["missing_keys"]) == {"model.norm.weight"}


def fails(monkeypatch, error):
    def preadv(fd, buffers, offset):
        raise error

    monkeypatch.setattr(positioned, "preadv", preadv)


def test_a_read_that_fails_fails_the_load_and_leaves_nothing(qwen3_folder, monkeypatch):
    before = sys.getswitchinterval()
    fails(monkeypatch, OSError(5, "Input/output error"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* cannot be read at byte \d+"):
        load(qwen3_folder)
    assert_nothing_left(qwen3_folder)
    assert sys.getswitchinterval() == before


def test_a_plan_that_is_refused_ends_the_reading(qwen3_folder, ahead):
    with pytest.raises(KernelGraftError):
        load(qwen3_folder, KernelConfig({"NoSuchClass": f"{tiny.EXAMPLE}:CustomRMSNorm"}, inherit_mapping=False))
    assert ahead["added"]
    assert_nothing_left(qwen3_folder)


def test_ctrl_c_while_the_plan_is_made_ends_the_reading(qwen3_folder, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(auto, "make_blueprint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(qwen3_folder)
    assert_nothing_left(qwen3_folder)


def test_a_file_that_is_replaced_while_it_is_read_is_refused(tmp_path, monkeypatch):
    tiny.model("qwen3").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    real = auto.make_blueprint

    def replaces(*args, **kwargs):
        blueprint = real(*args, **kwargs)
        (tmp_path / "new").write_bytes(file.read_bytes())
        os.replace(tmp_path / "new", file)
        return blueprint

    monkeypatch.setattr(auto, "make_blueprint", replaces)
    with pytest.raises(CheckpointError, match="was replaced or written to while it was being loaded"):
        load(tmp_path)


def test_threads_switch_often_while_something_is_read_ahead_and_as_before_afterwards(qwen3_folder, monkeypatch):
    before = sys.getswitchinterval()
    inside, both = [], threading.Barrier(2)
    real = auto.make_blueprint

    def looks(*args, **kwargs):
        both.wait(60)  # two loads at once: the first to end must not take it from the other
        inside.append(sys.getswitchinterval())
        return real(*args, **kwargs)

    monkeypatch.setattr(auto, "make_blueprint", looks)
    threads = [threading.Thread(target=load, args=(qwen3_folder,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == [pytest.approx(1e-4), pytest.approx(1e-4)]
    assert sys.getswitchinterval() == before
