"""The arithmetic under lazy tensors and programs: which strided piece of memory goes where.

A tensor that was only re-laid-out is a set of `Move`s. Each says that a strided piece of a source's contiguous memory
lies at a strided piece of the tensor's own contiguous memory. In this form a reshape costs nothing (contiguous memory
does not change), and every other re-layout is exact integer arithmetic: a move is first *placed* on the tensor's shape,
so that each of its dims lies in one dim of the shape, and then cut, shifted or given other strides.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

Shape = tuple[int, ...]

# A reshape across odd boundaries can shatter a move. Past this many pieces copying the tensor is the better way.
MAX_PIECES_PER_MOVE = 4096


class TooManyPiecesError(Exception):
    """A re-layout would shatter a move; the caller goes on eagerly."""


class Dim(NamedTuple):
    """One dim of a move: its size, and its stride in the memory written and in the memory read."""

    size: int
    into: int
    of: int


class Move(NamedTuple):  # no dataclass: experts in tensors of their own make thousands, and a tuple is made in half
    """A strided piece of `source`'s memory, starting at `of`, that lies at a strided piece of the own memory."""

    source: object
    dims: tuple[Dim, ...]
    into: int
    of: int

    @property
    def numel(self) -> int:
        """How many elements are moved."""
        return math.prod(dim.size for dim in self.dims)

    @property
    def span(self) -> int:
        """How far it reaches in the memory that is written, from its first element to behind its last one."""
        return 1 + sum((dim.size - 1) * dim.into for dim in self.dims)

    def cut(self, position: int, start: int, stop: int, step: int = 1) -> "Move":
        """The part of this move at indices `start:stop:step` of one of its dims."""
        dim = self.dims[position]
        size = len(range(start, stop, step))
        kept = () if size == 1 else (Dim(size, dim.into * step, dim.of * step),)
        dims = self.dims[:position] + kept + self.dims[position + 1 :]
        return Move(self.source, dims, self.into + start * dim.into, self.of + start * dim.of)

    def swapped(self, name: object) -> "Move":
        """The way back: what was written is read. `name` is the memory that this move writes."""
        dims = tuple(Dim(dim.size, dim.of, dim.into) for dim in self.dims)
        return Move(name, dims, self.of, self.into)


@dataclass(frozen=True, slots=True)
class Placed:
    """A move of which each dim lies within one axis of a shape: `axes[i]` with stride `steps[i]` in its indices.

    `starts` is the first index on each axis. A dim that does not move at all (stride 0) has the axis -1.
    """

    move: Move
    starts: tuple[int, ...]
    axes: tuple[int, ...]
    steps: tuple[int, ...]

    def on(self, axis: int) -> list[int]:
        """Positions of the dims on one axis, largest step first."""
        positions = [i for i, mine in enumerate(self.axes) if mine == axis]
        return sorted(positions, key=lambda i: -self.steps[i])

    def last(self, axis: int) -> int:
        """The last index on one axis."""
        return self.starts[axis] + sum((self.move.dims[i].size - 1) * self.steps[i] for i in self.on(axis))

    def run(self, axis: int) -> int | None:
        """The length of the gapless run of indices that is covered on one axis, None if there are gaps."""
        length = 1
        for i in reversed(self.on(axis)):
            if self.steps[i] != length:
                return None
            length *= self.move.dims[i].size
        return length

    def cut(self, position: int, start: int, stop: int, step: int = 1) -> "Placed":
        """The same as `Move.cut`, still placed."""
        starts = list(self.starts)
        starts[self.axes[position]] += start * self.steps[position]
        gone = len(range(start, stop, step)) == 1
        axes = self.axes[:position] + (() if gone else (self.axes[position],)) + self.axes[position + 1 :]
        steps = self.steps[:position] + (() if gone else (self.steps[position] * step,)) + self.steps[position + 1 :]
        return Placed(self.move.cut(position, start, stop, step), tuple(starts), axes, steps)

    def settled(self, strides: Sequence[int], offsets: Sequence[int] | None = None) -> Move:
        """The move in a memory where the axes have `strides`, each index being shifted by `offsets`."""
        pairs = zip(self.move.dims, self.axes, self.steps, strict=True)
        dims = tuple(Dim(dim.size, step * strides[axis] if axis >= 0 else 0, dim.of) for dim, axis, step in pairs)
        shift = offsets or (0,) * len(self.starts)
        into = sum((start + off) * stride for start, off, stride in zip(self.starts, shift, strides, strict=True))
        return Move(self.move.source, dims, into, self.move.of)


