"""What must be read to fill tensors from checkpoint files: byte ranges, and where each goes.

A lazy tensor's moves become reads of two kinds. Where bytes and dtype agree a run of the file goes straight to its
place. Otherwise runs go to a staging buffer, and a strided copy takes them from there: a transpose, an interleave, a
cast. No read is larger than it may be, so that reads can be shared out among threads and buffers stay small.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kernelgraft.checkpoint.files import FileTensor, OpenFile
from kernelgraft.checkpoint.memory import bytes_of
from kernelgraft.conversion.lazy import LazyTensor, fitted
from kernelgraft.conversion.moves import Dim, Move

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}

# Runs shorter than this are copied into place from a staging buffer: one read for each would cost more. Milliseconds of
# filling 67 MB whose runs lie apart in the tensor, straight and staged, and half as many whose runs lie apart in the
# file, by KB of a run (the machine of `reader.py`): 2 160, 13 and 142, 6; 8 49, 14 and 46, 19; 16 27, 12 and 31, 13; 32
# 16, 10 and 17, 9; 64 11, 9 and 10, 8; 128 9, 9 and 9, 8. To a GPU, where a staged read goes by torch: 8 138, 34 and
# 113, 76; 32 60, 34 and 52, 45 (H200, 16 cores, torch 2.11, medians of 5); longer ones were not measured there.
_SHORTEST_RUN = 64 << 10

# Gaps of less than a page are read along: the disk and the page cache have them anyway. Out of the page cache wider
# ones too are read faster than passed over (ms of casting runs of 8 KB out of 67 MB, each run alone and gaps read
# along, by KB of the gap: 1 52, 15; 4 36, 12; 8 29, 11; 16 16, 8; 32 10, 6; 64 7, 6). But they are others' parts of
# sharded parameters: each process would read all of a file.
_SMALL_GAP = 4096


@dataclass(slots=True)
class Straight:
    """A run of a file's bytes that goes to a run of a tensor's storage as it is."""

    file: OpenFile
    name: str
    start: int
    nbytes: int
    out: torch.Tensor
    at: int

    @property
    def stop(self) -> int:
        """Where the run ends in the file."""
        return self.start + self.nbytes

    @property
    def runs(self) -> list[tuple[int, int]]:
        """The one run, as `Staged` has them."""
        return [(self.start, self.nbytes)]

    def place(self, staging: torch.Tensor) -> None:
        """Copy what lies in a uint8 staging buffer to where it belongs."""
        bytes_of(self.out)[self.at : self.at + self.nbytes].copy_(staging[: self.nbytes], non_blocking=True)


@dataclass(slots=True)
class Staged:
    """Runs of a file's bytes that are laid out anew on their way.

    Attributes:
        file: The file.
        name: The tensor that they belong to.
        runs: (offset in the file, bytes) of each; they lie one after the other in the staging buffer.
        nbytes: All bytes of the runs.
        dtype: What they are in the file.
        sizes: The shape of what is copied.
        strides: Its strides in the staging buffer, in elements.
        out: The tensor it goes to.
        out_strides: Its strides there.
        at: Where it begins in the storage of `out`, in elements.
        rounded: A dtype to go through, if values were narrowed before they took the dtype of `out`.
    """

    file: OpenFile
    name: str
    runs: list[tuple[int, int]]
    nbytes: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    out: torch.Tensor
    out_strides: tuple[int, ...]
    at: int
    rounded: torch.dtype | None

    @property
    def start(self) -> int:
        """Where the first run begins in the file."""
        return self.runs[0][0]

    @property
    def stop(self) -> int:
        """Where the last run ends."""
        return max(start + nbytes for start, nbytes in self.runs)

    def place(self, staging: torch.Tensor) -> None:
        """Copy what lies in a uint8 staging buffer to where it belongs."""
        dtype, out = self.dtype, self.out
        if dtype == out.dtype and self.rounded is None:
            # Bits are moved, which torch can do for dtypes too that it cannot copy.
            dtype = _BITS[dtype.itemsize]
            out = out.view(dtype)
        value = staging[: self.nbytes].view(dtype).as_strided(self.sizes, self.strides)
        if self.rounded is not None:
            value = value.to(self.rounded)
        out.as_strided(self.sizes, self.out_strides, self.at).copy_(value, non_blocking=True)


Read = Straight | Staged


def reads_of(lazy: LazyTensor, out: torch.Tensor, most: int, most_staged: int | None = None) -> Iterator[Read]:
    """The reads that fill `out`, a tensor of any strides, from the checkpoint files that `lazy` is made of.

    Args:
        lazy: The lazy tensor; sources that are no tensors of files are passed over.
        out: A tensor of its shape.
        most: How many bytes one read may have.
        most_staged: How many if it goes by a staging buffer; by default as many.
    """
    most_staged = min(most, most_staged or most)
    # What is the same for all moves is asked once: experts in tensors of their own are thousands.
    is_contiguous, first, wanted = out.is_contiguous(), int(out.storage_offset()), out.dtype
    roundings: dict[torch.dtype, torch.dtype | None] = {}
    for move in lazy.moves:
        source = move.source
        if not isinstance(source, FileTensor):
            continue
        dtype = source.dtype
        if dtype not in roundings:
            roundings[dtype] = lazy.rounding(dtype, wanted)
        rounded = roundings[dtype]
        for part in (move,) if is_contiguous else fitted(move, out):
            into = first + part.into
            if dtype != wanted or rounded is not None:
                yield from _laid_out(source, part, out, into, rounded, most_staged)
            elif (run := _one_run(part)) is not None:
                itemsize = dtype.itemsize
                yield from _straight(source, out, part.of * itemsize, into * itemsize, run * itemsize, most)
            else:
                yield from _as_they_are(source, part, out, into, most, most_staged)


def _one_run(move: Move) -> int | None:
    """The elements of a move if they lie side by side both in the file and in the tensor."""
    if not move.dims:
        return 1
    size, into, of = move.dims[0]
    return size if into == of == 1 == len(move.dims) else None


def _as_they_are(
    source: FileTensor, move: Move, out: torch.Tensor, into: int, most: int, most_staged: int
) -> Iterator[Read]:
    """A move of bits, by its runs where they are long enough."""
    itemsize = source.dtype.itemsize
    run, outer = _common_run(_in_file_order(move))
    if outer and run * itemsize < _SHORTEST_RUN:
        yield from _laid_out(source, move, out, into, None, most_staged)
        return
    for of, at in _starts(outer, move.of, into):
        yield from _straight(source, out, of * itemsize, at * itemsize, run * itemsize, most)


def _laid_out(
    source: FileTensor, move: Move, out: torch.Tensor, into: int, rounded: torch.dtype | None, most: int
) -> Iterator[Read]:
    """A move by way of a staging buffer."""
    for block, of, at in _blocks(_in_file_order(move), move.of, into, most, source.dtype.itemsize):
        yield _staged(source, out, block, of, at, rounded)


def _in_file_order(move: Move) -> list[Dim]:
    """The dims of a move as they step through the file, what is read twice innermost."""
    return sorted(move.dims, key=lambda dim: -dim.of)


def _common_run(dims: Sequence[Dim]) -> tuple[int, list[Dim]]:
    """How many elements lie side by side both in the file and in the tensor, and the dims that are left."""
    run, left = 1, list(dims)
    while left and left[-1].of == run and left[-1].into == run:
        run *= left.pop().size
    return run, left


def _starts(dims: Sequence[Dim], of: int, into: int) -> Iterator[tuple[int, int]]:
    if not dims:
        yield of, into
        return
    for index in itertools.product(*(range(dim.size) for dim in dims)):
        pairs = list(zip(index, dims, strict=True))
        yield of + sum(i * dim.of for i, dim in pairs), into + sum(i * dim.into for i, dim in pairs)


def _straight(source: FileTensor, out: torch.Tensor, of: int, at: int, nbytes: int, most: int) -> list[Straight]:
    file, name, start = source.file, source.entry.name, source.entry.start + of
    return [
        Straight(file, name, start + done, min(nbytes - done, most), out, at + done) for done in range(0, nbytes, most)
    ]


def _blocks(dims: Sequence[Dim], of: int, into: int, most: int, itemsize: int) -> Iterator[tuple[list[Dim], int, int]]:
    """The move cut along its outermost dims into blocks for which at most `most` bytes are read."""
    if _read_at_once(dims, itemsize) * itemsize <= most or not dims:
        yield list(dims), of, into
        return
    dim, rest = dims[0], dims[1:]
    one = _read_at_once(rest, itemsize)
    each = max(1, (most // itemsize - one) // max(dim.of, one) + 1)
    for start in range(0, dim.size, each):
        size = min(each, dim.size - start)
        moved = of + start * dim.of, into + start * dim.into
        if size == 1:
            yield from _blocks(rest, *moved, most, itemsize)
        else:
            # An index takes no more than max(dim.of, one), be it in one run with its neighbours or in runs of its own.
            yield [Dim(size, dim.into, dim.of), *rest], *moved


def _parted(dims: Sequence[Dim], itemsize: int) -> tuple[list[Dim], list[Dim], int]:
    """Dims that step from run to run, those within a run, small gaps included, and the elements of a run."""
    outer, inner, run = list(dims), list[Dim](), 1
    while outer and (outer[-1].of - run) * itemsize < _SMALL_GAP:
        inner.insert(0, outer.pop())
        run += (inner[0].size - 1) * inner[0].of
    return outer, inner, run


def _read_at_once(dims: Sequence[Dim], itemsize: int) -> int:
    """How many elements are read for these dims."""
    outer, _, run = _parted(dims, itemsize)
    return run * math.prod(dim.size for dim in outer)


def _staged(
    source: FileTensor, out: torch.Tensor, dims: Sequence[Dim], of: int, into: int, rounded: torch.dtype | None
) -> Staged:
    itemsize = source.dtype.itemsize
    outer, inner, run = _parted(dims, itemsize)
    # Runs lie one after the other in the staging buffer.
    strides, stride = [dim.of for dim in inner], run
    for dim in reversed(outer):
        strides.insert(0, stride)
        stride *= dim.size
    base = source.entry.start
    runs = [(base + start * itemsize, run * itemsize) for start, _ in _starts(outer, of, 0)]
    return Staged(
        file=source.file,
        name=source.name,
        runs=runs,
        nbytes=run * itemsize * len(runs),
        dtype=source.dtype,
        sizes=tuple(dim.size for dim in dims),
        strides=tuple(strides),
        out=out,
        out_strides=tuple(dim.into for dim in dims),
        at=into,
        rounded=rounded,
    )
