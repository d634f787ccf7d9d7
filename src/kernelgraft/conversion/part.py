"""How one tensor reads from others that hold its elements: as a chain of ordinary view operations wherever possible.

Ordinary operations (`narrow`, `select`, `transpose`, ...) and not `as_strided`, so that autograd, `torch.compile`,
`vmap` and `functional_call` work through them, on tensors of any strides.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kernelgraft.conversion.moves import Move, Placed, Shape, TooManyPiecesError, place
from kernelgraft.errors import ConversionError

Step = tuple[Any, ...]  # (name of a method of Tensor, *arguments), or ("slice", dim, start, stop, step)
Kind = Literal["whole", "view", "assembled", "lost"]
# A part that is copied anyway is read in more pieces rather than through `as_strided`, up to this many.
MAX_ORDINARY_READINGS = 64

Get = Callable[[str], torch.Tensor]


def apply(steps: Sequence[Step], tensor: torch.Tensor) -> torch.Tensor:
    """Runs a chain of view operations."""
    for name, *arguments in steps:
        if name == "slice":
            dim, start, stop, step = arguments
            tensor = tensor[(slice(None),) * dim + (slice(start, stop, step),)]
        elif name == "as_strided":
            sizes, strides, offset = arguments
            tensor = tensor.as_strided(sizes, strides, tensor.storage_offset() + offset)
        else:
            tensor = getattr(tensor, name)(*arguments)
    return tensor


def fit_for(steps: Sequence[Step], tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous if the steps are about its memory."""
    return tensor.contiguous() if any(name in ("view", "as_strided") for name, *_ in steps) else tensor


def describe(steps: Sequence[Step]) -> str:
    """A chain as one would write it after the tensor's name."""
    return "".join(_describe_step(*step) for step in steps)


def _describe_step(name: str, *arguments: Any) -> str:
    every = ":, "
    if name == "narrow":
        dim, start, length = arguments
        return f"[{every * dim}{start}:{start + length}]"
    if name == "select":
        return f"[{every * arguments[0]}{arguments[1]}]"
    if name == "slice":
        dim, start, stop, step = arguments
        return f"[{every * dim}{start}:{stop}:{step}]"
    return f".{name}({', '.join(map(str, arguments))})"


@dataclass(frozen=True, slots=True)
class Reading:
    """One strided piece of a tensor, as a chain of operations on the tensor that holds it.

    Attributes:
        packed: The tensor that holds the piece.
        steps: From the packed tensor to the piece; views only.
        finish: From there to its shape in the whole; a copy if the strides demand one.
        place: From a tensor of the whole's shape to a view of this piece's elements, in the shape that `steps` gives.
    """

    packed: str
    steps: tuple[Step, ...]
    finish: tuple[Step, ...]
    place: tuple[Step, ...]

    def read(self, get: Get) -> torch.Tensor:
        """The piece, in its shape in the whole."""
        return apply(self.finish, apply(self.steps, get(self.packed)))

    def numel(self, get: Get) -> int:
        """How many elements it has."""
        return apply(self.steps, get(self.packed)).numel()

    def describe(self) -> str:
        """The piece as one would write it."""
        return self.packed + describe(self.steps + self.finish)