def contiguous_strides(shape: Sequence[int]) -> Shape:
    """Strides of a contiguous tensor of this shape."""
    strides = [1] * len(shape)
    for k in range(len(shape) - 2, -1, -1):
        strides[k] = strides[k + 1] * shape[k + 1]
    return tuple(strides)


def whole(source: object, numel: int) -> tuple[Move, ...]:
    """The moves of a tensor that is one source, untouched."""
    if numel == 0:
        return ()
    return (Move(source, (Dim(numel, 1, 1),) if numel > 1 else (), 0, 0),)


# --- placing a move on a shape ---------------------------------------------------------------------------------------


def place(move: Move, shape: Sequence[int]) -> list[Placed]:
    """Splits a move until each dim of it lies within one axis of `shape`; most often it already does.

    Raises:
        TooManyPiecesError: If that takes more than `MAX_PIECES_PER_MOVE` pieces.
    """
    strides = contiguous_strides(shape)
    # Innermost first; an axis of size 1 has no index to move along.
    axes = [(k, shape[k], strides[k]) for k in range(len(shape) - 1, -1, -1) if shape[k] > 1]
    waiting, placed = [move], []
    while waiting:
        current = waiting.pop()
        owners = [_owner(dim, axes) for dim in current.dims]
        parts = _split_off_grid(current, owners) or _split_at_carry(current, owners, axes)
        if parts:
            waiting.extend(reversed(parts))
        else:
            placed.append(_placed(current, owners, shape, strides))
        if len(waiting) + len(placed) > MAX_PIECES_PER_MOVE:
            raise TooManyPiecesError
    return placed


def _owner(dim: Dim, axes: list[tuple[int, int, int]]) -> tuple[int, int, int] | None:
    """The axis along which a dim steps: the one of the largest stride that is not larger than the dim's."""
    found = None
    for axis in axes:
        if axis[2] <= dim.into:
            found = axis
    return found


