"""Sites put into a model: no second copy, the same parameters where they can be, and all of them or none."""

import contextlib
import gc

import pytest
import torch

import kernelgraft
import twins
import zoo
from kernelgraft import graft_of
from kernelgraft.errors import PlanError
from twins import KINDS, assert_same_state, identities, run


@pytest.mark.parametrize("kind", KINDS)
def test_a_graft_holds_no_second_copy_and_neither_does_what_it_leaves(kind):
    model = twins.untouched(kind)
    before = twins.live_bytes()
    graft = twins.graft(kind, model)
    assert twins.live_bytes() == before
    graft.remove()
    assert twins.live_bytes() == before


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_packed_whole_is_the_same_parameter_and_stays_in_its_place(kind):
    model = twins.untouched(kind)
    originals = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    graft = twins.graft(kind, model)
    whole = []
    for path, slot in graft._slots().items():
        for name, part in slot.parts.items():
            if part.kind == "whole" and f"{path}.{name}" in originals:
                parameter, pointer = originals[f"{path}.{name}"]
                assert slot.packed(part.packed[0]) is parameter
                assert parameter.data_ptr() == pointer
                whole.append(name)
    assert len(whole) > 2
    graft.remove()
    assert all(parameter is originals[name][0] for name, parameter in model.named_parameters())


def test_originals_have_no_bytes_and_no_gradients_while_the_graft_is_there():
    model = zoo.model()
    run("zoo", model).sum().backward()
    q, dropped = model.mix.q.weight, model.legacy.bias
    graft = zoo.graft(model)
    assert (q.numel(), q.grad) == (0, None)
    assert dropped.numel() == zoo.H
    assert model.mix.qkv.weight.grad.shape == (3 * zoo.H, zoo.H)
    graft.remove()
    assert q.shape == q.grad.shape == (zoo.H, zoo.H)
    assert model.mix.q.weight is q


def test_packed_parameters_have_the_dtype_and_the_flag_of_their_sources():
    model = zoo.model().to(torch.bfloat16)
    model.mix.requires_grad_(False)
    model.norm.requires_grad_(False)
    zoo.graft(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"mix.qkv.weight", "mix.qkv.bias", "mix.o.weight", "mix.o.bias", "norm.scale"}


def test_frozen_weights_are_frozen_afterwards_and_thawed_ones_thawed():
    model = zoo.model()
    model.mix.requires_grad_(False)
    graft = zoo.graft(model)
    model.mix.requires_grad_(True)
    model.wide.requires_grad_(False)
    graft.remove()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"wide.both.weight", "wide.both.bias"}


def test_half_frozen_sources_are_refused():
    model = zoo.model()
    model.mix.k.requires_grad_(False)
    before = identities(model)
    with pytest.raises(PlanError, match=r"mix\.qkv\.weight.*differ in requires_grad.*mix\.k\.weight: False"):
        zoo.graft(model)
    assert identities(model) == before


def test_the_random_state_does_not_move():
    model = zoo.model()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    zoo.graft(model).remove()
    assert torch.equal(torch.get_rng_state(), before)


# --- an exception in the middle


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["first", "middle", "last"])
def test_an_exception_leaves_the_model_as_it_was(kind, when, monkeypatch):
    twin, model = twins.untouched(kind), twins.untouched(kind)
    for each in (twin, model):
        run(kind, each).pow(2).mean().backward()
    before, class_before = identities(model), type(model)
    keys = {path: vars(module).keys() for path, module in model.named_modules()}
    num_sites = len(kernelgraft.plan(model, config_of(kind), example_inputs=inputs_of(kind)).sites)
    fails_at = {"first": 0, "middle": num_sites // 2, "last": num_sites - 1}[when]
    with failing(fails_at, monkeypatch):
        twins.graft(kind, model)
    assert identities(model) == before
    assert type(model) is class_before
    assert graft_of(model) is None
    assert {path: vars(module).keys() for path, module in model.named_modules()} == keys
    assert_same_state(model.state_dict(), twin.state_dict())
    twins.assert_same_tensors(
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        {name: p.grad for name, p in twin.named_parameters() if p.grad is not None},
    )
    assert torch.equal(run(kind, model), run(kind, twin))
    twins.graft(kind, model).remove()  # nothing is left that stands in the way
    assert identities(model) == before


def test_an_exception_after_a_site_whose_rule_has_no_inverse(monkeypatch):
    twin, model = zoo.model(), zoo.model()
    before = identities(model)
    with failing(1, monkeypatch):
        kernelgraft.graft(model, {"Legacy": zoo.NarrowedLegacy, "Stats": zoo.FastStats})
    assert identities(model) == before
    assert_same_state(model.state_dict(), twin.state_dict())


def test_a_model_whose_class_cannot_be_derived_from_is_not_touched():
    class Sealed(zoo.Zoo):
        def __init_subclass__(cls):
            raise TypeError("sealed")

    with kernelgraft.recorded():
        model = Sealed()
    before = identities(model)
    with pytest.raises(TypeError, match="sealed"):
        zoo.graft(model)
    assert identities(model) == before
    assert graft_of(model) is None


@contextlib.contextmanager
def failing(at, monkeypatch):
    """Expects a `MemoryError` from filling the site number `at`."""
    calls = []
    fill = kernelgraft.install._fill

    def no_room(*args):
        calls.append(None)
        if len(calls) > at:
            raise MemoryError("no room")
        return fill(*args)

    with monkeypatch.context() as patched:
        patched.setattr(kernelgraft.install, "_fill", no_room)
        with pytest.raises(MemoryError, match="no room"):
            yield
    assert gc.isenabled()
    assert len(calls) == at + 1


def config_of(kind):
    return zoo.config() if kind == "zoo" else pytest.importorskip("tiny").guide_config()


def inputs_of(kind):
    return zoo.inputs() if kind == "zoo" else None
