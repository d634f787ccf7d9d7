"""Reads shared out among threads: from checkpoint files into tensors, each byte once.

On the CPU bytes are read at their positions straight into the tensors, many small ones by one call. Devices have ways
of their own (`device.py`). Every thread ends with the call, and whatever it held is given back.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter

import torch

from kernelgraft.checkpoint.device import current_streams, device_lanes
from kernelgraft.checkpoint.memory import writable
from kernelgraft.checkpoint.positioned import read_into, read_runs
from kernelgraft.checkpoint.requests import Read, Straight, reads_of
from kernelgraft.checkpoint.waiting import Lane, Waiting
from kernelgraft.conversion.lazy import LazyTensor, copy_move

logger = logging.getLogger("kernelgraft")

Job = tuple[LazyTensor, torch.Tensor]

# Milliseconds of filling 537 MB of bfloat16 in fresh memory, of tensors of 34 MB joined and of 1 MB stacked, by MB of a
# read (2 cores of an AMD EPYC, shared, page cache warm; torch 2.13.0+cpu, 2026-11-29, medians of 9, in turn;
# `benchmarks/reading.py`): 1 52, 55; 2 44, 43; 4 44, 43; 8 45, 42; 16 46, 43; 32 54, 42; 64 47, 42.
CHUNK = 16 << 20
"""Most bytes that a thread reads on the CPU at once."""

# The same bytes cast to float32, and transposed: 1 80, 459; 2 81, 452; 4 80, 468; 8 91, 522; 16 101, 830. The buffer
# has to stay in a cache until it is laid out.
STAGED = 2 << 20
"""Most bytes of one read on the CPU that are laid out anew, and the size of a thread's staging buffer."""

# Joined, cast and transposed, by threads: 1 79, 124, 506; 2 47, 87, 472; 4 48, 95, 471; 8 49, 110, 483; 16 52, 121,
# 478. More than there are cores gain nothing; with more than two cores nothing was measured.
MOST_THREADS = 8
"""Threads that read into host memory, where there are as many cores."""

_MOST_BUFFERS = 1024  # IOV_MAX

_start = attrgetter("start")


def fill(
    jobs: Iterable[Job],
    *,
    threads: int | None = None,
    on_progress: Callable[[int], None] | None = None,
    ready: "Reading | None" = None,
) -> int:
    """Fill tensors with what lazy tensors stand for.

    Args:
        jobs: Lazy tensors, and a tensor of the same shape for each, of any strides, dtype and device.
        threads: How many threads read into host memory; by default as many as there are cores, at most `MOST_THREADS`.
        on_progress: Called with the number of bytes that were read since it was called last.
        ready: Threads that wait already for what goes to CUDA devices, or have begun; they end with the call.

    Returns:
        How many bytes were read from files, with those that were begun before.

    Raises:
        CheckpointError: A file cannot be read, or ends too early: the message names file, tensor and offset. What the
            tensors hold is undefined then.
    """
    jobs = list(jobs)
    with torch.no_grad():
        for lazy, out in jobs:
            _fill_from_memory(lazy, out)
    started = time.perf_counter()
    cuda = [job for job in jobs if goes_to_cuda(job[1])]
    others = [job for job in jobs if not goes_to_cuda(job[1])]
    total = early = 0
    if others:
        total += _carry_out(_in_order(others, CHUNK, STAGED), [CpuLane] * _host_threads(threads), on_progress)
    if cuda or (ready and ready.begun):
        ready = ready or ready_for_cuda()
        early = ready.num_read
        total += ready.run(_in_order(cuda, ready.most), {out.device for _, out in cuda}, on_progress)
    if total:
        seconds = time.perf_counter() - started
        rate = (total - early) / 1e9 / max(seconds, 1e-9)
        logger.debug(
            "read %.3f GB, %.3f before all was known; then %.3f s (%.1f GB/s)", total / 1e9, early / 1e9, seconds, rate
        )
    return total


def check_readable(jobs: Iterable[Job], *, threads: int | None = None) -> None:
    """Read what `fill` would read, and forget it: before bytes are written over others that cannot be had back.

    Raises:
        CheckpointError: See `fill`.
    """
    _carry_out(_in_order(jobs, STAGED), [_Rehearsal] * _host_threads(threads), None)


def goes_to_cuda(tensor: torch.Tensor) -> bool:
    """Whether a tensor is, or will be, on a CUDA device."""
    return tensor.device.type == "cuda"


def ready_for_cuda() -> "Reading":
    """Threads that wait for reads to CUDA devices, and meanwhile start CUDA, if need be, and pin their buffers.

    Hand it to `fill`, or stop it.
    """
    reading = Reading()
    lanes, reading.most = device_lanes(reading.streams, _cores())
    reading.start(lanes)
    return reading


def _in_order(jobs: Iterable[Job], most: int, most_staged: int | None = None) -> list[Read]:
    """All reads, file by file and from its beginning to its end."""
    by_file: dict[int, list[Read]] = {}
    for lazy, out in jobs:
        for read in reads_of(lazy, out, most, most_staged):
            by_file.setdefault(id(read.file), []).append(read)
    return [read for reads in by_file.values() for read in sorted(reads, key=_start)]


