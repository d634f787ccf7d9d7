"""Reads into the memory of CUDA devices, without a host copy of the model.

There are two ways, and threads of both kinds work through the same reads at the same time, since they wait for
different things. One registers pages of the mapped file with the driver, and the device copies them itself; what costs
is the registration. The other fills pinned buffers by positioned reads; what costs is the copy by the CPU. Bytes go
straight into place, or into a small staging buffer on the device, which lays them out anew.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial

import torch

from kernelgraft.checkpoint.memory import PAGE, Mapped, Pinned, RegistrationError, bytes_of, registered, writable
from kernelgraft.checkpoint.positioned import read_runs
from kernelgraft.checkpoint.requests import Read, Straight
from kernelgraft.checkpoint.waiting import Lane, Waiting

pinned = Pinned()
"""The host memory that loads have registered at the moment, and the most that it was."""

# Seconds for 16.4 GB in the page cache to an H200 (16 cores, torch 2.11, 2026-11-27, median of 3, in turn), by threads
# that register and threads that read: 0 + 8 0.58, 0 + 12 0.61, 2 + 8 0.64, 4 + 12 0.66, 12 + 0 0.80; in chunks of 4 MB
# 0 + 8 took 0.94, in chunks of 16 MB 0.68. On another machine of that kind registering was the faster way (0.66 to 0.85
# against 1.0 to 1.2, 2026-11-24), so there is some of both.
REGISTERING, READING = 2, 8

CHUNK = 8 << 20
"""Most bytes of one read, and the size of a buffer."""

REGISTERED = 64 << 20
"""Bytes of a file that one thread registers at once."""

# A gap in the file that is registered along.
_GAP = 1 << 20

Streams = Mapping[torch.device, torch.cuda.Stream]


def device_lanes(devices: Iterable[torch.device], cores: int) -> list[Callable[[], Lane]]:
    """The lanes that read to devices, for a process that may use so many cores.

    Copies start after what the current stream of each device has to do now.
    """
    after = {device: torch.cuda.current_stream(device) for device in devices}
    return [partial(RegisteringLane, after)] * REGISTERING + [partial(ReadingLane, after)] * min(READING, cores)


class _DeviceLane:
    """A stream and, where bytes are laid out anew, a staging buffer on each device."""

    def __init__(self, after: Streams) -> None:
        self._after = after
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._staging: dict[torch.device, torch.Tensor] = {}

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            # The memory may still be used by what was enqueued before: the allocator hands it on at once.
            stream.wait_stream(self._after[device])
        return self._streams[device]

    def _target(self, read: Read) -> torch.Tensor:
        """Where the bytes of a read go on the device: their place, or the staging buffer."""
        if isinstance(read, Straight):
            return bytes_of(read.out)[read.at : read.at + read.nbytes]
        device = read.out.device
        if device not in self._staging or self._staging[device].nbytes < read.nbytes:
            # Of the caller's stream, so that the allocator has it back for the caller.
            with torch.cuda.stream(self._after[device]):
                self._staging[device] = torch.empty(max(CHUNK, read.nbytes), dtype=torch.uint8, device=device)
        return self._staging[device]

    def _wait(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()

    def close(self) -> None:
        """See `Lane`."""
        self._wait()
        self._staging = {}


class _Buffer:
    """Pinned memory, and when the devices have copied what it holds."""

    def __init__(self, nbytes: int, stack: ExitStack) -> None:
        memory = Mapped(nbytes)
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
            with torch.cuda.stream(self._stream(read.out.device)):
                target = self._target(read)
                target[: read.nbytes].copy_(buffer.bytes[position : position + read.nbytes], non_blocking=True)
                if not isinstance(read, Straight):
                    read.place(target)
            position += read.nbytes
        for device in {read.out.device for read in task}:
            buffer.copied(device, self._streams[device])

    def close(self) -> None:
        """See `Lane`."""
        super().close()
        self._ring = []
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
            for read in task:
                self._instead.run([read])

    def _run_registered(self, task: Sequence[Read]) -> None:
        mapped = task[0].file.shared
        # Only whole pages can be registered, and each by one thread; the ends go as ordinary memory.
        low = -(-task[0].start // PAGE) * PAGE
        high = max(low, max(read.stop for read in task) // PAGE * PAGE)
        with registered(mapped.address + low, high - low, pinned, read_only=True):
            try:
                for read in task:
                    with torch.cuda.stream(self._stream(read.out.device)):
                        self._copy(read, mapped, low, high)
            finally:
                self._wait()

    def _copy(self, read: Read, mapped: Mapped, low: int, high: int) -> None:
        target, position = self._target(read), 0
        for start, nbytes in read.runs:
            stop = start + nbytes
            for begin, end in ((start, min(stop, low)), (max(start, low), min(stop, high)), (max(start, high), stop)):
                if begin < end:
                    at = position + begin - start
                    target[at : at + end - begin].copy_(mapped.bytes[begin:end], non_blocking=True)
            position += nbytes
        if not isinstance(read, Straight):
            read.place(target)

    def close(self) -> None:
        """See `Lane`."""
        super().close()
        if self._instead is not None:
            self._instead.close()
