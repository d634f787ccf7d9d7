"""What a module computes, found by trying: a norm, a gated MLP, or an MLP of two layers.

A class's name says little, and its code can be read by nobody but people. So a small copy of the module runs on random
numbers beside each formula that it could be.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from kernelgraft.authoring import formulas
from kernelgraft.tree import shallow_tree

_H, _I = 12, 20  # the sizes of the small copy


@dataclass(frozen=True)
class Norm:
    """A norm over the last dim.

    Attributes:
        formula: The function of `formulas` that computes it.
        weight: Name of its weight, (H).
        bias: Name of its bias, or "".
        eps: Name of the attribute that holds its epsilon.
        eps_value: The epsilon.
        has_init: Whether its class is built with `(size, eps=...)`, so that its layout can be too.
        input: What its forward calls its input.
    """

    formula: Callable[..., torch.Tensor] = formulas.rms_norm
    weight: str = "weight"
    bias: str = ""
    eps: str = "eps"
    eps_value: float = 1e-6
    has_init: bool = True
    input: str = "hidden_states"


@dataclass(frozen=True)
class GatedMLP:
    """y = down(act(gate(x)) * up(x)).

    Attributes:
        gate: Name of the layer that is put through the activation; of both, if one layer holds both.
        up: Name of the other one; "" if `gate` holds both.
        down: Name of the last layer.
        act: Name of the activation.
        gate_first: In one layer that holds both: whether the gate comes first.
        is_silu: Whether the activation is SiLU.
        input: What its forward calls its input.
    """

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    act: str = "act_fn"
    gate_first: bool = True
    is_silu: bool = True
    input: str = "hidden_states"


@dataclass(frozen=True)
class TwoLayerMLP:
    """y = second(act(first(x))); names as in `GatedMLP`."""

    first: str
    second: str
    act: str
    input: str = "hidden_states"


Member = Norm | GatedMLP | TwoLayerMLP
KINDS = "a norm, a gated MLP or an MLP of two layers"


def recognize(module: nn.Module) -> Member | None:
    """What a module computes, `None` if it is nothing that is known here.

    Args:
        module: Any module, on any device; its own weights are not read.
    """
    names = _forward_arguments(module)
    if names is None:
        return None
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        torch.manual_seed(0)
        return _norm(module, names) or _mlp(module, names)


def _forward_arguments(module: nn.Module) -> str | None:
    """The name of the one argument that a forward needs."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    needed = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return needed[0].name if len(needed) == len(parameters) == 1 else None


def _norm(module: nn.Module, argument: str) -> Norm | None:
    tensors = dict(module.named_parameters())
    if not 1 <= len(tensors) <= 2 or any(each.ndim != 1 for each in tensors.values()) or list(module.buffers()):
        return None
    weight = next((name for name in tensors if "bias" not in name), "")
    bias = next((name for name in tensors if name != weight), "")
    if not weight or "." in weight or "." in bias:
        return None
    small = shallow_tree(module)
    for name in tensors:
        small._parameters[name] = nn.Parameter(torch.empty(_H).uniform_(0.5, 1.5))
    if hasattr(small, "normalized_shape"):
        vars(small)["normalized_shape"] = (_H,)
    x = torch.randn(64, _H) / 10
    given: list[torch.Tensor] = [small.get_parameter(name) for name in (weight, bias) if name]
    for eps in [name for name, value in vars(module).items() if "eps" in name and isinstance(value, float)]:
        vars(small)[eps] = 0.01  # large enough to show which of them is added
        for formula in formulas.NORMS_WITH_BIAS if bias else formulas.NORMS:
            if _same(small, x, partial(_with_weights, formula, given)):
                value = vars(module)[eps]
                return Norm(formula, weight, bias, eps, value, _takes_size_and_eps(type(module)), argument)
        vars(small)[eps] = vars(module)[eps]
    return None


