"""A graft applied, asked, switched and removed: the model afterwards is the one that it was."""

import copy
import logging

import pytest
import torch
from torch import nn

import kernelgraft
import twins
import zoo
from kernelgraft import KernelConfig, graft_of
from kernelgraft.errors import ConversionError, GraftError, PlanError
from twins import KINDS, assert_same_state, identities, pair, run


@pytest.mark.parametrize("kind", KINDS)
def test_removed_it_leaves_the_very_same_model(kind):
    twin, model = twins.untouched(kind), twins.untouched(kind)
    before = identities(model)
    graft = twins.graft(kind, model)
    assert identities(model) != before
    assert (graft_of(model), graft.is_applied) == (graft, True)
    graft.remove()
    assert identities(model) == before
    assert (graft_of(model), graft.is_applied) == (None, False)
    assert vars(model).keys() == vars(twin).keys()
    for path, module in twin.named_modules():
        assert vars(model.get_submodule(path)).keys() == vars(module).keys()
    assert_same_state(model.state_dict(), twin.state_dict())
    assert torch.equal(run(kind, model), run(kind, twin))


@pytest.mark.parametrize("kind", KINDS)
def test_removed_it_leaves_the_weights_of_now(kind):
    twin, model, graft = pair(kind)
    for index, (name, tensor) in enumerate(twins.untouched(kind, seed=1).state_dict().items()):
        graft.update({name: tensor}) if index % 2 else model.load_state_dict({name: tensor}, strict=False)
    twin.load_state_dict(twins.untouched(kind, seed=1).state_dict())
    graft.remove()
    assert_same_state(model.state_dict(), twin.state_dict())
    assert all(p.is_contiguous() for p in model.parameters())
    assert torch.equal(run(kind, model), run(kind, twin))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_come_along_in_both_directions(kind):
    twin, model = twins.untouched(kind), twins.untouched(kind)
    with torch.no_grad():
        model.load_state_dict(twin.state_dict())
    graft = None
    for step in range(3):
        if step == 1:
            graft = twins.graft(kind, model)
        elif graft is not None:
            graft.remove()
        for each in (twin, model):
            run(kind, each).pow(2).mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = {name: parameter.grad for name, parameter in twin.named_parameters()}
    torch.testing.assert_close(found, expected)
    assert [name for name, grad in found.items() if grad is None] == (["legacy.bias"] if kind == "zoo" else [])


@pytest.mark.parametrize("kind", KINDS)
def test_as_a_context_manager_also_after_an_exception(kind):
    model = twins.untouched(kind)
    before = identities(model)
    with twins.graft(kind, model) as graft:
        assert graft_of(model) is graft
    assert identities(model) == before
    with pytest.raises(ZeroDivisionError), twins.graft(kind, model):
        raise ZeroDivisionError
    assert identities(model) == before


def test_removed_twice_and_grafted_again():
    twin, model, graft = pair("zoo")
    graft.remove()
    graft.remove()
    with zoo.graft(model) as second:
        graft.remove()  # the first one is gone, and has no say over the second
        assert (graft_of(model), second.is_applied, graft.is_applied) == (second, True, False)
        assert_same_state(model.state_dict(), twin.state_dict())
        assert "removed" in repr(graft)
        assert "removed" not in repr(second)
    assert torch.equal(run("zoo", model), run("zoo", twin))


def test_a_second_graft_is_refused():
    twin, model, graft = pair("zoo")
    outer = nn.Sequential(model)
    for again in (model, outer, model.blocks):
        with pytest.raises(PlanError, match=r"grafted already.*remove"):
            kernelgraft.graft(again, {"Norm": zoo.FastNorm})
    assert graft.is_applied
    assert_same_state(model.state_dict(), twin.state_dict())


def test_what_was_replaced_behind_its_back_must_be_undone_first():
    twin, model, graft = pair("zoo")
    slot = model.mix
    model.mix = nn.Identity()
    with pytest.raises(GraftError, match="'mix' no longer holds what the graft put there but a Identity"):
        graft.remove()
    assert graft.is_applied
    model.mix = slot
    graft.remove()
    assert_same_state(model.state_dict(), twin.state_dict())


def test_training_flags_come_along():
    twin, model, graft = pair("zoo")
    for each in (twin, model):
        each.eval()
        each.mix.train()
        each.blocks[1].train()
    graft.remove()
    flags = [{path: module.training for path, module in each.named_modules()} for each in (model, twin)]
    assert flags[0] == flags[1]


def test_hooks_made_before_and_during_a_graft_stay():
    model = zoo.model()
    seen = []
    before = model.norm.register_forward_hook(lambda *_: seen.append("before"))
    graft = zoo.graft(model)
    during = model.norm.register_forward_pre_hook(lambda *_: seen.append("during"))
    full = model.norm.register_full_backward_hook(lambda *_: seen.append("backward"))
    for _ in range(2):
        seen.clear()
        run("zoo", model).sum().backward()
        assert seen == ["during", "before", "backward"]
        graft.remove()
    for handle in (before, during, full):
        handle.remove()
    seen.clear()
    run("zoo", model).sum().backward()
    assert seen == []
    assert not model.norm._forward_hooks


def test_hooks_run_once_also_where_the_original_does_the_work():
    twin, model = zoo.model().eval(), zoo.model().eval()
    for each in (twin, model):
        each.norm.register_forward_hook(lambda module, args, output: output + 1)
        each.mix.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    graft = zoo.graft(model)
    x, compiled = zoo.inputs(), torch.compile(model, backend="eager")
    with torch.no_grad():
        for each in (model, compiled):
            torch.testing.assert_close(each(x), twin(x))
            with graft.reference():
                torch.testing.assert_close(each(x), twin(x))
    graft.remove()
    assert torch.equal(model(x), twin(x))


