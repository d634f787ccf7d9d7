"""Reads that wait to be carried out, taken in the order of the files by several threads."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from kernelgraft.checkpoint.requests import Read

# Not less than this at once, however little is left.
_LEAST = 1 << 20


class Waiting:
    """What is left to read; threads may come for it before it is there.

    Attributes:
        num_lanes: How many threads share it.
        unreported: Bytes that were carried out, and of which nobody was told.
    """

    def __init__(self) -> None:
        self.num_lanes = 0
        self._reads: deque[Read] = deque()
        self._is_all = False
        self._nbytes = 0
        self.unreported = 0
        self._changed = threading.Condition()

    def put(self, reads: Sequence[Read], *, is_all: bool = True) -> None:
        """Say what is to be read, or some of it; nothing comes after what `is_all`, or after `stop`."""
        with self._changed:
            if not self._is_all:
                self._reads.extend(reads)
                self._nbytes += sum(read.nbytes for read in reads)
                self._is_all = is_all
                self._changed.notify_all()

    def take(self, most: int, *, gap: int | None = None, count: int | None = None, wait: bool = True) -> list[Read]:
        """The next reads, none if nothing is left.

        Towards the end less is given at once, so that all threads end at about the same time.

        Args:
            most: How many bytes at most, if there is more than one read.
            gap: How far a read may be behind the one before it in the same file; by default it may be anywhere.
            count: How many reads at most.
            wait: Wait for more while there may be some; otherwise none are given then.
        """
        with self._changed:
            while wait and not self._reads and not self._is_all:
                self._changed.wait()
            most = min(most, max(_LEAST, self._nbytes // (2 * self.num_lanes)))
            task: list[Read] = []
            size = 0
            while self._reads and (count is None or len(task) < count):
                read = self._reads[0]
                if task and (size + read.nbytes > most or not _follows(task[-1], read, gap)):
                    break
                task.append(self._reads.popleft())
                size += read.nbytes
            self._nbytes -= size
            return task

    def done(self, task: Sequence[Read], on_progress: Callable[[int], None] | None) -> None:
        """Report what was carried out, and what was before there was somebody to report to."""
        with self._changed:
            self.unreported += sum(read.nbytes for read in task)
            if on_progress is not None:
                on_progress(self.unreported)
                self.unreported = 0

    def stop(self) -> None:
        """Nothing more is given."""
        with self._changed:
            self._reads.clear()
            self._is_all = True
            self._changed.notify_all()


def _follows(last: Read, read: Read, gap: int | None) -> bool:
    return gap is None or (last.file is read.file and 0 <= read.start - last.stop <= gap)


class Lane(Protocol):
    """One thread's way of carrying out reads."""

    def take(self, waiting: Waiting) -> list[Read]:
        """The reads that it carries out next. When there are none, all that it has begun was carried out."""

    def run(self, task: Sequence[Read]) -> None:
        """Carry reads out, or begin to."""

    def close(self) -> None:
        """Wait for what is under way, and give back what the lane holds."""
