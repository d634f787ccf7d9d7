"""Modules built on the meta device, where tensors have a shape and no values."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import init
from torch.overrides import TorchFunctionMode


class WithoutDrawing(TorchFunctionMode):
    """Inside the block, torch's layers do not draw first values for tensors on the meta device.

    There is nothing to write them into, and they cost most of what building a linear layer costs. Torch's init
    functions hand over to modes, so nothing is patched; what they would refuse or warn about goes its way as ever.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Gives the tensor back undrawn, or goes on."""
        kwargs = kwargs or {}
        draws = _DRAWS.get(func)
        if draws is not None and type(kwargs.get("tensor")) in (nn.Parameter, torch.Tensor):
            tensor: torch.Tensor = kwargs["tensor"]
            # Else each look at the tensor would go through the modes around this one.
            with torch._C.DisableTorchFunction():
                if tensor.is_meta and draws(**kwargs):
                    return tensor
        return func(*args, **kwargs)


def _uniform(*, a: object, b: object, **_: object) -> bool:
    return _is_number(a) and _is_number(b)


def _normal(*, tensor: torch.Tensor, mean: object, std: Any, **_: object) -> bool:
    return tensor.is_floating_point() and _is_number(mean) and _is_number(std) and std >= 0


def _kaiming_uniform(*, tensor: torch.Tensor, a: object, mode: str, nonlinearity: str, **_: object) -> bool:
    is_plain = mode in ("fan_in", "fan_out") and nonlinearity == "leaky_relu" and _is_number(a)
    return is_plain and tensor.dim() > 1 and tensor.numel() > 0


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


# What linear layers, convolutions and embeddings draw, and whether a call of it is one that torch would not refuse.
_DRAWS: dict[Any, Callable[..., bool]] = {
    init.uniform_: _uniform,
    init.normal_: _normal,
    init.kaiming_uniform_: _kaiming_uniform,
}
