"""Inputs that are made from a real call: odd shapes, odd strides, large and small numbers, neighbours by a rounding."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from kernelgraft.verify._calls import SiteCall
from kernelgraft.verify._values import copied

ODD_SHAPES = {
    "one token": (1, 1),
    "one token in a batch": (3, 1),
    "37 tokens": (1, 37),
    "128 tokens": (1, 128),
    "a batch of 131 tokens": (2, 131),
    "no tokens": (1, 0),
}
"""Batch and tokens. 128 is a usual tile, 131 goes past one and is a multiple of nothing, as 37 is below it."""

ALL_SIZES_SHAPE = "a batch of 131 tokens"

SMALL = {"small numbers": 1e-3, "tiny numbers": 1e-6}
"""Root mean squares at which an epsilon decides: those in use reach from 1e-12, added to the square, to 1e-5."""

LARGE = 2.0**12
"""The root mean square of large numbers: their squares do not fit into float16."""

SIZES = 2.0**14
"""How many times larger and smaller than 1 numbers become where all sizes are tried, row by row."""

LARGE_WHERE_MIXED = 4.0
"""How many times as large numbers become where tokens attend to each other: larger ones saturate a softmax, whose
choice between two that are nearly equal is then noise."""


@dataclass(frozen=True)
class Case:
    """An input, and what it is called."""

    name: str
    call: SiteCall


def leading_dims(call: SiteCall) -> tuple[int, ...] | None:
    """The dims of rows, if all that the call takes is tensors of the same rows; else `None`."""
    inputs = call.inputs()
    leading = {tuple(tensor.shape[:-1]) for tensor in inputs.values()}
    floating = all(tensor.is_floating_point() for tensor in inputs.values())
    objects = any(hasattr(value, "__dict__") and not callable(value) for value in _others(call))
    if len(leading) != 1 or not floating or objects:
        return None
    return leading.pop() or None


def _others(call: SiteCall) -> Iterator[object]:
    for value in call.objects().values():
        if not isinstance(value, torch.Tensor):
            yield value


def odd_shapes(call: SiteCall, generator: torch.Generator) -> Iterator[Case]:
    """The rows of a call in other numbers, drawn from its own."""
    leading = leading_dims(call)
    if leading is None or 0 in leading:
        return
    count = min(len(leading), 2)
    shapes = ODD_SHAPES if count == 2 else {name: (batch * tokens,) for name, (batch, tokens) in ODD_SHAPES.items()}
    for name, shape in shapes.items():
        chosen = torch.randint(math.prod(leading[:count]), (math.prod(shape),), generator=generator)

        def drawn(
            _: str, tensor: torch.Tensor, shape: tuple[int, ...] = shape, chosen: torch.Tensor = chosen
        ) -> object:
            rows = tensor.flatten(0, count - 1)[chosen.to(tensor.device)]
            return rows.reshape(*shape, *tensor.shape[count:])

        yield Case(name, call.rebuilt(drawn))


def odd_strides(call: SiteCall) -> Iterator[Case]:
    """The same numbers in memory that is not contiguous."""
    data = {name for name, tensor in call.inputs().items() if tensor.is_floating_point() and tensor.ndim}
    for name, lay in (("every other element", _every_other), ("not contiguous", _not_contiguous)):

        def laid(each: str, tensor: torch.Tensor, lay: Callable[[torch.Tensor], torch.Tensor] = lay) -> object:
            return lay(tensor) if each in data else copied(tensor)

        yield Case(name, call.rebuilt(laid))


def _every_other(tensor: torch.Tensor) -> torch.Tensor:
    wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
    wide[..., ::2] = tensor
    return wide[..., ::2]


def _not_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """Rows that do not lie side by side, do not start where memory is aligned, and are in the order of the tokens."""
    swapped = tensor.transpose(0, 1) if tensor.ndim > 2 else tensor
    wide = tensor.new_zeros(*swapped.shape[:-1], tensor.shape[-1] + 3)
    inner = wide[..., 1:-2].copy_(swapped)
    return inner.transpose(0, 1) if tensor.ndim > 2 else inner


def odd_upstream(gradient: torch.Tensor) -> torch.Tensor:
    """An upstream gradient in memory that is not contiguous."""
    return _not_contiguous(gradient) if gradient.ndim else gradient


def scaled(call: SiteCall, factor: float | None, size: float, *, only: frozenset[str] | None = None) -> SiteCall:
    """The call with its data times a factor, or, without one, brought to a root mean square."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or (only is not None and name not in only):
            return copied(tensor)
        now = tensor.double().square().mean().sqrt().clamp_min(1e-30)
        return (tensor.double() * (factor if factor is not None else size / now)).to(tensor.dtype)

    return call.rebuilt(change)


def of_all_sizes(call: SiteCall, factor: float, generator: torch.Generator) -> SiteCall:
    """131 rows of a call, or as many as are drawn for its dims, each brought to another root mean square.

    What is right for usual numbers, and cut off, approximated or flushed beyond, shows in one row or another.
    """
    case = next(case for case in odd_shapes(call, generator) if case.name == ALL_SIZES_SHAPE)

    def change(_: str, tensor: torch.Tensor) -> torch.Tensor:
        wanted = torch.rand((*tensor.shape[:-1], 1), generator=generator).to(tensor.device)
        now = tensor.double().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
        return (tensor.double() / now * factor ** (2 * wanted - 1)).to(tensor.dtype)

    return case.call.rebuilt(change)


def neighbour(call: SiteCall, names: frozenset[str], generator: torch.Generator) -> SiteCall:
    """The call with its data moved by at most one rounding."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in names or not tensor.is_floating_point():
            return copied(tensor)
        steps = torch.randint(-1, 2, tensor.shape, generator=generator).to(tensor.device)
        new = copied(tensor)
        return new.copy_(tensor.double() * (1 + steps * torch.finfo(tensor.dtype).eps))

    return call.rebuilt(change)


def reversed_rows(call: SiteCall, names: frozenset[str]) -> SiteCall:
    """Another input of the same shape: the data's first dim backwards, with the other sign."""
    return call.rebuilt(lambda name, t: -t.flip(0) if name in names else copied(t))


def first_of_batch(call: SiteCall) -> SiteCall | None:
    """The first of a batch alone, if every tensor has the batch first, or 1 in its place."""
    inputs = call.inputs()
    sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in inputs.values()}
    batch = max(sizes, default=0)
    if batch < 2 or sizes - {1, batch}:
        return None
    return call.rebuilt(lambda _, tensor: copied(tensor[:1]))