@dataclass(frozen=True, slots=True)
class Part:
    """How an original parameter reads from the packed ones, and is written into them.

    Attributes:
        name: The original's name.
        shape: Its shape.
        kind: "whole": it is one packed tensor, as it stands. "view": one strided view of one. "assembled": several
            pieces, or one that needs a copy to take its shape. "lost": it cannot be had; `why` says why.
        readings: The pieces.
        dim: The dim along which the pieces are concatenated, None if that is not how they lie.
        why: Why the part is lost.
    """

    name: str
    shape: Shape
    kind: Kind
    readings: tuple[Reading, ...] = ()
    dim: int | None = None
    why: str = ""

    @property
    def packed(self) -> tuple[str, ...]:
        """Names of the packed tensors that hold it, each once."""
        return tuple(dict.fromkeys(reading.packed for reading in self.readings))

    def renamed(self, name: str) -> "Part":
        """The same part of an original called `name`."""
        return Part(name, self.shape, self.kind, self.readings, self.dim, self.why)

    def read(self, get: Get) -> torch.Tensor:
        """The original, a live view for "whole" and "view"; gradients flow for all kinds.

        Args:
            get: Gives a packed tensor by its name.

        Raises:
            ConversionError: If the part is lost.
        """
        self._refuse_lost("read")
        if len(self.readings) == 1:
            return self.readings[0].read(get)
        if self.dim is not None:
            return torch.cat([reading.read(get) for reading in self.readings], self.dim)
        like = get(self.packed[0]) if self.readings else torch.empty(0)
        whole = like.new_empty(self.shape)
        for reading in self.readings:
            apply(reading.place, whole).copy_(apply(reading.steps, get(reading.packed)))
        return whole

    def write(self, get: Get, value: torch.Tensor) -> None:
        """Copies `value` into the packed tensors in place, outside autograd.

        Raises:
            ConversionError: If the shape is not the original's, or the part is lost.
        """
        self._refuse_lost("written")
        if tuple(value.shape) != self.shape:
            raise ConversionError(
                f"{self.name} has shape {self.shape}, and a value of shape {tuple(value.shape)} was to be written; "
                "give one of the original's shape."
            )
        with torch.no_grad():
            for reading in self.readings:
                apply(reading.steps, get(reading.packed)).copy_(apply(reading.place, fit_for(reading.place, value)))

    def describe(self) -> str:
        """Short text for a plan page, such as `gate_up_proj.weight[0:160]`."""
        if self.kind == "lost":
            return f"lost: {self.why}"
        if len(self.readings) == 1:
            return self.readings[0].describe()
        if self.dim is None:
            return f"{len(self.readings)} pieces of {_listed(self.packed)}"
        return f"cat({_listed([reading.describe() for reading in self.readings])}, dim={self.dim})"

    def _refuse_lost(self, done: str) -> None:
        if self.kind == "lost":
            raise ConversionError(
                f"{self.name} was to be {done} through the packed parameters, which do not hold it: {self.why}. "
                "Write a rule that keeps all of it, or list the name in `dropped`."
            )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, ... {names[-1]}"


# --- from moves to readings ------------------------------------------------------------------------------------------


def part_of(name: str, shape: Shape, moves: Sequence[Move], shapes: Mapping[str, Shape]) -> Part:
    """The part that `moves` into a tensor of this name and shape describe.

    Args:
        name: What the tensor is called.
        shape: Its shape.
        moves: Where its elements come from; they cover it exactly once.
        shapes: The shapes of the tensors that the moves read.
    """
    if not moves:
        # It has no elements; anything of the right shape is it.
        same = next((other for other, its in shapes.items() if its == shape), None)
        return Part(name, shape, "whole", (Reading(same, (), (), ()),)) if same else Part(name, shape, "assembled")
    if len(moves) == 1 and _same_memory(moves[0], shapes):
        source = str(moves[0].source)
        return _as_it_stands(name, shape, source, shapes[source])
    placed = _placed(name, shape, moves, shapes)
    boxes = [_box(spot) for spot in placed]
    readings = [
        _reading(spot, shape, box or shape, shapes[str(spot.move.source)])
        for spot, box in zip(placed, boxes, strict=True)
    ]
    copied = len(readings) > 1 or any(step[0] == "reshape" for step in readings[0].finish)
    simpler = _cut_where_awkward(placed, readings) if copied else None
    if simpler:
        return part_of(name, shape, simpler, shapes)
    if len(readings) == 1:
        return Part(name, shape, "assembled" if copied else "view", tuple(readings))
    dim = _concatenated(placed, boxes, shape)
    if dim is not None:
        order = sorted(range(len(placed)), key=lambda i: placed[i].starts[dim])
        readings = [readings[i] for i in order]
    return Part(name, shape, "assembled", tuple(readings), dim)