def test_an_offloaded_graft_is_not_removed_by_halves():
    accelerate = pytest.importorskip("accelerate")
    twin, model, graft = pair("zoo")
    with graft.packed_names():
        accelerate.cpu_offload(model, torch.device("cpu"))
    modules = list(model.modules())
    with pytest.raises(GraftError, match=r"removed: blocks\.0\.norm\.scale, .*remove_hook_from_submodules"):
        graft.remove()
    assert graft.is_applied
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    accelerate.hooks.remove_hook_from_submodules(model)
    graft.remove()
    assert_same_state(model.state_dict(), twin.state_dict())


def test_a_packed_parameter_that_was_parametrized_must_be_freed_first():
    twin, model, graft = pair("zoo")
    nn.utils.parametrize.register_parametrization(model.mix.qkv, "weight", nn.Identity())
    modules = list(model.modules())
    with pytest.raises(GraftError, match=r"cannot be removed: mix\.qkv\.weight, which .* parametrized"):
        graft.remove()
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    nn.utils.parametrize.remove_parametrizations(model.mix.qkv, "weight")
    graft.remove()
    assert_same_state(model.state_dict(), twin.state_dict())


# --- kernels without a layout


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x * self.weight


def test_a_kernel_without_a_layout_leaves_names_and_parameters_as_they_are():
    twin, model = zoo.model(), zoo.model()
    before = identities(model)
    with kernelgraft.graft(model, {"Norm": Doubled}) as graft:
        x = zoo.inputs()
        assert torch.equal(model.norm(x), Doubled.forward(twin.norm, x))
        assert isinstance(model.norm, zoo.Norm)
        assert identities(model)[1] == before[1]
        assert set(graft.names) == {name for (name,) in graft.names.values()} == set(dict(twin.named_parameters()))
        new = zoo.model(1).state_dict()
        assert graft.update(new) == []
        assert_same_state(model.state_dict(), new)
        model.load_state_dict(twin.state_dict())
        with graft.reference():
            assert torch.equal(model.norm(x), twin.norm(x))
        assert graft.calls.sites["norm"] == (1, 1)
        copied = copy.deepcopy(model)
        graft_of(copied).remove()
        assert type(copied.norm) is zoo.Norm
    assert identities(model) == before
    assert_same_state(model.state_dict(), twin.state_dict())


# --- rules without an inverse


def lossy():
    twin, model = zoo.model(), zoo.model()
    graft = kernelgraft.graft(model, {"Legacy": zoo.NarrowedLegacy, "Norm": zoo.FastNorm})
    return twin, model, graft


def test_a_rule_without_inverse_is_in_the_plan_runs_and_fails_only_when_originals_are_asked_for():
    twin, model, graft = lossy()
    assert "a cast on the way narrows its values" in str(graft.plan)
    torch.testing.assert_close(model(zoo.inputs()), twin(zoo.inputs()), rtol=0.1, atol=0.1)
    model.train(), model.half(), model.float()
    asked = {
        "state_dict": model.state_dict,
        "load_state_dict": lambda: model.load_state_dict(twin.state_dict()),
        "update": lambda: graft.update(twin.state_dict()),
        "reading": lambda: model.legacy.weight,
    }
    for ask in asked.values():
        with pytest.raises(ConversionError, match=r"legacy\.weight.*a cast on the way narrows"):
            ask()
    with graft.reference(), pytest.raises(ConversionError, match=r"legacy\.weight"):
        model(zoo.inputs())
    with pytest.raises(GraftError, match=r"cannot be removed: legacy\.weight .*no inverse.*Load the model again"):
        graft.remove()
    assert graft.is_applied
    with graft.packed_names():
        assert model.state_dict()["legacy.matrix"].dtype == torch.float32


# --- compiled


def test_graft_of_a_compiled_model():
    _, model, graft = pair("zoo")
    compiled = torch.compile(model, backend="eager")
    assert graft_of(compiled) is graft
    assert graft_of(torch.compile(zoo.model(), backend="eager")) is None
    compiled.use_kernels = False
    assert graft_of(model) is None


# --- counts


def test_calls_tell_what_ran():
    _, model, graft = pair("zoo")
    hosts = {site.host for site in graft.plan.sites}
    assert graft.calls.kernel == graft.calls.reference == graft.calls.traced == 0
    for _ in range(2):
        run("zoo", model)
    with graft.reference():
        run("zoo", model)
    model.norm(torch.ones(1, zoo.H))
    calls = graft.calls
    assert calls.sites == {host: (2 + (host == "norm"), 1) for host in hosts}
    assert (calls.kernel, calls.reference, calls.traced) == (2 * len(hosts) + 1, len(hosts), 0)
    graft.remove()
    run("zoo", model)
    assert graft.calls.kernel == 0


def test_a_graft_logs_one_line(caplog):
    with caplog.at_level(logging.INFO, "kernelgraft"):
        graft = zoo.graft(zoo.model())
        graft.remove()
    assert [record.getMessage() for record in caplog.records] == [graft.plan.summary()]


def test_a_config_that_matches_nothing_changes_nothing():
    model = zoo.model()
    before = identities(model)
    with pytest.raises(PlanError, match="Norms"):
        kernelgraft.graft(model, KernelConfig({"Norms": zoo.FastNorm}))
    assert identities(model) == before