def _with_weights(formula: Callable[..., torch.Tensor], given: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return formula(x, *(each.to(x.dtype) for each in given), 0.01)


def _takes_size_and_eps(cls: type) -> bool:
    names = list(inspect.signature(cls).parameters)
    return len(names) >= 2 and names[1] == "eps" and "config" not in names[0]


def _mlp(module: nn.Module, argument: str) -> Member | None:
    layers = [name for name, child in module.named_children() if isinstance(child, nn.Linear)]
    others = [name for name, child in module.named_children() if not isinstance(child, nn.Linear)]
    held = {f"{layer}.{name}" for layer in layers for name, _ in module.get_submodule(layer).named_parameters()}
    if set(dict(module.named_parameters())) != held or len(layers) not in (2, 3):
        return None
    x = torch.randn(64, _H)
    for act in others:
        for found in _mlps(module, layers, act, argument):
            small = _small(module, found)
            if small is not None and _same(small, x, _computation(found, small)):
                return found
    return None


def _mlps(module: nn.Module, layers: Sequence[str], act: str, argument: str) -> Iterator[GatedMLP | TwoLayerMLP]:
    silu = _is_silu(module.get_submodule(act))
    for first, second, *third in itertools.permutations(layers):
        if third:
            yield GatedMLP(first, second, third[0], act, True, silu, argument)
        else:
            yield TwoLayerMLP(first, second, act, argument)
            yield GatedMLP(first, "", second, act, True, silu, argument)
            yield GatedMLP(first, "", second, act, False, silu, argument)


def _small(module: nn.Module, found: GatedMLP | TwoLayerMLP) -> Any:
    """A small copy whose layers have the shapes that `found` asks for; `None` if the module's own have others."""
    if isinstance(found, TwoLayerMLP):
        sizes = {found.first: (_H, _I), found.second: (_I, _H)}
    elif found.up:
        sizes = {found.gate: (_H, _I), found.up: (_H, _I), found.down: (_I, _H)}
    else:
        sizes = {found.gate: (_H, 2 * _I), found.down: (_I, _H)}
    small: Any = shallow_tree(module)
    own: dict[int, int] = {}
    for name, (into, out) in sizes.items():
        layer: Any = getattr(module, name)
        if own.setdefault(into, layer.in_features) != layer.in_features:
            return None
        if own.setdefault(out, layer.out_features) != layer.out_features:
            return None
        small._modules[name] = nn.Linear(into, out, bias=layer.bias is not None)
    for child in small.modules():
        child.training = False
    return small


def _computation(found: GatedMLP | TwoLayerMLP, small: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    act = getattr(small, found.act)
    if isinstance(found, TwoLayerMLP):
        return lambda x: getattr(small, found.second)(act(getattr(small, found.first)(x)))

    def gated(x: torch.Tensor) -> torch.Tensor:
        if found.up:
            gate, up = getattr(small, found.gate)(x), getattr(small, found.up)(x)
        else:
            gate, up = getattr(small, found.gate)(x).chunk(2, dim=-1)
            gate, up = (gate, up) if found.gate_first else (up, gate)
        result: torch.Tensor = getattr(small, found.down)(act(gate) * up)
        return result

    return gated


def _is_silu(act: nn.Module) -> bool:
    x = torch.linspace(-6, 6, 50)
    try:
        return torch.allclose(act(x), F.silu(x), atol=1e-6)
    except Exception:  # whatever is called as an activation here may be anything
        return False


def _same(small: nn.Module, x: torch.Tensor, formula: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether a formula gives what a module gives: close in float32, and in bfloat16 to the bit or nearly so."""
    for dtype, most_different in ((torch.float32, 0.0), (torch.bfloat16, 0.02)):
        module = small if dtype == torch.float32 else small.to(dtype)
        try:
            theirs, ours = module(x.to(dtype)), formula(x.to(dtype))
        except Exception:  # a module that cannot run so is not what it was taken for
            return False
        if not isinstance(theirs, torch.Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            return False
        if dtype == torch.float32 and not torch.allclose(theirs, ours, rtol=1e-4, atol=1e-5):
            return False
        if dtype == torch.bfloat16 and (theirs != ours).float().mean().item() > most_different:
            return False
    small.to(torch.float32)
    return True