def _placed(
    move: Move, owners: list[tuple[int, int, int] | None], shape: Sequence[int], strides: Sequence[int]
) -> Placed:
    starts = tuple(move.into // stride % size for size, stride in zip(shape, strides, strict=True))
    axes = tuple(owner[0] if owner else -1 for owner in owners)
    steps = tuple(dim.into // owner[2] if owner else 0 for dim, owner in zip(move.dims, owners, strict=True))
    return Placed(move, starts, axes, steps)


def _split_off_grid(move: Move, owners: list[tuple[int, int, int] | None]) -> list[Move]:
    """A dim whose stride is no multiple of its axis's becomes several that are."""
    for position, (dim, owner) in enumerate(zip(move.dims, owners, strict=True)):
        if owner and dim.into % owner[2]:
            period = min(owner[2] // math.gcd(dim.into, owner[2]), dim.size)
            if period > MAX_PIECES_PER_MOVE:
                raise TooManyPiecesError
            return [move.cut(position, first, dim.size, period) for first in range(period)]
    return []


def _split_at_carry(
    move: Move, owners: list[tuple[int, int, int] | None], axes: list[tuple[int, int, int]]
) -> list[Move]:
    """A dim that runs over the end of its axis is split there: into whole rounds of the axis where they line up."""
    for axis in axes:
        _, size, stride = axis
        reached = move.into // stride % size
        mine = sorted((i for i, owner in enumerate(owners) if owner == axis), key=lambda i: move.dims[i].into)
        for i in mine:
            step = move.dims[i].into // stride
            if reached + (move.dims[i].size - 1) * step >= size:
                fitting = (size - 1 - reached) // step + 1
                return _rounds(move, i, fitting, size // step if size % step == 0 else 0)
            reached += (move.dims[i].size - 1) * step
    return []


def _rounds(move: Move, position: int, fitting: int, per_round: int) -> list[Move]:
    """Splits an overflowing dim after `fitting` indices, or into rounds of `per_round` if the first one is full."""
    dim = move.dims[position]
    if fitting != per_round:
        return [move.cut(position, 0, fitting), move.cut(position, fitting, dim.size)]
    rounds = dim.size // per_round
    outer = Dim(rounds, dim.into * per_round, dim.of * per_round)
    inner = Dim(per_round, dim.into, dim.of)
    dims = tuple(d for d in (outer, inner) if d.size > 1)
    parts = [move._replace(dims=move.dims[:position] + dims + move.dims[position + 1 :])]
    if rounds * per_round < dim.size:
        parts.append(move.cut(position, rounds * per_round, dim.size))
    return parts


# --- re-layouts ------------------------------------------------------------------------------------------------------


def permute(moves: Iterable[Move], shape: Shape, order: Sequence[int]) -> tuple[Move, ...]:
    """The moves after `permute(order)`."""
    strides = [0] * len(shape)
    for axis, stride in zip(order, contiguous_strides([shape[axis] for axis in order]), strict=True):
        strides[axis] = stride
    return normal(placed.settled(strides) for move in moves for placed in place(move, shape))


def concatenate(parts: Sequence[tuple[Iterable[Move], Shape]], dim: int) -> tuple[tuple[Move, ...], Shape]:
    """The moves and the shape of a concatenation along `dim`."""
    shape = list(parts[0][1])
    shape[dim] = sum(part_shape[dim] for _, part_shape in parts)
    # The dims before `dim` step from row to row, and in each row the parts' rows follow each other.
    row, offset, out = math.prod(shape[dim:]), 0, list[Move]()
    for moves, part_shape in parts:
        sizes = math.prod(part_shape[:dim]), math.prod(part_shape[dim:])
        for move in moves:
            index, start = divmod(move.into, sizes[1])
            if start + move.span <= sizes[1]:
                out.append(Move(move.source, move.dims, index * row + offset + start, move.of))
            else:
                out += [placed.settled((row, 1), (0, offset)) for placed in place(move, sizes)]
        offset += sizes[1]
    return normal(out), tuple(shape)


def take(moves: Iterable[Move], shape: Shape, dim: int, index: range) -> tuple[Move, ...]:
    """The moves after slicing `dim` with `index.start:index.stop:index.step`."""
    strides = contiguous_strides([*shape[:dim], len(index), *shape[dim + 1 :]])
    out = []
    for move in _near(moves, shape, dim, index):
        for placed in place(move, shape):
            for inside in _clip(placed, dim, index.start, index.stop):
                starts = list(inside.starts)
                starts[dim] -= index.start
                for kept in _every(replace(inside, starts=tuple(starts)), dim, index.step):
                    out.append(kept.settled(strides))
    return normal(out)


def _near(moves: Iterable[Move], shape: Shape, dim: int, index: range) -> Iterator[Move]:
    """Moves that may lie in a slice. Of an outermost dim it is one span of memory: with many moves that saves much."""
    if math.prod(shape[:dim]) != 1:
        yield from moves
        return
    stride = math.prod(shape[dim + 1 :])
    first, end = index.start * stride, index.stop * stride
    for move in moves:
        if move.into < end and move.into + move.span > first:
            yield move


def _clip(placed: Placed, axis: int, low: int, high: int) -> Iterator[Placed]:
    """What of a placed move lies at indices `low:high` of an axis."""
    first, last = placed.starts[axis], placed.last(axis)
    if last < low or first >= high:
        return
    if low <= first and last < high:
        yield placed
        return
    position = placed.on(axis)[0]
    size, step = placed.move.dims[position].size, placed.steps[position]
    inner = last - first - (size - 1) * step
    # Of the outermost dim's indices: the touched ones, and of those the ones that lie inside with all they hold.
    touched = range(max(0, -((first + inner - low) // step)), min(size, (high - 1 - first) // step + 1))
    inside = range(max(0, -((first - low) // step)), min(size, (high - 1 - inner - first) // step + 1))
    if inside:
        yield placed.cut(position, inside.start, inside.stop)
    # Not by looking for `i` in `inside`: a dim may have millions of indices.
    before, after = range(touched.start, inside.start), range(inside.stop, touched.stop)
    for i in (*before, *after) if inside else touched:
        yield from _clip(placed.cut(position, i, i + 1), axis, low, high)


def _every(placed: Placed, axis: int, step: int) -> Iterator[Placed]:
    """What of a placed move lies at multiples of `step`, with its indices divided by `step`."""
    for position in placed.on(axis):
        if placed.steps[position] % step:
            size = placed.move.dims[position].size
            period = step // math.gcd(placed.steps[position], step)
            for first in range(min(period, size)):
                yield from _every(placed.cut(position, first, size, period), axis, step)
            return
    if placed.starts[axis] % step == 0:
        starts = tuple(s // step if k == axis else s for k, s in enumerate(placed.starts))
        steps = tuple(s // step if k == axis else s for k, s in zip(placed.axes, placed.steps, strict=True))
        yield replace(placed, starts=starts, steps=steps)


def expand(moves: Iterable[Move], shape: Shape, wanted: Shape) -> tuple[Move, ...]:
    """The moves after repeating the dims of size 1 of `shape` (already of `wanted`'s rank) without copying."""
    strides = contiguous_strides(wanted)
    repeated = tuple(
        Dim(size, stride, 0) for old, size, stride in zip(shape, wanted, strides, strict=True) if old == 1 and size > 1
    )
    settled = (placed.settled(strides) for move in moves for placed in place(move, shape))
    return normal(move._replace(dims=move.dims + repeated) for move in settled) if math.prod(wanted) else ()


# --- normal form -----------------------------------------------------------------------------------------------------


def normal(moves: Iterable[Move]) -> tuple[Move, ...]:
    """The moves with mergeable dims merged and neighbours of one source joined, in the order of the own memory.

    Joining is what proves a round trip lossless: what was cut apart and put back is one whole move again.
    """
    by_source: dict[int, list[Move]] = {}
    for move in moves:
        by_source.setdefault(_identity(move.source), []).append(_coalesced(move))
    joined = [move for group in by_source.values() for move in (_joined(group) if len(group) > 1 else group)]
    return tuple(sorted(joined, key=lambda move: move.into))


def _identity(source: object) -> int:
    """Names are one source if they are equal; objects only if they are the same."""
    return hash(source) if isinstance(source, str) else id(source)


def _coalesced(move: Move) -> Move:
    if not move.dims or (len(move.dims) == 1 and move.dims[0].size > 1):
        return move
    dims: list[Dim] = []
    for dim in sorted(move.dims, key=lambda dim: (-dim.into, -dim.of)):
        outer = dims[-1] if dims else None
        if dim.size == 1:
            continue
        if outer and outer.into == dim.into * dim.size and outer.of == dim.of * dim.size:
            dims[-1] = Dim(outer.size * dim.size, dim.into, dim.of)
        else:
            dims.append(dim)
    return Move(move.source, tuple(dims), move.into, move.of)


def _joined(moves: list[Move]) -> list[Move]:
    """Joins neighbours until none are left, be they neighbours in the memory written or in the memory read."""
    while True:
        before = len(moves)
        for key in (_by_into, _by_of):
            moves = _joined_once(sorted(moves, key=key))
        if len(moves) == before:
            return moves


def _by_into(move: Move) -> int:
    return move.into


def _by_of(move: Move) -> int:
    return move.of


def _joined_once(moves: list[Move]) -> list[Move]:
    out: list[Move] = []
    for move in moves:
        both = _join(out[-1], move) if out else None
        if both:
            out[-1] = both
        else:
            out.append(move)
    return out


def _join(first: Move, second: Move) -> Move | None:
    """One move that says what two do, if they agree in all dims but one, along which they are neighbours."""
    if first.source != second.source:
        return None
    into, of = second.into - first.into, second.of - first.of
    only_first = [dim for dim in first.dims if dim not in second.dims]
    only_second = [dim for dim in second.dims if dim not in first.dims]
    if len(only_first) > 1 or len(only_second) > 1 or into <= 0 or of <= 0:
        return None
    if not only_first and not only_second:
        return _coalesced(first._replace(dims=(*first.dims, Dim(2, into, of))))
    along = (only_first or only_second)[0]
    sizes = [dims[0].size if dims else 1 for dims in (only_first, only_second)]
    same = all((dim.into, dim.of) == (along.into, along.of) for dim in only_first + only_second)
    if not same or (into, of) != (sizes[0] * along.into, sizes[0] * along.of):
        return None
    rest = tuple(dim for dim in first.dims if dim not in only_first)
    return _coalesced(first._replace(dims=(*rest, Dim(sum(sizes), along.into, along.of))))
