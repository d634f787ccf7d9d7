"""Reads into the memory of CUDA devices, without a host copy of the model.

Where the kernel grants a ring, one thread of ours has it fill small pinned pieces of memory from the files, and the
device copies each as soon as it is full. Elsewhere threads do it, in two ways and at the same time, since they wait for
different things: some fill pinned buffers by positioned reads, and what costs is the copy by the CPU; others register
pages of the mapped file with the driver, the device copies them itself, and what costs is the registration. Bytes go
straight into place, or into a small staging buffer on the device, which lays them out anew.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial

import torch

from kernelgraft.checkpoint.memory import (
    PAGE,
    Mapped,
    RegistrationError,
    advise_huge,
    registered,
    writable,
)
from kernelgraft.checkpoint.positioned import read_runs
from kernelgraft.checkpoint.requests import Read, Straight
from kernelgraft.checkpoint.ring import RingError
from kernelgraft.checkpoint.sending import CHUNK, DeviceLane, Streams, pinned
from kernelgraft.checkpoint.streaming import streaming
from kernelgraft.checkpoint.waiting import Lane, Waiting

logger = logging.getLogger("kernelgraft")

# Seconds of filling 16.4 GB by threads that read and threads that register (32 MB each), on an H100 (2026-11-28,
# medians of 7): 16 + 0 0.66, 12 + 0 0.67, 12 + 4 0.68, 8 + 4 0.72, 8 + 0 0.76, 0 + 12 1.00; in chunks of 4 MB 16 + 0
# took 1.01, in chunks of 16 MB 0.65. On the H200 of `streaming.py`: 12 + 0 0.53, 12 + 2 0.58. So those that register
# gained nothing on either machine. There are some because on an H200 of another day they were the faster way (0.66 to
# 0.85 against 1.0 to 1.2, 2026-11-24, by code that was thrown away), and where that is so the larger share of the reads
# falls to them.
REGISTERING, READING = 2, 12
"""Threads of either kind where no ring is granted."""

REGISTERED = 32 << 20
"""Bytes of a file that one thread registers at once."""

# A gap in the file that is registered along.
_GAP = 1 << 20


def reserve(nbytes: Mapping[torch.device, int]) -> None:
    """Let torch have one large block on each device for what is about to be allocated there piece by piece.

    To ask the driver for each piece would cost as much as some of the reading.
    """
    for device, wanted in nbytes.items():
        if device.type == "cuda":
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            # Of what torch has unused a smaller request would take its part, and nothing would be reserved.
            if wanted - unused > unused:
                with suppress(torch.OutOfMemoryError):  # then piece by piece it is, which may fit
                    torch.empty(wanted - unused, dtype=torch.uint8, device=device)


def current_streams(devices: Iterable[torch.device]) -> dict[torch.device, torch.cuda.Stream]:
    """The current stream of each device, when it has done what it had to do: with memory to be read into, maybe."""
    streams = {device: torch.cuda.current_stream(device) for device in devices}
    for stream in streams.values():
        stream.synchronize()
    return streams


def device_lanes(after: Streams, cores: int) -> tuple[list[Callable[[], Lane]], int]:
    """The lanes that read to devices, for a process that may use so many cores.

    Args:
        after: The caller's stream on each device. It may come in after the lanes were made, and before the first read.
            What these streams have to do with the tensors that will be filled must be done.
        cores: How many cores.

    Returns:
        What makes each lane, and how many bytes at most a read for them may have.
    """
    try:
        lane, most = streaming(after, cores)
    except RingError as error:
        logger.debug("threads read in place of a ring: %s", error)
        threads: list[Callable[[], Lane]] = [partial(RegisteringLane, after)] * REGISTERING
        return [*threads, *[partial(ReadingLane, after)] * min(READING, cores)], CHUNK
    return [lane], most


class _Buffer:
    """Pinned memory, and when the devices have copied what it holds."""

    def __init__(self, nbytes: int, stack: ExitStack) -> None:
        memory = Mapped(nbytes)
        advise_huge(memory.address, nbytes)  # fewer pages to touch and to pin
        stack.callback(memory.close)
        # Without it the driver copies by way of memory of its own, which is slower and as right.
        with suppress(RegistrationError):
            stack.enter_context(registered(memory.address, nbytes, pinned, read_only=False))
        self.bytes = memory.bytes
        self.room = writable(memory.bytes)
        self._copied: dict[torch.device, torch.cuda.Event] = {}

    def copied(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        """Everything that `stream` copies out of it is enqueued."""
        if device not in self._copied:
            self._copied[device] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied[device].record(stream)

    def wait(self) -> None:
        """Wait until it can be filled again."""
        for event in self._copied.values():
            event.synchronize()


class ReadingLane(DeviceLane):
    """Reads into pinned buffers, one being filled while the devices copy the other."""

    def __init__(self, after: Streams) -> None:
        super().__init__(after)
        self._stack = ExitStack()
        try:
            self._ring = [_Buffer(CHUNK, self._stack) for _ in range(2)]
        except BaseException:
            self._stack.close()
            raise

    def take(self, waiting: Waiting) -> list[Read]:
        """See `Lane`."""
        return waiting.take(CHUNK)

    def run(self, task: Sequence[Read]) -> None:
        """See `Lane`; the copies may still be under way when it returns."""
        self._ring.reverse()
        buffer, position = self._ring[0], 0
        buffer.wait()
        for read in task:
            read_runs(read, buffer.room[position : position + read.nbytes])
            self._send(read, buffer.bytes.narrow(0, position, read.nbytes))
            position += read.nbytes
        for device in {read.out.device for read in task}:
            buffer.copied(device, self._streams[device])

    def close(self) -> None:
        """See `Lane`."""
        super().close()
        self._ring = []
        self._stack.close()


class RegisteringLane(DeviceLane):
    """Registers pages of the mapped file and lets the device copy them; reads where the driver does not take them."""

    def __init__(self, after: Streams) -> None:
        super().__init__(after)
        self._instead: ReadingLane | None = None

    def take(self, waiting: Waiting) -> list[Read]:
        """See `Lane`."""
        return waiting.take(REGISTERED, gap=_GAP)

    def run(self, task: Sequence[Read]) -> None:
        """See `Lane`."""
        try:
            self._run_registered(task)
        except RegistrationError:
            # Not this file, or not now: another thread has a page of it registered, if bytes go to two places.
            if self._instead is None:
                self._instead = ReadingLane(self._after)
            self._instead._current = None
            for read in task:
                self._instead.run([read])
            self._current = None

    def _run_registered(self, task: Sequence[Read]) -> None:
        mapped = task[0].file.shared
        # Only whole pages can be registered, and each by one thread; the ends go as ordinary memory.
        low = -(-task[0].start // PAGE) * PAGE
        high = max(low, max(read.stop for read in task) // PAGE * PAGE)
        with registered(mapped.address + low, high - low, pinned, read_only=True):
            try:
                for read in _joined(task):
                    self._enter(read.out.device)
                    self._copy(read, mapped, low, high)
            finally:
                self._wait()

    def _copy(self, read: Read, mapped: Mapped, low: int, high: int) -> None:
        target, position = self._target(read), 0
        for start, nbytes in read.runs:
            stop = start + nbytes
            for begin, end in ((start, min(stop, low)), (max(start, low), min(stop, high)), (max(start, high), stop)):
                if begin < end:
                    at, source = position + begin - start, mapped.bytes[begin:end]
                    if begin < low or end > high:
                        # Another thread may have that page registered, and take it away while it is copied.
                        source = source.clone()
                    target[at : at + end - begin].copy_(source, non_blocking=True)
            position += nbytes
        if not isinstance(read, Straight):
            read.place(target)

    def close(self) -> None:
        """See `Lane`."""
        super().close()
        if self._instead is not None:
            self._instead.close()


def _joined(reads: Sequence[Read]) -> list[Read]:
    """The same reads, with those joined that go from one run of a file to one run of a tensor."""
    joined: list[Read] = []
    for read in reads:
        last = joined[-1] if joined else None
        if (
            isinstance(last, Straight)
            and isinstance(read, Straight)
            and last.out is read.out
            and last.file is read.file
            and (last.stop, last.at + last.nbytes) == (read.start, read.at)
        ):
            joined[-1] = replace(last, nbytes=last.nbytes + read.nbytes)
        else:
            joined.append(read)
    return joined
