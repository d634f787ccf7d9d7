"""Operators as compilers see them: what they give, said without computing it."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from . import device

# Before torch 2.13 the inductor writes out all that an operator's arguments were computed from when it meets the
# operator first, for a line of its log. Each residual doubles that: an operator behind eight layers takes minutes, the
# norm behind 28 has no end. One that the inductor knows is not written out.
_WRITES_OUT = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)


def fake(op: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: `op.register_fake` for a function that gives empty outputs, and the operator known to compilers.

    Args:
        op: Of `torch.library.custom_op`.
    """

    def registered(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def outputs(*args: Any) -> Any:
            if _WRITES_OUT:
                _make_known(op._opoverload)
            # While kernels are prepared, an operator runs on tensors without data, and loads what it would launch.
            return op._init_fn(*args) if device.is_preparing() else function(*args)

        op.register_fake(outputs)
        return function

    return registered


def _make_known(overload: Any) -> None:
    """As the inductor itself does for an operator that it meets; where it is not there yet, it asks again later."""
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is None or overload in lowering.lowerings:
        return
    from torch._library.utils import get_layout_constraint_tag

    constraint = lowering.tag_to_layout_constraint(get_layout_constraint_tag(overload))
    lowering.make_fallback(overload, layout_constraint=constraint, warn=False)
