"""Copies and events that a thread enqueues on CUDA devices while it keeps the interpreter.

Torch gives the interpreter up for each view, each copy and each event. Where another thread works in Python, it is
had back after `sys.getswitchinterval()`, and a thread that sends 4 MB at a time comes to 0.2 GB/s that way. These calls
take microseconds: by the driver's own library they are made without giving anything up.
"""

import ctypes
from functools import cache

import torch


class Driver:
    """The driver's library. A call that it refuses has done nothing, and torch, asked the same, says why or can."""

    def __init__(self) -> None:
        """Find the library.

        Raises:
            OSError: It is not there.
        """
        library = ctypes.PyDLL("libcuda.so.1")
        self._copy = library.cuMemcpyHtoDAsync_v2
        self._copy.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        self._record = library.cuEventRecord
        self._record.argtypes = [ctypes.c_void_p, ctypes.c_void_p]

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> bool:
        """Enqueue a copy from pinned host memory to memory of the device that the thread works on.

        Args:
            target: Where to.
            source: Where from; what is not pinned would be copied at once, by the CPU.
            nbytes: How many bytes.
            stream: A stream's `cuda_stream`.

        Returns:
            Whether it was done.
        """
        return bool(self._copy(target, source, nbytes, stream) == 0)

    def record(self, event: int, stream: int) -> bool:
        """Enqueue an event: its `cuda_event`, which it has once torch has recorded it, and a stream's `cuda_stream`.

        Returns:
            Whether it was done.
        """
        return bool(self._record(event, stream) == 0)


@cache
def driver() -> Driver | None:
    """The driver's library, where torch works with it."""
    if torch.version.cuda is None:
        return None
    try:
        return Driver()
    except (OSError, AttributeError):
        return None
