"""Memory by address: fresh memory that is cheap to fill, mapped files, and pages that the driver can read by itself."""

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from kernelgraft.conversion.moves import contiguous_strides
from kernelgraft.errors import CheckpointError

PAGE = mmap.PAGESIZE

# First touch of small pages costs more than the copy into them. Below two huge pages there is nothing to gain.
_HUGE = 2 << 20
_HUGE_FROM = 2 * _HUGE
_MADV_HUGEPAGE = 14

# `cudaHostRegisterReadOnly`: the pages of a file mapped for reading cannot be pinned for writing.
_REGISTER_READ_ONLY = 8


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialized tensor that will be filled once, in huge pages where the system has them.

    These begin at multiples of their size, and so does the tensor, or its ends would be small pages: parameters of 17
    and 50 MB, 1.9 GB in all, were read in 0.22 s instead of 0.33 (two cores, Linux 6.18, 2026-11-28, medians of 4, in
    turn).
    """
    size = torch.Size(shape)
    nbytes = size.numel() * dtype.itemsize
    if device.type != "cpu" or nbytes < _HUGE_FROM:
        return torch.empty(size, dtype=dtype, device=device)
    room = torch.UntypedStorage(nbytes + _HUGE)  # type: ignore[no-untyped-call]
    start = -room.data_ptr() % _HUGE
    storage = room[start : start + nbytes]
    advise_huge(storage.data_ptr(), nbytes)
    return torch.empty(0, dtype=dtype).set_(storage, 0, size, contiguous_strides(size))


def advise_huge(address: int, nbytes: int) -> None:
    """Ask for huge pages for memory that nothing has touched. It is a hint: without any, small pages serve."""
    if sys.platform == "linux":
        start, stop = -(-address // PAGE) * PAGE, (address + nbytes) // PAGE * PAGE
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_HUGEPAGE)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage of a tensor as a flat uint8 tensor."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))


def writable(tensor: torch.Tensor) -> memoryview:
    """The storage of a CPU tensor as a writable buffer; it does not keep the tensor alive."""
    storage = tensor.untyped_storage()
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


class Mapped:
    """A range of memory of our own, as a uint8 tensor: a file mapped for reading, or anonymous pages."""

    def __init__(self, nbytes: int, fd: int | None = None) -> None:
        """Map `nbytes` of the open file `fd`, shared and read-only; anonymous private memory without one."""
        protection = mmap.PROT_READ if fd is not None else mmap.PROT_READ | mmap.PROT_WRITE
        flags = mmap.MAP_SHARED if fd is not None else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = _libc().mmap(None, nbytes, protection, flags, -1 if fd is None else fd, 0)
        if address == ctypes.c_void_p(-1).value:
            raise CheckpointError(f"{nbytes} bytes cannot be mapped (errno {ctypes.get_errno()}).")
        self.address: int = address
        self.nbytes = nbytes
        # Read-only pages too are given as writable, or torch warns; nothing writes them.
        self.bytes = torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=torch.uint8)

    def close(self) -> None:
        """Unmap; tensors over it must be gone."""
        del self.bytes
        _libc().munmap(ctypes.c_void_p(self.address), ctypes.c_size_t(self.nbytes))


class Pinned:
    """How much host memory is registered with the driver at the moment, and how much it was at most."""

    def __init__(self) -> None:
        self.bytes = 0
        self.peak_bytes = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """Count bytes that were registered, or, if negative, given back."""
        with self._lock:
            self.bytes += nbytes
            self.peak_bytes = max(self.peak_bytes, self.bytes)


class RegistrationError(Exception):
    """The driver does not take these pages; the caller goes another way."""


@contextmanager
def registered(address: int, nbytes: int, pinned: Pinned, *, read_only: bool) -> Iterator[None]:
    """Within the block the device reads these pages by itself. Copies must have ended when it is left.

    Raises:
        RegistrationError: The driver refuses.
    """
    if nbytes == 0:
        yield
        return
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = runtime.cudaHostRegister(address, nbytes, _REGISTER_READ_ONLY if read_only else 0)
    if int(error):
        _forget_error()
        raise RegistrationError(f"cudaHostRegister of {nbytes} bytes: {runtime.cudaGetErrorString(error)}")
    pinned.add(nbytes)
    try:
        yield
    finally:
        pinned.add(-nbytes)
        runtime.cudaHostUnregister(address)


def _forget_error() -> None:
    """The runtime keeps the last error until somebody asks; the next launch would raise it."""
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError:
        return


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    return libc