def _host_threads(threads: int | None) -> int:
    return threads or min(MOST_THREADS, _cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fill_from_memory(lazy: LazyTensor, out: torch.Tensor) -> None:
    """What of a lazy tensor lies in memory already: live tensors, and values that were computed."""
    for move in lazy.moves:
        source = move.source
        if not hasattr(source, "file"):
            tensor = source.read()  # type: ignore[attr-defined]
            copy_move(move, out, tensor, lazy.rounding(tensor.dtype, out.dtype))


def _carry_out(
    reads: Sequence[Read], lanes: Sequence[Callable[[], Lane]], on_progress: Callable[[int], None] | None
) -> int:
    """Share reads out among threads, one for each lane."""
    reading = Reading()
    reading.start(lanes[: len(reads)])
    return reading.run(reads, (), on_progress)


class Reading:
    """Threads that carry reads out, one for each lane. The first error stops all of them.

    Attributes:
        streams: The current streams of the CUDA devices that are read to, from when that is known.
        most: How many bytes at most a read may have.
        begun: Lazy tensors that are being read already, by identity, each with the tensor that it goes to; none when
            the threads have ended, since these would outlive their model.
    """

    def __init__(self) -> None:
        self.most = CHUNK
        self.streams: dict[torch.device, torch.cuda.Stream] = {}
        self.begun: dict[int, Job] = {}
        self._nbytes = 0
        self._waiting = Waiting()
        self._on_progress: Callable[[int], None] | None = None
        self._errors: list[BaseException] = []
        self._pool: list[tuple[threading.Thread, threading.Event]] = []

    def start(self, lanes: Iterable[Callable[[], Lane]]) -> None:
        """Start a thread for each lane, which makes its lane and waits for something to do."""
        try:
            for lane in lanes:
                name, ended = f"kernelgraft-read-{len(self._pool)}", threading.Event()
                thread = threading.Thread(target=self._work, args=(lane, ended), name=name, daemon=True)
                self._pool.append((thread, ended))
                self._waiting.num_lanes += 1
                thread.start()
        except BaseException:  # Ctrl-C: nothing is left running
            self.stop()
            raise

    def begin(self, jobs: Sequence[Job]) -> None:
        """Start to fill tensors on CUDA devices from files; `run` goes on with the rest, and tells how it went."""
        if jobs and not self.begun:
            logger.debug("begin to read")
        self.begun |= {id(lazy): (lazy, out) for lazy, out in jobs}
        self._put(_in_order(jobs, self.most), {out.device for _, out in jobs}, is_all=False)

    @property
    def num_read(self) -> int:
        """How many bytes were read before `run`, or are on their way."""
        return self._waiting.unreported

    def run(
        self, reads: Sequence[Read], devices: Iterable[torch.device], on_progress: Callable[[int], None] | None
    ) -> int:
        """Carry reads out, the last ones; the threads have ended then.

        Args:
            reads: The reads that were not begun.
            devices: The CUDA devices that they go to.
            on_progress: As in `fill`.

        Returns:
            How many bytes were read.

        Raises:
            CheckpointError: See `fill`.
        """
        try:
            self._on_progress = on_progress
            self._put(reads, devices, is_all=True)
            self._wait()
        except BaseException:
            self.stop()
            raise
        if self._errors:
            raise self._errors[0]
        self._waiting.done((), on_progress)
        return self._nbytes

    def _put(self, reads: Sequence[Read], devices: Iterable[torch.device], *, is_all: bool) -> None:
        self.streams |= current_streams(devices)
        self._nbytes += sum(read.nbytes for read in reads)
        self._waiting.put(reads, is_all=is_all)

    def stop(self) -> None:
        """End the threads after what each is doing, and wait for them."""
        self._waiting.stop()
        self._wait()

    def _wait(self) -> None:
        """Wait until the threads have ended. Ctrl-C, however often it comes, ends them sooner, and is raised then."""
        interrupt: KeyboardInterrupt | None = None
        left = [each for each in self._pool if each[0].ident is not None]
        while left:
            thread, ended = left[-1]
            try:
                # Not by `join` alone: interrupted, it may take a thread for ended that still runs.
                ended.wait()
                thread.join()
                left.pop()
            except KeyboardInterrupt as error:
                interrupt = error
                self._waiting.stop()
        self.begun = {}
        if interrupt is not None:
            raise interrupt

    def _work(self, make_lane: Callable[[], Lane], ended: threading.Event) -> None:
        lane = None
        try:
            with torch.no_grad():
                lane = make_lane()
                while task := lane.take(self._waiting):
                    lane.run(task)
                    self._waiting.done(task, self._on_progress)
        except BaseException as error:
            self._errors.append(error)
            self._waiting.stop()
        finally:
            try:
                if lane is not None:
                    lane.close()
            finally:
                ended.set()


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
        read_into(reads[0].file, [self._place(read) for read in reads], reads[0].start, reads)

    def _place(self, read: Straight) -> memoryview:
        found = self._buffers.get(id(read.out))
        if found is None:
            found = self._buffers[id(read.out)] = (read.out, writable(read.out))
        return found[1][read.at : read.at + read.nbytes]

    def _stage(self, read: Read) -> torch.Tensor:
        """A staging buffer that begins with the bytes of a read."""
        if self._staging is None or self._staging.nbytes < read.nbytes:
            self._staging = torch.empty(max(STAGED, read.nbytes), dtype=torch.uint8)
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