def _cut_where_awkward(placed: Sequence[Placed], readings: Sequence[Reading]) -> list[Move] | None:
    """Moves that need no `as_strided`, made by cutting those that do; None if none does, or it would be too many."""
    moves: list[Move] = []
    for spot, reading in zip(placed, readings, strict=True):
        dims = spot.move.dims
        if dims and any(step[0] == "as_strided" for step in reading.steps):
            # The outermost dim of what is read, or one that repeats it.
            outer = max(range(len(dims)), key=lambda i: (dims[i].of == 0, dims[i].of))
            moves += [spot.move.cut(outer, i, i + 1) for i in range(dims[outer].size)]
        else:
            moves.append(spot.move)
    return moves if len(placed) < len(moves) <= MAX_ORDINARY_READINGS else None


def _same_memory(move: Move, shapes: Mapping[str, Shape]) -> bool:
    """Whether a move that is all there is takes the whole of its source in its own order."""
    in_order = move.dims == () or (len(move.dims) == 1 and move.dims[0].into == move.dims[0].of == 1)
    return in_order and move.numel == math.prod(shapes[str(move.source)])


def _as_it_stands(name: str, shape: Shape, source: str, source_shape: Shape) -> Part:
    if shape == source_shape:
        return Part(name, shape, "whole", (Reading(source, (), (), ()),))
    return Part(name, shape, "view", (Reading(source, (), (("view", shape),), (("reshape", source_shape),)),))


def _placed(name: str, shape: Shape, moves: Sequence[Move], shapes: Mapping[str, Shape]) -> list[Placed]:
    try:
        return [spot for move in moves for part in _readable(move, shapes) for spot in place(part, shape)]
    except TooManyPiecesError:
        raise ConversionError(
            f"{name} of shape {shape} lies in more pieces in the packed parameters than can be handled one by one; "
            "write a rule whose reshapes keep to the dims' boundaries."
        ) from None


def _readable(move: Move, shapes: Mapping[str, Shape]) -> list[Move]:
    """The moves with dims that each lie in one dim of what they read, or the one move if that takes several."""
    source = str(move.source)
    try:
        placed = place(move.swapped(None), shapes[source])
    except TooManyPiecesError:
        return [move]
    return [spot.move.swapped(source) for spot in placed] if len(placed) == 1 else [move]


def _box(placed: Placed) -> Shape | None:
    """The shape of a placed move if it is a gapless box in the order of its own dims."""
    runs = [placed.run(axis) for axis in range(len(placed.starts))]
    return tuple(run for run in runs if run is not None) if None not in runs else None


def _concatenated(placed: Sequence[Placed], boxes: Sequence[Shape | None], shape: Shape) -> int | None:
    """The one dim along which boxes lie side by side, each being whole in all others."""
    partial = {axis for box in boxes for axis in range(len(shape)) if box is None or box[axis] != shape[axis]}
    return partial.pop() if len(partial) == 1 and all(boxes) and len(placed) > 1 else None


def _reading(spot: Placed, shape: Shape, box: Shape, packed_shape: Shape) -> Reading:
    """Chains for one piece, whose dims are ordered as they lie in the whole."""
    order = sorted(range(len(spot.move.dims)), key=lambda i: (spot.axes[i], -spot.steps[i]))
    dims = tuple(spot.move.dims[i] for i in order)
    move = Move(spot.move.source, dims, spot.move.into, spot.move.of)
    steps = chain(move.swapped(None), packed_shape)
    sizes = tuple(dim.size for dim in dims)
    joins = "view" if _joinable(spot, order) else "reshape"
    finish: tuple[Step, ...] = () if sizes == box else ((joins, box),)
    return Reading(str(move.source), steps, finish, chain(move, shape))


