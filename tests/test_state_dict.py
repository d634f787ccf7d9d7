"""`state_dict()` of a grafted model, and of anything in it, is that of the untouched model."""

import copy
import threading
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import kernelgraft
import twins
from twins import assert_same_state, pair

KINDS = (*twins.KINDS, pytest.param("llama", marks=pytest.mark.transformers))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def parts(graft, what):
    """Original names of the parameters that are packed in a certain way."""
    slots = graft._slots().items()
    return {f"{path}.{name}" for path, slot in slots for name, part in slot.parts.items() if part.kind == what}


def test_the_whole_model(kind):
    twin, model, _ = pair(kind)
    assert dict(model.named_parameters()).keys() != dict(twin.named_parameters()).keys()
    assert_same_state(model.state_dict(), twin.state_dict())


def test_every_module_in_it(kind):
    twin, model, _ = pair(kind)
    for path, module in twin.named_modules(remove_duplicate=False):
        assert_same_state(model.get_submodule(path).state_dict(), module.state_dict())


def test_inside_another_module_and_with_a_prefix(kind):
    twin, model, _ = pair(kind)
    outer, other = (nn.ModuleDict({"first": nn.Identity(), "inner": each}) for each in (model, twin))
    assert_same_state(outer.state_dict(), other.state_dict())
    assert_same_state(outer.state_dict(prefix="p."), other.state_dict(prefix="p."))


def test_a_slot_with_a_destination_and_a_prefix(kind):
    twin, model, graft = pair(kind)
    for path in twins.slot_paths(graft):
        given = [OrderedDict(first=torch.ones(1)) for _ in range(2)]
        for root, state in zip((model, twin), given, strict=True):
            state._metadata = OrderedDict()
            assert root.get_submodule(path).state_dict(destination=state, prefix="p.") is state
        assert_same_state(*given)
        plain = OrderedDict()  # without metadata, as torch allows
        assert model.get_submodule(path).state_dict(destination=plain) is plain
        assert list(plain) == list(twin.get_submodule(path).state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_in_other_dtypes(kind, dtype):
    twin, model, _ = pair(kind)
    assert_same_state(model.to(dtype).state_dict(), twin.to(dtype).state_dict())


def test_keep_vars(kind):
    twin, model, graft = pair(kind)
    state = model.state_dict(keep_vars=True)
    assert_same_state(state, twin.state_dict(keep_vars=True))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in parts(graft, "whole") & graft.names.keys():
        assert state[name] is parameters[graft.names[name][0]]
    once = {id(tensor): tensor for tensor in state.values() if tensor.requires_grad}
    sum(tensor.sum() for tensor in once.values()).backward()
    for packed in {each for name in graft.names for each in graft.names[name]}:
        assert torch.equal(parameters[packed].grad, torch.ones_like(parameters[packed])), packed


def test_writing_into_values_reaches_the_model(kind):
    """As trainers do that keep averages in place."""
    twin, model, graft = pair(kind)
    copied = {"wide.both.weight", "wide.both.bias"} if kind == "zoo" else set()
    assert parts(graft, "assembled") == copied
    if kind == "zoo":  # these lie between others' elements
        copied |= {f"blocks.{i}.gate.{name}.weight" for i in range(2) for name in ("w1", "w2")}
        copied |= {"twist.a.weight", "twist.b.weight"}
    for root in (model, twin):
        seen = set()
        for name, tensor in root.state_dict().items():
            if name not in copied and tensor.is_floating_point() and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                tensor.mul_(0.5).add_(0.25)
    assert_same_state(model.state_dict(), twin.state_dict())
    twin.eval(), model.eval()
    torch.testing.assert_close(twins.run(kind, model), twins.run(kind, twin))


def test_parts_look_like_tensors_of_their_own(kind):
    """Savers that look at storages take what shares one for tied weights, and drop it."""
    twin, model, _ = pair(kind)

    def storages(state):
        return [tensor.untyped_storage().data_ptr() for tensor in state.values()]

    found, expected = storages(model.state_dict()), storages(twin.state_dict())
    assert [found.index(each) for each in found] == [expected.index(each) for each in expected]
    for name, tensor in model.state_dict().items():
        if tensor.is_contiguous():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_averaged_model(kind):
    twin, model, graft = pair(kind)
    trained = [name for name, packed in graft.names.items() if packed]
    averages = [AveragedModel(each, use_buffers=True) for each in (model, twin)]
    for factor in (2.0, -1.0):
        for root, average in zip((model, twin), averages, strict=True):
            named = dict(root.named_parameters())
            with torch.no_grad():
                for name in trained if root is twin else named:
                    if name in named:
                        named[name].mul_(factor)
            average.update_parameters(root)
    assert_same_state(averages[0].state_dict(), averages[1].state_dict())
    assert torch.isfinite(twins.run(kind, averages[0].module)).all()


def test_packed_names_in_two_threads_whose_blocks_overlap():
    twin, model, graft = pair("zoo")
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    seen = []

    def first():
        with graft.packed_names():
            first_is_in.set()
            assert second_is_in.wait(10)
        first_is_out.set()

    def second():
        assert first_is_in.wait(10)
        with graft.packed_names():
            second_is_in.set()
            assert first_is_out.wait(10)
            seen.append("mix.qkv.weight" in model.state_dict())

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True]
    assert_same_state(model.state_dict(), twin.state_dict())


def test_a_deep_copy_is_independent(kind):
    twin, model, graft = pair(kind)
    copied = copy.deepcopy(model)
    assert_same_state(copied.state_dict(), twin.state_dict())
    for tensor in (*copied.parameters(), *copied.buffers()):
        tensor.detach().zero_()
    assert_same_state(model.state_dict(), twin.state_dict())
    other = kernelgraft.graft_of(copied)
    assert other is not graft
    assert other.model is copied
    other.remove()
    assert type(copied) is type(twin)
    assert graft.is_applied
    assert_same_state(model.state_dict(), twin.state_dict())


def test_a_deep_copy_of_one_slot(kind):
    twin, model, graft = pair(kind)
    for path in twins.slot_paths(graft):
        copied = copy.deepcopy(model.get_submodule(path))
        assert_same_state(copied.state_dict(), twin.get_submodule(path).state_dict())


def test_hooks_on_saving_run_once_where_they_were(kind):
    twin, model = twins.untouched(kind), twins.untouched(kind)
    logs = []
    for root in (twin, model):
        log = []
        logs.append(log)
        for path in ("blocks.0.norm", "blocks.0.gate", "mix", "mix.q") if kind == "zoo" else ("model.layers.0.mlp",):
            module = root.get_submodule(path)
            module.register_state_dict_pre_hook(lambda m, prefix, _, log=log: log.append(("pre", prefix)))
            module.register_state_dict_post_hook(lambda m, s, prefix, _, log=log: log.append((len(s), prefix)))
    twins.graft(kind, model)
    for root in (twin, model):
        root.state_dict()
    assert logs[0] == logs[1] != []


def test_packed_names(kind):
    twin, model, graft = pair(kind)
    with graft.packed_names():
        state = model.state_dict()
        assert state.keys() >= dict(model.named_parameters(remove_duplicate=False)).keys()
        with graft.packed_names():
            assert list(model.state_dict()) == list(state)
        assert list(model.state_dict()) == list(state)
        found = model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in state.items()})
        assert found == nn.modules.module._IncompatibleKeys([], [])
    assert not any(parameter.any() for parameter in model.parameters())
    with pytest.raises(KeyError), graft.packed_names():
        raise KeyError
    assert list(model.state_dict()) == list(twin.state_dict())
