"""Where the bytes of a load go: views of the mapped file, one allocation for what is merged, and nothing left open."""

import gc
import os
import shutil
import sys
import threading

import pytest
import torch
import transformers
from safetensors import SafetensorError

import kernelgraft
import tiny
from allocations import Allocations, in_file
from kernelgraft import KernelConfig
from kernelgraft.errors import CheckpointError, PlanError
from leftovers import mappings
from test_models import use

pytestmark = pytest.mark.transformers

GUIDE = tiny.guide_config()
TRANSPOSED = KernelConfig({"Experts": use("experts.py:TransposedExperts")}, inherit_mapping=False)


def load(folder, config, cls=transformers.AutoModelForCausalLM, **kwargs):
    return kernelgraft.from_pretrained(cls, folder, kernel_config=config, **kwargs)


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_what_is_a_whole_tensor_of_the_file_is_a_view_of_it(shards, tmp_path):
    tiny.model("qwen3").save_pretrained(tmp_path, max_shard_size=shards)
    files = list(tmp_path.glob("*.safetensors"))
    plain, model = load(tmp_path, None), load(tmp_path, GUIDE)
    merged = {f"model.layers.{index}.post_attention_layernorm.gate_up_proj.weight" for index in range(2)}
    assert all(any(in_file(p, file) for file in files) for p in plain.parameters())
    assert {n for n, p in model.named_parameters() if not any(in_file(p, file) for file in files)} == merged


@pytest.fixture
def allocated(monkeypatch):
    """`allocated(folder, config)` loads; it returns the model, and which storages of a kilobyte or more are new."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # everything in this thread, where the mode sees it

    def run(folder, config, **kwargs):
        with Allocations() as allocations:
            model = load(folder, config, **kwargs)
        return model, {address for address, (size, _) in allocations.found.items() if size >= 1024}

    return run


def storages(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.nbytes >= 1024}


def test_a_merged_parameter_is_allocated_once_and_nothing_besides(qwen3_folder, allocated):
    model, found = allocated(qwen3_folder, GUIDE)
    merged = [layer.post_attention_layernorm.gate_up_proj.weight for layer in model.model.layers]
    assert found == storages(merged)
    assert len(found) == 2


def test_a_cast_parameter_is_allocated_once_and_nothing_besides(qwen3_folder, allocated):
    model, found = allocated(qwen3_folder, GUIDE, dtype=torch.float64)
    assert found == storages(model.parameters())


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_go_from_the_file_to_their_packed_place(kind, checkpoint, allocated):
    """Transformers stacks and concatenates what the file has; the layout transposes that: still one allocation each."""
    model, found = allocated(checkpoint(kind), TRANSPOSED)
    experts = [layer.mlp.experts for layer in model.model.layers]
    assert found == storages([tensor for each in experts for tensor in (each.w13, each.w2)])
    assert len(found) == 4


# --- what a load leaves behind


def open_now():
    gc.collect()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(5)
    return sorted(os.listdir("/proc/self/fd")), threading.active_count()


class Failing(torch.nn.Module):
    def forward(self, hidden_states):
        return hidden_states


class FailingLayout(torch.nn.Module):
    packing = {"scale": "weight"}

    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(hidden_size))
        self.unfilled = torch.nn.Parameter(torch.ones(hidden_size))


def break_index(folder, monkeypatch):
    next(folder.glob("model-00002*")).write_bytes(b"no safetensors file")
    return GUIDE, {}


def break_reading(folder, monkeypatch):
    from kernelgraft.checkpoint import positioned

    def read(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(positioned, "preadv", read)
    return GUIDE, {}


def break_plan(folder, monkeypatch):
    return KernelConfig({"RMSNorm": Failing}, inherit_mapping=False), {}


def break_shapes(folder, monkeypatch):
    return GUIDE, {"intermediate_size": 40}


BREAKS = {
    "a file that is none": (break_index, (CheckpointError, SafetensorError)),
    "a read that fails": (break_reading, CheckpointError),
    "a plan that is refused": (break_plan, PlanError),
    "other shapes": (break_shapes, RuntimeError),
}


@pytest.mark.parametrize(("break_it", "error"), BREAKS.values(), ids=BREAKS)
def test_a_load_that_raises_leaves_nothing_open(break_it, error, tmp_path, monkeypatch):
    tiny.model("qwen3").save_pretrained(tmp_path, max_shard_size="20KB")
    load(tmp_path, GUIDE)
    before = open_now()
    assert mappings(tmp_path) == []
    config, options = break_it(tmp_path, monkeypatch)
    with pytest.raises(error):
        load(tmp_path, config, **options)
    assert open_now() == before
    assert mappings(tmp_path) == []


def test_a_load_leaves_no_file_and_no_thread_open(tmp_path):
    tiny.model("qwen3").save_pretrained(tmp_path)  # a folder that no other test has a model of
    load(tmp_path, GUIDE)
    before = open_now()
    model = load(tmp_path, GUIDE)
    assert open_now() == before
    assert torch.isfinite(tiny.logits(model)).all()
    assert mappings(tmp_path)  # the parameters hold the pages
    del model
    gc.collect()
    assert mappings(tmp_path) == []


# --- the garbage collector


@pytest.fixture
def collections():
    """Notes each walk of Python's garbage collector inside Transformers' loading; there is one for each 100 objects."""
    seen = []

    def note(phase, info):
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_name == "from_pretrained" and frame.f_code.co_filename.endswith("modeling_utils.py"):
                seen.append(info["generation"])
                return
            frame = frame.f_back

    before = gc.get_threshold()
    gc.callbacks.append(note)
    gc.set_threshold(100, 1, 1)
    yield seen
    gc.set_threshold(*before)
    gc.callbacks.remove(note)


@pytest.mark.parametrize("config", [None, GUIDE], ids=["without kernels", "with"])
def test_no_garbage_is_looked_for_while_a_checkpoint_is_read(config, qwen3_folder, collections):
    kernelgraft.AutoModelForCausalLM.from_pretrained(qwen3_folder, kernel_config=config)
    assert collections == []
    assert gc.isenabled()


def test_it_is_where_transformers_fills_the_model(tmp_path, collections):
    model = tiny.model("qwen3")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    kernelgraft.AutoModelForCausalLM.from_pretrained(tmp_path, kernel_config=GUIDE)
    assert collections
    assert gc.isenabled()


def test_it_goes_on_after_a_load_that_failed(tmp_path, qwen3_folder):
    shutil.copytree(qwen3_folder, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError):
        kernelgraft.AutoModelForCausalLM.from_pretrained(tmp_path / "cut", kernel_config=GUIDE)
    assert gc.isenabled()
