"""Reads for CUDA devices by one thread, where the kernel grants a ring and fills small pinned pieces by it."""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial

import torch

from kernelgraft.checkpoint.driver import Driver, driver
from kernelgraft.checkpoint.memory import RegistrationError, registered
from kernelgraft.checkpoint.pieces import Piece, Pieces
from kernelgraft.checkpoint.requests import Read, Straight
from kernelgraft.checkpoint.ring import Ring, ring_for_another
from kernelgraft.checkpoint.sending import DeviceLane, Streams, pinned
from kernelgraft.checkpoint.waiting import Lane, Waiting
from kernelgraft.pausing import interpreter_handed_over

# Seconds of filling 16.4 GB from the page cache through a ring (H200, 16 cores, torch 2.11, Linux 6.18, 2026-11-28,
# medians of 5, in turn), by MB of a piece and of all: 1 of 64 0.76, 2 of 64 0.41, 2 of 96 0.42, 4 of 96 0.38, 4 of 192
# 0.42, 8 of 192 0.44; by threads, as in `device.py`, 0.58. Two threads that register take the interpreter from the one
# that streams: with them 4 of 96 took 0.80. A whole from_pretrained in fresh processes (medians of 3) took 0.53 with 4
# of 96, 0.61 with 2 of 96 and with 4 of 192, 0.79 with threads. With 8 read by 4 the thread needs the interpreter 22 us
# for 4 MB in place of 26 (2 cores of an EPYC). Plain and with q/k/v and gate/up merged (2026-11-29, medians of 10, in
# turn): 4 of 96 0.445, 0.517; 8 by 4 of 96 0.454, 0.508; 8 by 4 of 128 0.458, 0.512; 8 whole of 96 0.478, 0.577. Beside
# turns of 0.1 ms (`pausing.py`; another host, 9 rounds): 4 of 96 0.501, 0.593; 8 by 4 of 96 0.506, 0.543.
PIECE, RUN, STREAMED = 8 << 20, 4 << 20, 96 << 20
"""Most bytes of one read by the thread that streams, of what the kernel is asked for at once, and of all its pieces."""


def streaming(after: Streams, cores: int) -> tuple[Callable[[], Lane], int]:
    """What makes the lane of a process that may use so many cores, and how many bytes at most a read may have.

    Raises:
        RingError: The kernel grants no ring.
    """
    # Kept from here on: a second one might not be granted.
    ring = ring_for_another(STREAMED // RUN)
    return partial(StreamingLane, after, ring, cores), PIECE


class StreamingLane(DeviceLane):
    """Lets the kernel fill small pinned pieces, many at a time, each on its way to a device as soon as it is full.

    Other threads work in Python meanwhile: the one that plans a graft, above all. This one gives the interpreter up
    only where it has to wait, and has it back soon.
    """

    def __init__(self, after: Streams, ring: Ring, workers: int) -> None:
        super().__init__(after)
        self._pieces = Pieces(PIECE, STREAMED // PIECE, ring, RUN)
        # Pieces that were sent together, and what tells that each device has copied them.
        self._sent: deque[tuple[dict[torch.device, torch.cuda.Event], list[Piece]]] = deque()
        self._events: dict[torch.device, list[torch.cuda.Event]] = {}
        self._driver: Driver | None = None
        self._into: tuple[torch.Tensor, int] | None = None
        self._stack = ExitStack()
        self._stack.callback(self._pieces.close)
        self._is_running = False
        try:
            ring.limit(workers)
            # Without it the driver copies by way of memory of its own, which is slower and as right.
            with suppress(RegistrationError):
                pieces = registered(self._pieces.address, self._pieces.nbytes, pinned, read_only=False)
                self._stack.enter_context(pieces)
                self._driver = driver()
        except BaseException:
            self._stack.close()
            raise

    def take(self, waiting: Waiting) -> list[Read]:
        """See `Lane`; when there is nothing more to take, for now or for good, what was begun is sent on its way."""
        task = waiting.take(PIECE, wait=False)
        while not task and self._pieces.being_filled:
            self._send_all(self._pieces.filled(wait=True))
            task = waiting.take(PIECE, wait=False)
        return task or waiting.take(PIECE)

    def run(self, task: Sequence[Read]) -> None:
        """See `Lane`; the reads are only begun when it returns."""
        if not self._is_running:
            self._is_running = True
            self._stack.enter_context(interpreter_handed_over())
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
            address = piece.address
            for read in piece.task:
                devices.add(read.out.device)
                if not self._send_quickly(read, address):
                    self._send(read, piece.bytes.narrow(0, address - piece.address, read.nbytes))
                address += read.nbytes
        self._sent.append(({device: self._recorded(device) for device in devices}, pieces))

    def _send_quickly(self, read: Read, address: int) -> bool:
        """Let a device copy what goes straight to its place, by the driver; false if that cannot be."""
        if self._driver is None or not isinstance(read, Straight):
            return False
        self._enter(read.out.device)
        # Not by `_filling`: to make that view gives the interpreter up.
        if self._into is None or self._into[0] is not read.out:
            self._into = read.out, read.out.untyped_storage().data_ptr()
        stream = self._streams[read.out.device].cuda_stream
        return self._driver.copy(self._into[1] + read.at, address, read.nbytes, stream)

    def _recorded(self, device: torch.device) -> torch.cuda.Event:
        """An event that comes after all that was sent to a device."""
        unused, stream = self._events.setdefault(device, []), self._streams[device]
        event = unused.pop() if unused else torch.cuda.Event()  # type: ignore[no-untyped-call]
        if (
            self._driver is None
            or not event.cuda_event
            or not self._driver.record(event.cuda_event, stream.cuda_stream)
        ):
            event.record(stream)
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
        self._into = None
        self._stack.close()
