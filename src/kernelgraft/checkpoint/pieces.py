"""Small pieces of host memory that are filled from files through a ring, many at a time, by one thread.

Each piece is filled by the reads of one task and then given out, in whatever order the kernel is done with them. Who
has it sends its bytes on, and gives it back.
"""

import errno
import itertools
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kernelgraft.checkpoint.files import OpenFile
from kernelgraft.checkpoint.memory import Mapped, advise_huge
from kernelgraft.checkpoint.positioned import cut_off, name_at, unreadable
from kernelgraft.checkpoint.requests import Read
from kernelgraft.checkpoint.ring import Ring

_AGAIN = frozenset({errno.EINTR, errno.EAGAIN})


@dataclass(slots=True, eq=False)
class Piece:
    """One piece.

    Attributes:
        address: Where it lies.
        bytes: The same as a uint8 tensor.
        task: The reads whose bytes it holds, or will, one after the other.
        left: How many runs are still to be read.
    """

    address: int
    bytes: torch.Tensor
    task: Sequence[Read] = field(default_factory=list)
    left: int = 0


@dataclass(slots=True, eq=False)
class _Run:
    """Bytes of a file, and their place in a piece."""

    piece: Piece
    file: OpenFile
    start: int
    address: int
    nbytes: int


class Pieces:
    """A fixed number of pieces, side by side in memory of their own.

    Attributes:
        size: Bytes of a piece.
        most: Bytes that the kernel is asked for at once, at most.
        address: Where the first one lies.
        nbytes: Bytes of all.
        free: Those that nothing is in, the one that was given back last at the end.
    """

    def __init__(self, size: int, count: int, ring: Ring, most: int) -> None:
        """Take the memory.

        Args:
            size: Bytes of a piece.
            count: How many pieces.
            ring: What reads into them. It is closed with them, also if there is no memory.
            most: How many bytes the kernel is asked for at once: longer runs are several reads, which its threads carry
                out side by side.

        Raises:
            CheckpointError: There is no memory.
        """
        self.size, self.most, self.nbytes = size, most, size * count
        self._ring = ring
        try:
            self._memory = Mapped(self.nbytes)
        except BaseException:
            ring.close()
            raise
        self.address = self._memory.address
        advise_huge(self.address, self.nbytes)
        parts = self._memory.bytes.view(count, size)
        self.free = [Piece(self.address + index * size, part) for index, part in enumerate(parts)]
        self._queue: deque[_Run] = deque()
        self._under_way: dict[int, _Run] = {}
        self._tags = itertools.count()

    @property
    def being_filled(self) -> bool:
        """Whether any piece is."""
        return bool(self._queue or self._under_way)

    def begin(self, task: Sequence[Read]) -> None:
        """Let a free piece be filled. The kernel hears of it with the next call of `filled`.

        Args:
            task: Reads of at least one byte and at most `size` bytes together.
        """
        if not 0 < sum(read.nbytes for read in task) <= self.size:
            raise ValueError(f"{[read.nbytes for read in task]} bytes do not go into a piece of {self.size}")
        piece = self.free.pop()
        runs: list[_Run] = []
        address = piece.address
        for read in task:
            for start, nbytes in read.runs:
                # Side by side in the piece they all are.
                if runs and runs[-1].file is read.file and runs[-1].start + runs[-1].nbytes == start:
                    runs[-1].nbytes += nbytes
                else:
                    runs.append(_Run(piece, read.file, start, address, nbytes))
                address += nbytes
        runs = [part for run in runs for part in self._parts(run)]
        piece.task, piece.left = task, len(runs)
        self._queue.extend(runs)

    def _parts(self, run: _Run) -> list[_Run]:
        """A run as runs of at most `most` bytes."""
        if run.nbytes <= self.most:
            return [run]
        return [
            _Run(run.piece, run.file, run.start + at, run.address + at, min(self.most, run.nbytes - at))
            for at in range(0, run.nbytes, self.most)
        ]

    def filled(self, *, wait: bool) -> list[Piece]:
        """The pieces that have become full.

        Args:
            wait: Wait until something was read, be it enough for a piece or not.

        Raises:
            CheckpointError: A file cannot be read, or ends too early.
        """
        for _ in range(min(self._ring.room, len(self._queue))):
            run, tag = self._queue.popleft(), next(self._tags)
            self._under_way[tag] = run
            self._ring.read(run.file.fd, run.address, run.nbytes, run.start, tag)
        self._ring.enter(1 if wait and self._under_way else 0)
        full = []
        for tag, result in self._ring.completed():
            run = self._under_way.pop(tag)
            if result != run.nbytes:
                self._read_on(run, result)
                continue
            run.piece.left -= 1
            if not run.piece.left:
                full.append(run.piece)
        return full

    def _read_on(self, run: _Run, result: int) -> None:
        """After a read that gave something else than what was asked for."""
        if result > 0:
            run.start, run.address, run.nbytes = run.start + result, run.address + result, run.nbytes - result
        elif -result not in _AGAIN:
            name = name_at(run.piece.task, run.file, run.start)
            if result == 0:
                raise cut_off(run.file, name, run.start)
            raise unreadable(run.file, name, run.start, OSError(-result, os.strerror(-result)))
        self._queue.appendleft(run)

    def give_back(self, pieces: Sequence[Piece]) -> None:
        """Let pieces be filled with something else."""
        for piece in pieces:
            piece.task = []
        self.free += pieces

    def settle(self) -> None:
        """Wait until nothing is written into the pieces any more; nothing more can be begun.

        Raises:
            CheckpointError: It cannot be waited for; the memory must stay.
        """
        self._ring.close()

    def close(self) -> None:
        """Settle, and give the memory back; there must be no other tensors over it."""
        self.settle()
        self.free.clear()
        self._queue.clear()
        self._under_way.clear()
        self._memory.close()