def _joinable(spot: Placed, order: Sequence[int]) -> bool:
    """Whether dims that lie on one axis of the whole can become one dim of the packed memory."""
    pairs = itertools.pairwise(order)
    dims = spot.move.dims
    return all(spot.axes[a] != spot.axes[b] or dims[a].of == dims[b].of * dims[b].size for a, b in pairs)


def chain(move: Move, shape: Shape) -> tuple[Step, ...]:
    """View operations that take a tensor of `shape` to what `move` says of its memory (`into`), dims in move order."""
    try:
        placed = place(move, shape)
    except TooManyPiecesError:
        placed = []
    steps = _chain(placed[0], shape) if len(placed) == 1 and placed[0].move == move else None
    if steps is None:
        # Dims that straddle the shape's: in flat memory each is one dim.
        numel = math.prod(shape)
        flat = _chain(place(move, (numel,))[0], (numel,))
        steps = None if flat is None else [("view", (numel,)), *flat]
    if steps is None:
        return (("as_strided", tuple(d.size for d in move.dims), tuple(d.into for d in move.dims), move.into),)
    return tuple(steps)


def _chain(placed: Placed, shape: Shape) -> list[Step] | None:
    if -1 in placed.axes:
        return None
    steps: list[Step] = []
    dims: list[int] = []  # the move's dims in the order in which the steps have them so far
    for axis, size in enumerate(shape):
        mine = placed.on(axis)
        axis_steps = _axis_steps(placed, axis, len(dims), size)
        if axis_steps is None:
            return None
        steps += axis_steps
        dims += mine
    order = tuple(dims.index(i) for i in range(len(dims)))
    moved = [i for i, k in enumerate(order) if i != k]
    if len(moved) == 2:
        steps.append(("transpose", *moved))
    elif moved:
        steps.append(("permute", order))
    return steps


def _axis_steps(placed: Placed, axis: int, dim: int, size: int) -> list[Step] | None:
    """Steps that take the dim `dim`, which is one axis of the packed shape, to the move's dims on that axis."""
    mine, start = placed.on(axis), placed.starts[axis]
    sizes, strides = [placed.move.dims[i].size for i in mine], [placed.steps[i] for i in mine]
    if not mine:
        return [("select", dim, start)]
    if len(mine) == 1 and strides[0] > 1:
        return [("slice", dim, start, start + (sizes[0] - 1) * strides[0] + 1, strides[0])]
    # The dims are digits of the index; the start may be a digit of its own in each, or all of it lie before them.
    for inner in (0, start % strides[0]):
        steps = _digits(dim, size, start - inner, inner, sizes, strides)
        if steps is not None:
            return steps
    return None


def _digits(
    dim: int, size: int, base: int, inner: int, sizes: Sequence[int], strides: Sequence[int]
) -> list[Step] | None:
    """Steps that take indices `base + inner + sum(digit * stride)` of a dim apart into one dim for each digit."""
    if any(outer % below for outer, below in itertools.pairwise(strides)):
        return None
    span = sizes[0] * strides[0]
    radices = [sizes[0], *(outer // below for outer, below in itertools.pairwise(strides))]
    starts = [inner // stride % radix for stride, radix in zip(strides, radices, strict=True)]
    starts[0] = 0
    if base + span > size or any(a + n > r for a, n, r in zip(starts, sizes, radices, strict=True)):
        return None
    steps: list[Step] = [] if span == size else [("narrow", dim, base, span)]
    if len(sizes) > 1:
        rest = (strides[-1],) if strides[-1] > 1 else ()
        steps.append(("unflatten", dim, (*radices, *rest)))
        steps += [
            ("narrow", dim + k, a, n) for k, (a, n, r) in enumerate(zip(starts, sizes, radices, strict=True)) if n < r
        ]
        steps += [("select", dim + len(sizes), inner % strides[-1])] if rest else []
    return steps
