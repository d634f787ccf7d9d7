"""A verification leaves the model, the process and what the user holds as they were."""

import gc
import random

import plants
import pytest
import subject
import torch
from torch import nn

import toys
from twins import storages


def held(model):
    """What a model is made of, hooks and modes included."""
    hooks = {
        path: {name: list(value.items()) for name, value in vars(module).items() if "_hooks" in name and value}
        for path, module in model.named_modules()
    }
    return toys.state(model), hooks


def grafted(name=None):
    kernels = dict(subject.RIGHT[2])
    if name:
        target, kernel = plants.FAULTS[name]
        kernels[target] = kernel
    return subject.grafted(kernels)


@pytest.mark.parametrize("name", [None, "changes_its_input", "changes_its_weight", "raises_without_tokens"])
def test_the_model_is_as_it_was(name):
    graft = grafted(name)
    model = graft.model
    model.blocks[0].train()
    model.square.weight.requires_grad_(False)
    model.norm.weight.grad = torch.ones_like(model.norm.weight)
    fired = []
    handle = model.norm.register_forward_hook(lambda *_: fired.append(1))
    before, calls, grad = held(model), graft.calls, model.norm.weight.grad
    assert graft.verify(subject.inputs()).passed == (name is None)
    assert held(model) == before
    assert graft.calls == calls
    assert model.norm.weight.grad is grad
    assert torch.equal(grad, torch.ones_like(grad))
    assert model.norm.training is False
    assert model.blocks[0].norm.training is True
    handle.remove()


def test_random_states_and_switches_are_as_they_were():
    graft = grafted()
    torch.manual_seed(1)
    random.seed(1)
    expected = torch.rand(3), random.random()
    torch.manual_seed(1)
    random.seed(1)
    graft.verify(subject.inputs(), seed=7)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    assert torch.is_grad_enabled()
    assert torch.get_deterministic_debug_mode() == 0
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_inside_no_grad_and_inference_mode(around):
    graft = grafted()
    with around():
        report = graft.verify(subject.inputs())
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (around is torch.inference_mode)
    assert report.passed
    assert report.kinds[0].gradients == "checked"


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        graft = grafted()
        assert graft.verify(subject.inputs()).passed
    assert graft.verify(subject.inputs()).passed


def test_inside_autocast():
    kernels = {"Activation": subject.RIGHT[1]["Activation"], "Add": subject.RIGHT[2]["Add"]}
    graft = subject.grafted(kernels)
    with torch.autocast("cpu", torch.bfloat16):
        report = graft.verify(subject.inputs())
    report.raise_for_failures()
    assert next(check.input for check in report.checks if check.kind == 1) == "x bfloat16[3, 7, 48]"


def test_a_kernel_that_drops_a_dtype_under_autocast():
    """A norm whose weight is in float32 makes float32 of what comes in bfloat16."""
    graft = grafted()
    with torch.autocast("cpu", torch.bfloat16):
        report = graft.verify(subject.inputs())
    assert "output is bfloat16[3, 7, 48] on cpu, and the original's float32[3, 7, 48] on cpu" in str(report)


def test_the_same_seed_finds_the_same():
    first, second = (grafted("wrong_epsilon").verify(subject.inputs(), seed=3) for _ in range(2))
    assert (first.checks, first.kinds) == (second.checks, second.kinds)


def test_a_training_step_goes_on_across_a_verification():
    graft, twin = grafted(), grafted()
    losses = []
    for each, verifies in ((graft, True), (twin, False)):
        optimizer = torch.optim.SGD(each.model.parameters(), lr=0.1)
        for _ in range(2):
            loss = each.model(subject.inputs()).square().mean()
            loss.backward()
            if verifies:
                each.verify(subject.inputs(), every_site=False)
            optimizer.step()
        losses.append(loss)
    assert torch.equal(*losses)


def test_memory_does_not_grow_with_the_number_of_sites(monkeypatch):
    """Activations that do not fit are taken from forwards of their own."""
    from kernelgraft.verify import _verification

    graft = subject.grafted({"Norm": subject.RIGHT[0]["Norm"]})
    expected = graft.verify(subject.inputs(), whole_model=False)
    monkeypatch.setattr(_verification, "ROOM", 0)
    forwards = []
    nn.Module.register_forward_hook(graft.model, lambda *_: forwards.append(1))
    found = graft.verify(subject.inputs(), whole_model=False)
    assert (found.checks, found.kinds) == (expected.checks, expected.kinds)
    assert len(forwards) == 3


def test_what_was_tried_is_freed_at_once():
    """Not when the collector comes: the copies of one layer of a large model are gigabytes."""
    graft = grafted()
    graft.verify(subject.inputs())
    gc.collect()
    before = storages()
    gc.disable()
    try:
        graft.verify(subject.inputs())
        after = storages()
    finally:
        gc.enable()
    assert after - before == set()
