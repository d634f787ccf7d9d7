"""A device that is made up, for what reads to GPUs: it has the CPU's memory, and copies when it pleases, in order."""

import ctypes
import random
import threading
from collections import deque
from contextlib import contextmanager, nullcontext
from functools import partial

import torch

from kernelgraft.checkpoint import memory, sending, streaming
from kernelgraft.checkpoint.sending import DeviceLane
from leftovers import our_threads
from rings import open_rings

CPU = torch.device("cpu")


class OnDevice(torch.Tensor):
    """A tensor in the CPU's memory that says it is on a device of the test's choice: torch makes one on `cpu:1` too."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def empty(shape, device):
        made = torch.full(tuple(shape), torch.nan).as_subclass(OnDevice)
        made.is_on = device
        return made

    @property
    def device(self):
        return self.__dict__.get("is_on", CPU)


class Stream:
    """Work that waits until somebody waits for it, or a little longer."""

    random = random.Random(0)

    def __init__(self, device=CPU):
        self.device = device
        self.cuda_stream = self
        self.waiting = deque()
        self.number_done = 0
        self.number_put = 0

    def put(self, work, source):
        self.waiting.append((source, work))
        self.number_put += 1

    def do(self, upto):
        while self.number_done < upto:
            self.waiting[0][1]()
            self.waiting.popleft()
            self.number_done += 1

    def reads(self, low, high):
        """Whether something waits that comes from these addresses."""
        return any(low <= source < high for source, _ in list(self.waiting))

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

    def __init__(self, refuses=0.0):
        self.random = random.Random(0)
        self.refuses = refuses
        self.copied = self.recorded = 0

    def _refused(self):
        return self.random.random() < self.refuses

    def copy(self, target, source, nbytes, stream):
        if self._refused():
            return False
        self.copied += 1
        stream.put(partial(ctypes.memmove, target, source, nbytes), source)
        return True

    def record(self, event, stream):
        if self._refused():
            return False
        self.recorded += 1
        event.record(stream)
        return True


class Runtime:
    """What of CUDA's runtime registers memory: each page once, and until no copy from it waits any more.

    Attributes:
        asked: The address, the bytes and the flags of each registration that was asked for.
        refuses: How often it takes no pages of files.
    """

    def __init__(self, streams):
        self.random = random.Random(0)
        self.asked = []
        self.refuses = 0.0
        self._streams = streams
        self._registered = {}
        self._lock = threading.Lock()

    def cudaHostRegister(self, address, nbytes, flags):
        with self._lock:
            self.asked.append((address, nbytes, flags))
            if flags and self.random.random() < self.refuses:
                return 1  # cudaErrorInvalidValue
            if any(low < address + nbytes and address < low + size for low, size in self._registered.items()):
                return 712  # cudaErrorHostMemoryAlreadyRegistered
            self._registered[address] = nbytes
            return 0

    def cudaHostUnregister(self, address):
        with self._lock:
            nbytes = self._registered.pop(address)
        assert not any(each.reads(address, address + nbytes) for each in self._streams)

    def cudaGetErrorString(self, error):
        return f"error {error}"


@contextmanager
def made_up_device(monkeypatch, driver=None):
    """Within the block lanes read to it. Gives its streams, and sees in the end that the lanes left nothing behind."""
    made = []

    def stream(of):
        made.append(Stream(of))
        return made[-1]

    real, runtime, now = DeviceLane._send, Runtime(made), threading.local()

    def send(lane, read, source):
        def late():
            # The lane is somewhere else by now; that it was in the right place then is seen below.
            before = lane._current, now.stream
            lane._current = None
            real(lane, read, source)
            lane._current, now.stream = before

        lane._enter(read.out.device)
        assert now.stream is lane._streams[read.out.device]
        now.stream.put(late, source.data_ptr())

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(now, "stream", stream))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: getattr(now, "stream", None))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(memory, "_forget_error", lambda: None)
    monkeypatch.setattr(streaming, "driver", lambda: driver)
    monkeypatch.setattr(DeviceLane, "_send", send)
    yield made
    assert sending.pinned.bytes == 0
    assert our_threads() == []
    assert open_rings() == 0
