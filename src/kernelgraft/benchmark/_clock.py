"""How long a call takes, and what the machine can do at most."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from kernelgraft.benchmark.report import Machine, Timing

Call = Callable[[], Any]

COPIED = {"cuda": 2**28, "cpu": 2**26}
"""Bytes of the copy that shows the bandwidth: more than caches hold."""

MATRIX_DIM = {"cuda": 8192, "cpu": 512}
"""Rows and columns of the matrices whose product shows the matrix rate: enough work to keep the device busy."""

_PAIRS = 4
"""Copies, the best of which counts: one was at 3.68 TB/s in some processes on an H200 that showed 4.17 in others."""

_RUNS = 7


class Clock:
    """Times calls on one device.

    On CUDA a buffer of twice the L2 cache is written before each call, so that it finds the cache cold, and events on
    the stream stand around it. On the CPU caches are as the call before left them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        self._written = torch.empty(0)
        self._ms_of_write = 0.0
        if self.is_cuda:
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self._written = torch.empty(size, dtype=torch.uint8, device=device)
            self._ms_of_write = statistics.median(self._between_events(self._written.zero_) for _ in range(_RUNS))

    def close(self) -> None:
        """Give the buffer back."""
        self._written = torch.empty(0)

    def milliseconds(self, call: Call, writes: int) -> float:
        """How long a call takes.

        Args:
            call: What is timed.
            writes: How often the buffer is written before. While the device does so, the host gets ahead of it, and
                what the host takes to launch the call's kernels does not show. With 0 it is written once and waited
                for, so that it does show.
        """
        if not self.is_cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        for _ in range(max(writes, 1)):
            self._written.zero_()
        if not writes:
            torch.cuda.synchronize(self.device)
        return self._between_events(call)

    def _between_events(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return float(start.elapsed_time(end))

    def writes_ahead_of(self, call: Call) -> int:
        """How many writes take longer than the host does to launch a call, with as much again to spare."""
        if not self.is_cuda:
            return 0
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call()
        milliseconds = 1e3 * (time.perf_counter() - start)
        torch.cuda.synchronize(self.device)
        return 1 + math.ceil(2 * milliseconds / self._ms_of_write)

    def peak(self, call: Call) -> int | None:
        """The bytes that a call has allocated at most over what there was before; `None` on the CPU."""
        if not self.is_cuda:
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def machine(self, dtype: torch.dtype) -> Machine:
        """What the device does at most: a large copy, and a large product of matrices in `dtype`, either way round."""
        nbytes = COPIED[self.device.type]
        tensors = [torch.zeros(nbytes, dtype=torch.uint8, device=self.device) for _ in range(_PAIRS + 1)]
        copy = min(self._median(partial(tensors[at].copy_, tensors[at + 1])) for at in range(_PAIRS))
        del tensors
        dim = MATRIX_DIM[self.device.type]
        # Not zeros: a GPU multiplies those with less power, and so at a higher clock.
        left, right = (torch.randn(dim, dim, device=self.device).to(dtype) for _ in range(2))
        # As it stands, and transposed as in a linear layer: a CPU may have a fast way for one of them alone.
        product = min(self._median(lambda: left @ right), self._median(lambda: left @ right.mT))
        return Machine(
            copy_bandwidth=2 * nbytes / (copy / 1e3),
            matrix_rate=2 * dim**3 / (product / 1e3),
            matrix_dtype=str(dtype).removeprefix("torch."),
            cold_cache=self._written.nbytes if self.is_cuda else 0,
        )

    def _median(self, call: Call) -> float:
        call()
        return statistics.median(self.milliseconds(call, 1) for _ in range(_RUNS))


@contextmanager
def clock_on(device: torch.device) -> Iterator[Clock]:
    """A clock on a device, whose memory is free again afterwards, and what the block allocated with it."""
    if device.type == "cpu":
        yield Clock(device)
        return
    with torch.cuda.device(device):
        clock = Clock(device)
        try:
            yield clock
        finally:
            clock.close()
            gc.collect()  # modules and their slots know each other
            torch.cuda.empty_cache()


def timing(milliseconds: list[float], peak: int | None) -> Timing:
    """The figures of repeated runs."""
    ordered = sorted(milliseconds)
    return Timing(_quantile(ordered, 0.5), _quantile(ordered, 0.2), _quantile(ordered, 0.8), peak)


def _quantile(ordered: list[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
