"""Reads shared out among threads: from checkpoint files into tensors, each byte once.

On the CPU bytes are read at their positions straight into the tensors, many small ones by one call. Devices have ways
of their own (`device.py`). Every thread ends with the call, and whatever it held is given back.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import torch

from kernelgraft.checkpoint import device
from kernelgraft.checkpoint.device import device_lanes
from kernelgraft.checkpoint.memory import writable
from kernelgraft.checkpoint.positioned import read_into, read_runs
from kernelgraft.checkpoint.requests import Read, Straight, reads_of
from kernelgraft.checkpoint.waiting import Lane, Waiting
from kernelgraft.conversion.lazy import LazyTensor, copy_move

logger = logging.getLogger("kernelgraft")

Job = tuple[LazyTensor, torch.Tensor]

CHUNK = 16 << 20
"""Most bytes of one read on the CPU, and the size of a thread's staging buffer."""

_MOST_BUFFERS = 1024  # IOV_MAX


def fill(jobs: Iterable[Job], *, threads: int | None = None, on_progress: Callable[[int], None] | None = None) -> int:
    """Fill tensors with what lazy tensors stand for.

    Args:
        jobs: Lazy tensors, and a tensor of the same shape for each, of any strides, dtype and device.
        threads: How many threads read into host memory; by default as many as there are cores, at most 8.
        on_progress: Called with the number of bytes that were read since it was called last.

    Returns:
        How many bytes were read from files.

    Raises:
        CheckpointError: A file cannot be read, or ends too early: the message names file, tensor and offset. What the
            tensors hold is undefined then.
    """
    jobs = list(jobs)
    cuda = [job for job in jobs if job[1].device.type == "cuda"]
    others = [job for job in jobs if job[1].device.type != "cuda"]
    with torch.no_grad():
        for lazy, out in jobs:
            _fill_from_memory(lazy, out)
    started = time.perf_counter()
    total = 0
    if others:
        total += _carry_out(_in_order(others, CHUNK), [CpuLane] * (threads or _cores()), on_progress)
    if cuda:
        lanes = device_lanes({out.device for _, out in cuda}, _cores())
        total += _carry_out(_in_order(cuda, device.CHUNK), lanes, on_progress)
    if total:
        seconds = time.perf_counter() - started
        logger.debug("read %.3f GB in %.3f s (%.1f GB/s)", total / 1e9, seconds, total / 1e9 / max(seconds, 1e-9))
    return total


def check_readable(jobs: Iterable[Job], *, threads: int | None = None) -> None:
    """Read what `fill` would read, and forget it: before bytes are written over others that cannot be had back.

    Raises:
        CheckpointError: See `fill`.
    """
    _carry_out(_in_order(jobs, CHUNK), [_Rehearsal] * (threads or _cores()), None)


def _cores() -> int:
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, found)


def _fill_from_memory(lazy: LazyTensor, out: torch.Tensor) -> None:
    """What of a lazy tensor lies in memory already: live tensors, and values that were computed."""
    for move in lazy.moves:
        source = move.source
        if not hasattr(source, "file"):
            tensor = source.read()  # type: ignore[attr-defined]
            copy_move(move, out, tensor, lazy.rounding(tensor.dtype, out.dtype))


def _in_order(jobs: Iterable[Job], most: int) -> list[Read]:
    """All reads, file by file and from its beginning to its end."""
    reads = [read for lazy, out in jobs for read in reads_of(lazy, out, most)]
    order: dict[int, int] = {}
    for read in reads:
        order.setdefault(id(read.file), len(order))
    reads.sort(key=lambda read: (order[id(read.file)], read.start))
    return reads


def _carry_out(
    reads: Sequence[Read], lanes: Sequence[Callable[[], Lane]], on_progress: Callable[[int], None] | None
) -> int:
    """Share reads out among threads, one for each lane; the first error stops all of them."""
    waiting = Waiting(reads, len(lanes))
    total = waiting.nbytes
    errors: list[BaseException] = []

    def worker(make_lane: Callable[[], Lane]) -> None:
        lane = None
        try:
            with torch.no_grad():
                lane = make_lane()
                while task := lane.take(waiting):
                    lane.run(task)
                    waiting.done(task, on_progress)
        except BaseException as error:
            errors.append(error)
            waiting.stop()
        finally:
            if lane is not None:
                lane.close()

    pool = [
        threading.Thread(target=worker, args=(lane,), name=f"kernelgraft-read-{i}", daemon=True)
        for i, lane in enumerate(lanes[: len(reads)])
    ]
    try:
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join()
    except BaseException:  # Ctrl-C: nothing is left running
        waiting.stop()
        for thread in pool:
            if thread.ident is not None:
                thread.join()
        raise
    if errors:
        raise errors[0]
    return total


class CpuLane:
    """Reads into the memory of CPU tensors; for other devices than CUDA's, by way of it."""

    def __init__(self) -> None:
        self._staging: torch.Tensor | None = None
        self._buffers: dict[int, tuple[torch.Tensor, memoryview]] = {}

    def take(self, waiting: Waiting) -> list[Read]:
        """See `Lane`."""
        return waiting.take(CHUNK, gap=0, count=_MOST_BUFFERS)

    def run(self, task: Sequence[Read]) -> None:
        """See `Lane`: straight reads that touch in the file go by one call."""
        together: list[Straight] = []
        for read in task:
            straight = isinstance(read, Straight) and read.out.device.type == "cpu"
            if together and not (straight and together[-1].stop == read.start):
                self._straight(together)
                together = []
            if straight:
                together.append(read)  # type: ignore[arg-type]
            else:
                read.place(self._stage(read))
        if together:
            self._straight(together)

    def _straight(self, reads: Sequence[Straight]) -> None:
        read_into(reads[0].file, [self._place(read) for read in reads], reads[0].start, reads[0].name)

    def _place(self, read: Straight) -> memoryview:
        found = self._buffers.get(id(read.out))
        if found is None:
            found = self._buffers[id(read.out)] = (read.out, writable(read.out))
        return found[1][read.at : read.at + read.nbytes]

    def _stage(self, read: Read) -> torch.Tensor:
        """A staging buffer that begins with the bytes of a read."""
        if self._staging is None or self._staging.nbytes < read.nbytes:
            self._staging = torch.empty(max(CHUNK, read.nbytes), dtype=torch.uint8)
        read_runs(read, writable(self._staging))
        return self._staging

    def close(self) -> None:
        """See `Lane`."""
        self._staging = None
        self._buffers = {}


class _Rehearsal(CpuLane):
    """Reads, and lets go."""

    def run(self, task: Sequence[Read]) -> None:
        """See `Lane`."""
        for read in task:
            self._stage(read)
