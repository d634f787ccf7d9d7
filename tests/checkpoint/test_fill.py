"""Lazy tensors on their way into a module: what is checked, and that bytes move once."""

import errno
import gc
import os
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import kernelgraft
from allocations import Allocations, in_file
from kernelgraft.checkpoint import positioned
from kernelgraft.checkpoint.files import Checkpoint, checkpoint_files
from kernelgraft.checkpoint.fill import check_names, fill_from, materialize
from kernelgraft.conversion.lazy import LazyTensor
from kernelgraft.errors import CheckpointError
from test_load import FUSED, ON_META, SINGLE, Tower, assert_same_state, on_meta, saved, tower

CPU = torch.device("cpu")


def test_names_and_shapes_of_the_module_are_let_through():
    model = tower()
    check_names(model, model.state_dict())


@pytest.mark.parametrize("left", ["embed.weight", "head.weight"])
def test_one_of_several_tied_names_is_enough(left):
    model = tower(tied=True)
    state = model.state_dict()
    del state[left]
    check_names(model, state)
    del state["embed.weight" if left == "head.weight" else "head.weight"]
    with pytest.raises(CheckpointError, match=r"missing: embed\.weight, head\.weight"):
        check_names(model, state)


def test_an_error_counts_what_it_does_not_list():
    state = {f"extra.{index}": torch.zeros(1) for index in range(25)}
    with pytest.raises(CheckpointError) as error:
        check_names(nn.Linear(2, 2), state)
    assert "missing: weight, bias" in str(error.value)
    assert "extra.19 and 5 more" in str(error.value)
    assert "extra.20" not in str(error.value)


def test_filling_leaves_tensors_lazy_until_they_are_materialized(tmp_path):
    file = saved(tower(), tmp_path)
    model = on_meta()
    with Checkpoint([file]) as tensors:
        fill_from(model, tensors, CPU)
        assert all(isinstance(parameter, LazyTensor) for parameter in model.parameters())
        assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())
        materialize(model)
    assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}
    assert {type(buffer) for buffer in model.buffers()} == {torch.Tensor}
    assert_same_state(model, tower())


def test_tied_parameters_are_materialized_as_one(tmp_path):
    file = saved(tower(tied=True), tmp_path)
    model = on_meta(tied=True)
    with Checkpoint([file]) as tensors:
        fill_from(model, tensors, CPU)
        materialize(model)
    assert model.head.weight is model.embed.weight
    assert in_file(model.head.weight, file)


def test_a_whole_parameter_is_the_mapped_file_and_a_merged_one_is_not(tmp_path):
    file = saved(tower(), tmp_path)
    model = kernelgraft.load(on_meta(), file, FUSED, **ON_META)
    merged = {f"blocks.{index}.norm.w12" for index in range(2)}
    for name, parameter in model.named_parameters():
        assert in_file(parameter, file) is (name not in merged), name
    assert all(in_file(block.shift, file) for block in model.blocks)


def without_unsaved_buffers():
    """To make one again its module is built once more, which allocates what that has."""
    model = on_meta()
    for index, block in enumerate(model.blocks):
        block.scale = torch.tensor(0.5 + index)
    return model


def test_nothing_is_allocated_but_what_stays(tmp_path):
    file = saved(tower(), tmp_path)
    model = without_unsaved_buffers()
    with Allocations() as allocations:
        kernelgraft.load(model, file, FUSED, **ON_META)
    merged = [block.norm.w12 for block in model.blocks]
    assert {each.untyped_storage().data_ptr() for each in merged} <= allocations.found.keys()
    assert allocations.besides(merged) == {}


@pytest.mark.parametrize("config", [None, SINGLE, FUSED], ids=["none", "single", "fused"])
def test_values_in_another_dtype_are_cast_on_the_way(config, tmp_path):
    file = saved(tower().to(torch.bfloat16), tmp_path)
    model = without_unsaved_buffers()
    with Allocations() as allocations:
        kernelgraft.load(model, file, config, **ON_META)
    assert_same_state(model, tower().to(torch.bfloat16).float())
    assert allocations.besides([*model.parameters(), *model.buffers()]) == {}


