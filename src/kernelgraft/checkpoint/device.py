"""Reads into the memory of CUDA devices, without a host copy of the model.

Where the kernel grants a ring, one thread of ours has it fill small pinned pieces of memory from the files, and the
device copies each as soon as it is full. Elsewhere threads do it, in two ways and at the same time, since they wait for
different things: some fill pinned buffers by positioned reads, and what costs is the copy by the CPU; others register
pages of the mapped file with the driver, the device copies them itself, and what costs is the registration. Bytes go
straight into place, or into a small staging buffer on the device, which lays them out anew.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial

import torch

from kernelgraft.checkpoint.memory import (
    PAGE,
    Mapped,
    Pinned,
    RegistrationError,
    advise_huge,
    bytes_of,
    registered,
    writable,
)
from kernelgraft.checkpoint.pieces import Piece, Pieces
from kernelgraft.checkpoint.positioned import read_runs
from kernelgraft.checkpoint.requests import Read, Straight
from kernelgraft.checkpoint.ring import Ring, RingError, ring_for_another
from kernelgraft.checkpoint.waiting import Lane, Waiting

logger = logging.getLogger("kernelgraft")

pinned = Pinned()
"""The host memory that loads have registered at the moment, and the most that it was."""

# Seconds of filling 16.4 GB from the page cache through a ring (H200, 16 cores, torch 2.11, Linux 6.18, 2026-11-28,
# medians of 5, in turn), by MB of a piece and of all: 1 of 64 0.76, 2 of 64 0.41, 2 of 96 0.42, 4 of 96 0.38,
# 4 of 192 0.42, 8 of 192 0.44; by threads, as below, 0.58. Two threads that register take the interpreter from the one
# that streams: with them 4 of 96 took 0.80. A whole from_pretrained in fresh processes (medians of 3) took 0.53 with
# 4 of 96, 0.61 with 2 of 96 and with 4 of 192, 0.79 with threads.
PIECE, STREAMED = 4 << 20, 96 << 20
"""Most bytes of one read by the thread that streams, and bytes of all its pieces together."""

# The same by threads that read and threads that register (32 MB each), on an H100 (2026-11-28, medians of 7): 16 + 0
# 0.66, 12 + 0 0.67, 12 + 4 0.68, 8 + 4 0.72, 8 + 0 0.76, 0 + 12 1.00; in chunks of 4 MB 16 + 0 took 1.01, in
# chunks of 16 MB 0.65. On the H200 above: 12 + 0 0.53, 12 + 2 0.58. So those that register gained nothing on either
# machine. There are some because on an H200 of another day they were the faster way (0.66 to 0.85 against 1.0 to 1.2,
# 2026-11-24, by code that was thrown away), and where that is so the larger share of the reads falls to them.
REGISTERING, READING = 2, 12
"""Threads of either kind where no ring is granted."""

CHUNK = 8 << 20
"""Most bytes of one read by those that read, and the size of a buffer."""

REGISTERED = 32 << 20
"""Bytes of a file that one thread registers at once."""

# A gap in the file that is registered along.
_GAP = 1 << 20

Streams = Mapping[torch.device, torch.cuda.Stream]


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
        # Kept from here on: a second one might not be granted.
        ring = ring_for_another(STREAMED // PIECE)
    except RingError as error:
        logger.debug("threads read in place of a ring: %s", error)
        threads: list[Callable[[], Lane]] = [partial(RegisteringLane, after)] * REGISTERING
        return [*threads, *[partial(ReadingLane, after)] * min(READING, cores)], CHUNK
    return [partial(StreamingLane, after, ring, cores)], PIECE


class _DeviceLane:
    """A stream and, where bytes are laid out anew, a staging buffer on each device.

    A lane has its thread to itself, whose current stream stays set: to change it for each read, and to make each
    read's view anew, takes the interpreter as long as all else, and the lanes wait for each other there.
    """

    def __init__(self, after: Streams) -> None:
        self._after = after
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._staging: dict[torch.device, torch.Tensor] = {}
        self._current: torch.device | None = None
        self._filling: tuple[torch.Tensor, torch.Tensor] | None = None

    def _enter(self, device: torch.device) -> None:
        """Let what follows be enqueued on this lane's stream of a device."""
        if device == self._current:
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(self._streams[device])
        self._current = device

    def _send(self, read: Read, source: torch.Tensor) -> None:
        """Let a device copy the bytes of a read out of pinned memory."""
        self._enter(read.out.device)
        target = self._target(read)
        target.copy_(source, non_blocking=True)
        if not isinstance(read, Straight):
            read.place(target)

    def _target(self, read: Read) -> torch.Tensor:
        """Where the bytes of a read go on the device: their place, or the beginning of the staging buffer."""
        if isinstance(read, Straight):
            if self._filling is None or self._filling[0] is not read.out:
                self._filling = read.out, bytes_of(read.out)
            return self._filling[1].narrow(0, read.at, read.nbytes)
        device = read.out.device
        if device not in self._staging or self._staging[device].nbytes < read.nbytes:
            # Of the caller's stream, so that the allocator has it back for the caller.
            with torch.cuda.stream(self._after[device]):
                self._staging[device] = torch.empty(max(CHUNK, read.nbytes), dtype=torch.uint8, device=device)
            # It may still be used by what was enqueued before: the allocator hands memory on at once.
            self._streams[device].wait_stream(self._after[device])
        return self._staging[device].narrow(0, 0, read.nbytes)

    def _wait(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()

    def close(self) -> None:
        """See `Lane`."""
        self._wait()
        self._staging = {}
        self._filling = None


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


class ReadingLane(_DeviceLane):
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


class StreamingLane(_DeviceLane):
    """Lets the kernel fill small pinned pieces, many at a time, each on its way to a device as soon as it is full."""

    def __init__(self, after: Streams, ring: Ring, workers: int) -> None:
        super().__init__(after)
        self._pieces = Pieces(PIECE, STREAMED // PIECE, ring)
        # Pieces that were sent together, and what tells that each device has copied them.
        self._sent: deque[tuple[dict[torch.device, torch.cuda.Event], list[Piece]]] = deque()
        self._events: dict[torch.device, list[torch.cuda.Event]] = {}
        self._stack = ExitStack()
        self._stack.callback(self._pieces.close)
        try:
            ring.limit(workers)
            # Without it the driver copies by way of memory of its own, which is slower and as right.
            with suppress(RegistrationError):
                pieces = registered(self._pieces.address, self._pieces.nbytes, pinned, read_only=False)
                self._stack.enter_context(pieces)
        except BaseException:
            self._stack.close()
            raise

    def take(self, waiting: Waiting) -> list[Read]:
        """See `Lane`; when there is nothing more to take, what was begun is sent on its way."""
        task = waiting.take(PIECE)
        while not task and self._pieces.being_filled:
            self._send_all(self._pieces.filled(wait=True))
        return task

    def run(self, task: Sequence[Read]) -> None:
        """See `Lane`; the reads are only begun when it returns."""
        self._give_back(wait=False)
        while not self._pieces.free:
            # The kernel is the slower one, or the device is.
            if self._pieces.being_filled:
                self._send_all(self._pieces.filled(wait=True))
                self._give_back(wait=False)
            else:
                self._give_back(wait=True)
        self._pieces.begin(task)
        self._send_all(self._pieces.filled(wait=False))

    def _send_all(self, pieces: list[Piece]) -> None:
        """Let the devices copy what is in full pieces."""
        if not pieces:
            return
        devices = set()
        for piece in pieces:
            position = 0
            for read in piece.task:
                self._send(read, piece.bytes.narrow(0, position, read.nbytes))
                position += read.nbytes
                devices.add(read.out.device)
        self._sent.append(({device: self._recorded(device) for device in devices}, pieces))

    def _recorded(self, device: torch.device) -> torch.cuda.Event:
        unused = self._events.setdefault(device, [])
        event = unused.pop() if unused else torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._streams[device])
        return event

    def _give_back(self, *, wait: bool) -> None:
        """Have the pieces again that the devices have copied, those that were sent first at least if `wait`."""
        while self._sent:
            events, pieces = self._sent[0]
            if wait:
                for event in events.values():
                    event.synchronize()
            elif not all(event.query() for event in events.values()):  # type: ignore[no-untyped-call]
                return
            wait = False
            self._sent.popleft()
            self._pieces.give_back(pieces)
            for device, event in events.items():
                self._events[device].append(event)

    def close(self) -> None:
        """See `Lane`. What cannot be waited for may still write to the pieces or read them: then they stay."""
        self._pieces.settle()
        super().close()
        self._sent.clear()
        self._stack.close()


class RegisteringLane(_DeviceLane):
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
