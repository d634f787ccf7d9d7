"""Our kernels as a benchmark asks for them: those of the repository that are there."""

import copy
import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from benchmarks.kernels.measure import Skipped

ATTENTION = (("RMSNorm", "model.layers.*.input_layernorm"), ("Attention", "model.layers.*.self_attn"))
MLP = (("RMSNorm", "model.layers.*.post_attention_layernorm"), ("MLP", "model.layers.*.mlp"))
HEAD = ("Linear", "lm_head")


def is_there(name: str) -> bool:
    """Whether the repository has a kernel of this name."""
    return hasattr(importlib.import_module("kernelgraft.kernels.layers"), name)


def reference(name: str) -> str:
    """What a config calls a kernel.

    Raises:
        Skipped: The repository does not have it.
    """
    if not is_there(name):
        raise Skipped(f"kernelgraft.kernels has no {name} here")
    return f"kernelgraft.kernels:{name}"


def mapping(*, layers: bool = True, head: bool = False) -> dict[Any, str]:
    """A whole Qwen3 with the kernels that are there.

    Args:
        layers: Whole decoder layers rather than their two halves.
        head: The language-model head together with its loss.
    """
    found: dict[Any, str] = {}
    halves = [(ATTENTION, "RMSNormAttention"), (MLP, "RMSNormMLP")]
    whole = layers and is_there("DecoderLayer")
    for key, name in [("DecoderLayer", "DecoderLayer")] if whole else halves:
        if is_there(name):
            found[key] = reference(name)
    if is_there("RMSNorm"):
        found["RMSNorm"] = reference("RMSNorm")
    if head and is_there("LinearCrossEntropy"):
        found[HEAD] = reference("LinearCrossEntropy")
    if not found:
        raise Skipped("kernelgraft.kernels has none of these kernels here")
    return found


def names(of: Mapping[Any, str]) -> list[str]:
    """The kernels of a mapping, as a row says them."""
    return [value.rpartition(":")[2] for value in of.values()]


def grafted(model: nn.Module, of: Mapping[Any, str]) -> tuple[nn.Module, Any]:
    """A copy of a model with kernels in it, and its graft."""
    import kernelgraft

    new = copy.deepcopy(model)
    return new, kernelgraft.graft(new, of)
