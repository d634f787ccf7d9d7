"""A device that is made up, for what reads to GPUs: it has the CPU's memory, and copies when it pleases, in order."""

import ctypes
import random
from collections import deque
from contextlib import contextmanager, nullcontext
from functools import partial

import torch

from kernelgraft.checkpoint import device, sending, streaming
from kernelgraft.checkpoint.streaming import StreamingLane
from leftovers import our_threads
from rings import open_rings

CPU = torch.device("cpu")


class Stream:
    """Work that waits until somebody waits for it, or a little longer."""

    random = random.Random(0)

    def __init__(self, device=CPU):
        self.cuda_stream = self
        self.waiting = deque()
        self.number_done = 0
        self.number_put = 0

    def put(self, work):
        self.waiting.append(work)
        self.number_put += 1

    def do(self, upto):
        while self.number_done < upto:
            self.waiting.popleft()()
            self.number_done += 1

    def synchronize(self):
        self.do(self.number_put)

    def wait_stream(self, other):
        other.synchronize()


class Event:
    cuda_event = 0

    def record(self, stream):
        self.cuda_event = self  # torch makes it only now
        self.stream, self.upto = stream, stream.number_put

    def query(self):
        stream = self.stream
        stream.do(min(stream.number_put, stream.number_done + stream.random.choice([0, 0, 1, 3])))
        return stream.number_done >= self.upto

    def synchronize(self):
        self.stream.do(self.upto)


class Driver:
    """Does what `kernelgraft.checkpoint.driver.Driver` does, and refuses some of it."""

    random = random.Random(0)

    def __init__(self, refuses=0.0):
        self.refuses = refuses
        self.copied = self.recorded = 0

    def _refused(self):
        return self.random.random() < self.refuses

    def copy(self, target, source, nbytes, stream):
        if self._refused():
            return False
        self.copied += 1
        stream.put(partial(ctypes.memmove, target, source, nbytes))
        return True

    def record(self, event, stream):
        if self._refused():
            return False
        self.recorded += 1
        event.record(stream)
        return True


@contextmanager
def made_up_device(monkeypatch, driver=None):
    """Within the block lanes read to it. Gives its streams, and sees in the end that the lanes left nothing behind."""
    made = []

    def stream(of):
        made.append(Stream(of))
        return made[-1]

    @contextmanager
    def register(address, nbytes, pinned, *, read_only):
        pinned.add(nbytes)
        yield
        assert not any(each.waiting for each in made)  # the device still reads it
        pinned.add(-nbytes)

    real = StreamingLane._send

    def send(lane, read, source):
        lane._enter(read.out.device)
        lane._streams[read.out.device].put(partial(real, lane, read, source))

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(device, "registered", register)
    monkeypatch.setattr(streaming, "registered", register)
    monkeypatch.setattr(streaming, "driver", lambda: driver)
    monkeypatch.setattr(StreamingLane, "_send", send)
    yield made
    assert sending.pinned.bytes == 0
    assert our_threads() == []
    assert open_rings() == 0
