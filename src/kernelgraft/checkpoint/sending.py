"""What every thread that reads for CUDA devices does at its end: it lets a device copy, and lay out anew."""

from collections.abc import Mapping

import torch

from kernelgraft.checkpoint.memory import Pinned, bytes_of
from kernelgraft.checkpoint.requests import Read, Straight

pinned = Pinned()
"""The host memory that loads have registered at the moment, and the most that it was."""

CHUNK = 8 << 20
"""Most bytes of one read by those that read, and the size of a buffer."""

Streams = Mapping[torch.device, torch.cuda.Stream]


class DeviceLane:
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
