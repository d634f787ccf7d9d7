"""Bytes on their way before the load knows all of what it will do with them.

Beside its bytes a load has to build the model, lead names through Transformers' rules, plan the graft and prove it. In
that time, a third of a second for an 8B model that a GPU could have in two, nothing would be read. What most tensors of
a checkpoint become is plain as soon as the model is built: the parameter of the same name, shape and dtype. These are
read while all else is found out. If the load then wants something else of one of them, what was read is let go.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from kernelgraft.checkpoint.device import reserve, synchronize
from kernelgraft.checkpoint.files import Checkpoint, FileTensor
from kernelgraft.checkpoint.header import KINDS
from kernelgraft.checkpoint.memory import fresh
from kernelgraft.checkpoint.reader import Reading, first_lanes, more_lanes, reads_in_order
from kernelgraft.checkpoint.requests import Read
from kernelgraft.conversion.lazy import LazyTensor

# A thread that computes in Python lets another one in only every 5 ms, and one that reads comes back for its next piece
# more often than that. Of what it read from the page cache beside an idle main thread (8.0 GB/s, two threads, 8 MB
# pieces), 0.7 GB/s were left beside a busy one, 3.3 with 0.5 ms and 4.6 with 0.1 ms, at which the busy one took 1.5
# times as long (two cores, Python 3.11, 2026-11-28).
_SWITCH_INTERVAL_S = 1e-4


class ReadAhead:
    """Whole tensors of a checkpoint, each on its way into a tensor of its own.

    Attributes:
        checkpoint: The checkpoint.
        candidates: Names of the tensors that may be read ahead.
        on_cuda: Whether they go to devices of CUDA.
    """

    def __init__(
        self, checkpoint: Checkpoint, parameters: Mapping[str, torch.Tensor], device_of: Callable[[str], torch.device]
    ) -> None:
        """Find what may be read ahead; nothing is read yet.

        Args:
            checkpoint: The opened checkpoint, which must stay open until this ends.
            parameters: What the model will have on the devices in question, by name; only shape and dtype matter.
            device_of: Which device each goes to: all are CUDA's, or none is.
        """
        self.checkpoint = checkpoint
        self._devices = {name: exact(device_of(name)) for name in parameters}
        self.on_cuda = any(device.type == "cuda" for device in self._devices.values())
        self.candidates = {
            name
            for name, parameter in parameters.items()
            if name in checkpoint and _fits(checkpoint.source(name), parameter)
        }
        self._nbytes = dict.fromkeys(self._devices.values(), 0)
        for name, parameter in parameters.items():
            self._nbytes[self._devices[name]] += parameter.nbytes
        self._tensors: dict[FileTensor, torch.Tensor] = {}
        self._reading: Reading | None = None

    def add(self, names: Iterable[str]) -> None:
        """Begin to read those of these tensors that are candidates and not on their way yet."""
        sources = [self.checkpoint.source(name) for name in names if name in self.candidates]
        sources = [source for source in sources if source not in self._tensors]
        if not sources:
            return
        if self._reading is None:
            reserve(self._nbytes)
        jobs = []
        for source in sources:
            out = self._tensors[source] = fresh(source.shape, source.dtype, self._devices[source.name])
            jobs.append((LazyTensor.of(source), out))
        synchronize(self._nbytes)
        if self._reading is None:
            self._reading = Reading()
            _switching.often()
            self._reading.start(first_lanes(self._nbytes, on_cuda=self.on_cuda))
        self._reading.add(reads_in_order(jobs, on_cuda=self.on_cuda))

    def tensor_for(self, lazy: LazyTensor) -> torch.Tensor | None:
        """The tensor that has, or will have when this ends, what a lazy tensor stands for; each is given once."""
        source = lazy.whole_source
        if not isinstance(source, FileTensor) or source not in self._tensors:
            return None
        out = self._tensors[source]
        if (out.dtype, out.device) != (lazy.dtype, exact(lazy.device)):
            return None
        del self._tensors[source]
        return out.view(lazy.shape)

    @property
    def nbytes_left(self) -> int:
        """How many bytes wait to be read."""
        return 0 if self._reading is None else self._reading.nbytes_left

    def finish(self, reads: Sequence[Read], on_progress: Callable[[int], None] | None) -> int:
        """Carry out what waits, and more reads, with all threads that there are for it; see `Reading.finish`."""
        reading = self._reading or Reading()
        reading.on_progress = on_progress
        try:
            reading.add(reads)
            if self._reading is None:
                reading.start(first_lanes(self._nbytes, on_cuda=self.on_cuda))
            reading.start(more_lanes(self._nbytes, on_cuda=self.on_cuda))
            return reading.finish()
        finally:
            self.close()

    def close(self) -> None:
        """Stop, and let go what was not asked for."""
        if self._reading is not None:
            reading, self._reading = self._reading, None
            _switching.as_before()
            reading.stop()
        self._tensors = {}


def exact(device: torch.device) -> torch.device:
    """A device as tensors on it name it: `cuda` is the current one."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _fits(source: FileTensor, parameter: torch.Tensor) -> bool:
    kind = KINDS[source.entry.kind][1]
    return (source.shape, kind) == (parameter.shape, parameter.dtype) and parameter.numel() > 0


class _Switching:
    """How often the interpreter switches threads, which is one setting for the process, whoever reads ahead in it."""

    def __init__(self) -> None:
        self._users = 0
        self._before = 0.0
        self._lock = threading.Lock()

    def often(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = sys.getswitchinterval()
                sys.setswitchinterval(min(self._before, _SWITCH_INTERVAL_S))
            self._users += 1

    def as_before(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                sys.setswitchinterval(self._before)


_switching = _Switching()