def test_shards_are_read_from_where_each_part_is(tmp_path):
    state = tower().state_dict()
    halves = {"one.safetensors": {}, "two.safetensors": {}}
    for index, (name, tensor) in enumerate(state.items()):
        halves[("one.safetensors", "two.safetensors")[index % 2]][name] = tensor
    for file, tensors in halves.items():
        save_file(tensors, tmp_path / file)
    weight_map = {name: file for file, tensors in halves.items() for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(str({"weight_map": weight_map}).replace("'", '"'))
    assert weight_map["blocks.0.mlp.w1.weight"] != weight_map["blocks.0.mlp.w2.weight"]
    assert len(checkpoint_files(tmp_path)) == 2
    model = kernelgraft.load(on_meta(), tmp_path, FUSED, **ON_META)
    assert_same_state(model, tower())


def test_a_buffer_is_made_again_on_the_cpu_by_its_own_module(tmp_path):
    file = saved(tower(), tmp_path)
    model = on_meta()
    with Checkpoint([file]) as tensors:
        fill_from(model, tensors, CPU)
    assert [block.scale.item() for block in model.blocks] == [0.5, 1.5]
    with torch.device("meta"):
        unrecorded = Tower()
    with Checkpoint([file]) as tensors, pytest.raises(CheckpointError, match="non-persistent buffer"):
        fill_from(unrecorded, tensors, CPU)
    assert all(parameter.is_meta for parameter in unrecorded.parameters())


# --- nothing is half done


def identities(model):
    return {name: id(tensor) for name, tensor in model.named_parameters()}


@pytest.fixture
def failing(monkeypatch):
    """A disk that fails at its third read, once `failing()` was called."""

    def start():
        calls = iter(range(100))

        def third_fails(fd, buffers, offset):
            if next(calls) >= 2:
                raise OSError(errno.EIO, "Input/output error")
            return os.preadv(fd, [buffers[0][:1]], offset)

        monkeypatch.setattr(positioned, "preadv", third_fails)

    return start


@pytest.mark.parametrize("config", [None, FUSED], ids=["plain", "grafted"])
def test_a_disk_that_fails_leaves_a_live_module_with_its_values(config, tmp_path, failing):
    file = saved(tower(), tmp_path)
    model = tower()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    before = identities(model)
    failing()
    with pytest.raises(CheckpointError, match="Input/output error"):
        kernelgraft.load(model, file, config)
    assert identities(model) == before
    assert all((parameter == 7).all() for parameter in model.parameters())


def test_a_disk_that_fails_leaves_a_module_on_meta_as_it_was(tmp_path, failing):
    file = saved(tower(), tmp_path)
    model = on_meta()
    before, modules = identities(model), dict(model.named_modules())
    failing()
    with pytest.raises(CheckpointError, match="Input/output error"):
        kernelgraft.load(model, file, FUSED, **ON_META)
    assert identities(model) == before
    assert all(parameter.is_meta for parameter in model.parameters())
    assert dict(model.named_modules()) == modules
    assert kernelgraft.graft_of(model) is None


def test_a_file_that_is_replaced_during_the_load_is_refused(tmp_path, monkeypatch):
    file = saved(tower(), tmp_path)
    model = on_meta()
    before = identities(model)
    once = threading.Lock()

    def replaced(fd, buffers, offset):
        if once.acquire(blocking=False):
            other = file.with_name("other.safetensors")
            other.write_bytes(file.read_bytes())
            other.rename(file)
        return os.preadv(fd, buffers, offset)

    monkeypatch.setattr(positioned, "preadv", replaced)
    with pytest.raises(CheckpointError, match="was replaced or written to while it was being loaded"):
        kernelgraft.load(model, file, FUSED, **ON_META)
    assert identities(model) == before


def test_a_live_module_is_overwritten_in_place_and_autograd_notices(tmp_path):
    file = saved(tower(), tmp_path)
    model = tower()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    kernelgraft.load(model, file)
    assert_same_state(model, tower())
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == pointers
    assert all(parameter._version > versions[name] for name, parameter in model.named_parameters())


def test_no_thread_descriptor_or_mapping_is_left(tmp_path):
    file = saved(tower(), tmp_path)
    before = set(os.listdir("/proc/self/fd"))
    model = kernelgraft.load(on_meta(), file, FUSED, **ON_META)
    assert set(os.listdir("/proc/self/fd")) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kernelgraft")]
    del model
    gc.collect()
    with open("/proc/self/maps") as maps:
        assert str(file) not in maps.read()
