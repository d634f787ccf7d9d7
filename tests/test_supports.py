"""Kernels that say what they can take: asked while a graft is planned, and at every call."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kernelgraft
import tiny
from kernelgraft import Kernel, KernelConfig
from kernelgraft.errors import GraftError, PlanError
from kernelgraft.forwards import _ask
from kernelgraft.slot import Site

pytestmark = pytest.mark.transformers


def norm(self, hidden_states):
    return F.rms_norm(hidden_states, hidden_states.shape[-1:], self.weight, self.variance_epsilon)


class WideOnly(nn.Module):
    """Takes hidden sizes that are multiples of 16: not the heads' norms of dim 8."""

    forward = norm

    @staticmethod
    def supports(hidden_states):
        return hidden_states.shape[-1] % 16 == 0 or f"the hidden size {hidden_states.shape[-1]} is no multiple of 16"


class ShortOnly(nn.Module):
    forward = norm

    @staticmethod
    def supports(hidden_states):
        return hidden_states.shape[1] <= 5 or f"{hidden_states.shape[1]} tokens are more than 5"


class Never(nn.Module):
    forward = norm

    @staticmethod
    def supports(*_):
        return False


class Plain(nn.Module):
    forward = norm


class PlainLayout(nn.Module):
    """Where `supports` leaves the kernel's class to the `kernels` library, which takes no other member there."""

    supports = staticmethod(WideOnly.supports)

    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps


def test_it_may_stand_in_the_layout():
    with pytest.raises(PlanError, match=r"Plain refuses a call like .*size 8 is no multiple of 16"):
        kernelgraft.graft(tiny.model("qwen3"), KernelConfig({"RMSNorm": Plain}))


def test_what_a_kernel_refuses_is_refused_while_planning_with_its_reason():
    model = tiny.model("qwen3")
    with pytest.raises(
        PlanError, match=r"q_norm.*WideOnly refuses a call like \(float32\[1, 4, 4, 8\]\).*size 8 is no"
    ):
        kernelgraft.graft(model, KernelConfig({"RMSNorm": WideOnly}))
    assert kernelgraft.graft_of(model) is None
    with pytest.raises(PlanError, match="no reason given"):
        kernelgraft.plan(model, KernelConfig({"RMSNorm": Never}))


def test_with_a_fallback_the_reason_is_in_the_plan_and_the_original_runs():
    model = tiny.model("qwen3")
    expected = tiny.logits(model)
    graft = kernelgraft.graft(model, KernelConfig({"RMSNorm": WideOnly}, fallback="reference"))
    assert "size 8 is no multiple of 16; the original runs then" in str(graft.plan)
    torch.testing.assert_close(tiny.logits(model), expected)
    sites = graft.calls.sites
    assert sites["model.layers.0.self_attn.q_norm"] == (0, 1)
    assert sites["model.norm"] == (1, 0)


def test_a_call_that_planning_could_not_know_is_refused_when_it_comes():
    model = tiny.model("qwen3")
    fused = KernelConfig({"RMSNorm": ShortOnly})
    graft = kernelgraft.graft(model, fused)
    assert tiny.logits(model, length=5).shape[1] == 5
    with pytest.raises(GraftError, match="7 tokens are more than 5"):
        tiny.logits(model, length=7)
    graft.remove()
    kernelgraft.graft(model, KernelConfig({"RMSNorm": ShortOnly}, fallback="reference"))
    expected = tiny.logits(tiny.model("qwen3"), length=7)
    assert torch.equal(tiny.logits(model, length=7), expected)


def test_asking_changes_nothing_in_the_model():
    model = tiny.model("qwen3")
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    state = torch.get_rng_state()
    kernelgraft.plan(model, KernelConfig({"RMSNorm": Kernel(ShortOnly)}))
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)


def test_it_is_asked_again_when_a_call_looks_different():
    site, calls = Site("", frozenset(), frozenset(), "error"), []
    x, y = torch.ones(2, 3), torch.ones(2, 3)
    cache = OrderedDict(keys=torch.ones(2))
    for args, kwargs, again in [
        ((x,), {}, True),
        ((y,), {}, False),  # other numbers alone are no other look
        ((x.T,), {}, True),
        ((x.half(),), {}, True),
        ((nn.Parameter(x),), {}, True),
        ((x, True), {}, True),
        ((x, 1), {}, True),
        ((x, 1.0), {}, True),
        ((x, None), {}, True),
        ((x,), {"mask": None}, True),
        ((x,), {"other": None}, True),
        ((x, (x, y)), {}, True),
        ((x, (y, x)), {}, False),
        ((x, [x, y]), {}, True),
        ((x, ((x,), y)), {}, True),
        ((x, x, y), {}, True),
        ((x, cache), {}, True),
        ((x, OrderedDict(keys=torch.ones(3))), {}, True),
        ((x, object()), {}, True),
        ((x, object()), {}, False),
    ]:
        calls.clear()
        assert _ask(lambda *_, **__: calls.append(1) or True, site, args, kwargs) is True
        assert bool(calls) is again, (args, kwargs)
