"""Optimizers on a grafted model, made before the graft, during it, and used after it."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import twins
from twins import KINDS, pair, run

# With a smaller epsilon a gradient that is nothing but rounding would make as large a step as any.
SETTINGS = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}


def steps(kind, model, optimizer, count):
    for _ in range(count):
        optimizer.zero_grad()
        run(kind, model).pow(2).mean().backward()
        optimizer.step()


def decayed(name):
    """As trainers tell apart what is decayed and what is not."""
    return not name.endswith("bias") and "norm" not in name and not name.startswith("stats.")


def groups(parameters):
    """Two groups, by original names."""
    return [
        {"params": [p for name, p in parameters if decayed(name)], "weight_decay": SETTINGS["weight_decay"]},
        {"params": [p for name, p in parameters if not decayed(name)], "weight_decay": 0.0},
    ]


def packed(model, graft):
    """Each packed parameter once, with an original's name."""
    named = dict(model.named_parameters())
    found = {}
    for name, _ in graft.names.items():
        for each in graft.names[name]:
            found.setdefault(each, (name, named[each]))
    assert found.keys() == named.keys()
    return list(found.values())


def assert_close_states(model, twin):
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_made_after_the_graft_with_groups_by_name(kind):
    twin, model, graft = pair(kind)
    before = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    optimizers = [AdamW(groups(each), **SETTINGS) for each in (packed(model, graft), list(twin.named_parameters()))]
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        steps(kind, each, optimizer, 3)
    assert_close_states(model, twin)
    moved = [name for name, tensor in twin.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(moved) >= len(before) - (kind == "zoo")
    graft.remove()
    assert_close_states(model, twin)


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_the_parameters(kind):
    twin, model, graft = pair(kind)
    originals = dict(twin.named_parameters(remove_duplicate=False))
    named = dict(model.named_parameters())
    assert set(graft.names) == set(originals)
    assert {each for packed in graft.names.values() for each in packed} == set(named)
    dropped = [name for name, packed in graft.names.items() if not packed]
    assert dropped == (["legacy.bias"] if kind == "zoo" else [])
    for name, packed in graft.names.items():
        assert sum(named[each].numel() for each in packed) >= originals[name].numel() or not packed
    if kind == "zoo":
        assert graft.names["wide.both.weight"] == ("wide.left.weight", "wide.right.weight")
        assert graft.names["mix.v.bias"] == ("mix.qkv.bias",)
        assert graft.names["blocks.1.gate.w2.weight"] == ("blocks.1.norm.w12",)
        assert graft.names["embed.weight"] == ("embed.weight",)
    if kind.endswith("tied"):
        assert graft.names["lm_head.weight"] == ("model.embed_tokens.weight",)


@pytest.mark.parametrize("kind", KINDS)
def test_made_before_the_graft_it_trains_what_is_packed_whole_and_goes_on_after_it(kind):
    twin, model = twins.untouched(kind), twins.untouched(kind)
    optimizers = [SGD(each.parameters(), lr=0.01, momentum=0.9) for each in (model, twin)]
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        steps(kind, each, optimizer, 2)
    graft = twins.graft(kind, model)
    slots = graft._slots().items()
    merged = {f"{path}.{n}" for path, slot in slots for n, part in slot.parts.items() if part.kind != "whole"}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps(kind, model, optimizers[0], 1)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    parameters = {name for name, _ in twin.named_parameters(remove_duplicate=False)}
    assert moved & parameters == parameters - merged - {"legacy.bias"}
    graft.remove()
    # The same weights and momenta again: from here on both optimizers do the same.
    twin.load_state_dict(model.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        steps(kind, each, optimizer, 2)
    assert_close_states(model, twin)
    assert all(a is b for a, b in zip(model.parameters(), optimizers[0].param_groups[0]["params"], strict=True))


def test_made_during_the_graft_it_goes_on_after_it_for_what_is_packed_whole():
    _, model, graft = pair("zoo")
    optimizer = SGD(model.parameters(), lr=0.01)
    steps("zoo", model, optimizer, 1)
    graft.remove()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer.zero_grad(), model.zero_grad()
    steps("zoo", model, optimizer, 1)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"embed.weight", "norm.weight", "mix.o.weight"} <= moved
    assert "mix.q.weight" not in moved


def test_clipping_and_norms_see_the_same_gradients():
    twin, model, _ = pair("zoo")
    norms = []
    for each in (model, twin):
        run("zoo", each).pow(2).mean().backward()
        norms.append(nn.utils.clip_grad_norm_(each.parameters(), 0.1))
    torch.testing.assert_close(*norms)


def test_optimizer_state_goes_into_another_graft_of_the_same_kind():
    _, model, _ = pair("zoo")
    optimizer = AdamW(model.parameters(), **SETTINGS)
    steps("zoo", model, optimizer, 2)
    _, other, _ = pair("zoo", seed=1)
    resumed = AdamW(other.parameters(), **SETTINGS)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (other, resumed)):
        steps("zoo", each, its, 2)
    twins.assert_same_state(other.state_dict(), model.state_dict())


def test_optimizer_state_of_an_untouched_model_does_not_fit_and_says_so():
    twin, model, _ = pair("zoo")
    theirs = AdamW(twin.parameters(), **SETTINGS)
    steps("zoo", twin, theirs, 1)
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        AdamW(model.parameters(), **SETTINGS).load_state_dict(theirs.state_dict())
