"""Memory by the page: files mapped and looked up in the page cache, and fresh anonymous memory, as raw addresses."""

import ctypes
import mmap
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MADV_HUGEPAGE = 14
MADV_POPULATE_READ = 22
MADV_POPULATE_WRITE = 23
READ_CHUNK = 64 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

_FAILED = ctypes.c_void_p(-1).value


def _check(failed: bool, call: str) -> None:
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def map_file(path: str | Path) -> tuple[int, int]:
    """Map a whole file, shared and read-only: its address and size in bytes."""
    size = os.path.getsize(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    _check(address == _FAILED, "mmap")
    return address, size


def map_anonymous(size: int, *, huge: bool = False) -> int:
    """Fresh memory that nothing has touched, in huge pages if the kernel has them: its address."""
    address: int = _libc.mmap(
        None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
    )
    _check(address == _FAILED, "mmap")
    if huge:
        advise(address, size, MADV_HUGEPAGE)
    return address


def unmap(address: int, size: int) -> None:
    """Give a mapping back."""
    _check(_libc.munmap(address, size) != 0, "munmap")


def advise(address: int, size: int, advice: int) -> None:
    """As madvise(2); `address` is that of a page."""
    _check(_libc.madvise(address, size, advice) != 0, "madvise")


def buffer_at(address: int, size: int) -> Any:
    """Memory at an address as a buffer that can be written; nothing keeps it mapped."""
    return (ctypes.c_char * size).from_address(address)


# Linux hands free pages back 2 seconds after it finds some (`page_reporting_delay`), and then all that are free.
_REPORTING_S = 2.5


class Reserve:
    """Memory that is kept in use between measurements and is free during each, so that they find it warm.

    A virtual machine may hand free pages back to its host (free page reporting, within seconds, 2 MB at a time), and
    the first touch of such a page waits for the host: seen here as 8 s for 2 GB in huge pages, against 0.3 s for pages
    that were in use a moment before. That would measure the host, and another case each time.
    """

    def __init__(self, size: int, num_threads: int) -> None:
        self._size = size
        self._num_threads = num_threads
        self._address: int | None = None

    def hold(self) -> None:
        """Take the memory and touch all of it."""
        if not self._size or self._address is not None:
            return
        address = self._address = map_anonymous(self._size, huge=True)

        def touch(at: int) -> None:
            advise(address + at, min(READ_CHUNK, self._size - at), MADV_POPULATE_WRITE)

        with ThreadPoolExecutor(self._num_threads) as pool:
            list(pool.map(touch, range(0, self._size, READ_CHUNK)))

    def settle(self) -> None:
        """Wait until what was free a while ago has been handed back: what is released next is free for as long."""
        if self._size:
            time.sleep(_REPORTING_S)

    def release(self) -> None:
        """Let a measurement have it."""
        if self._address is not None:
            unmap(self._address, self._size)
            self._address = None


def resident_fraction(files: Iterable[Path]) -> float:
    """How much of the files' bytes lies in the page cache, from 0 to 1."""
    present = pages = 0
    for file in files:
        address, size = map_file(file)
        count = -(-size // mmap.PAGESIZE)
        vector = (ctypes.c_ubyte * count)()
        try:
            _check(_libc.mincore(address, size, vector) != 0, "mincore")
        finally:
            unmap(address, size)
        # Bit 0 says whether a page is resident; the others are reserved, and 0 on Linux.
        present += count - bytes(vector).count(0)
        pages += count
    return present / pages if pages else 1.0


def read_all(files: Iterable[Path], num_threads: int) -> None:
    """Read files from end to end, so that they lie in the page cache."""

    def read(file: Path, offset: int) -> None:
        with file.open("rb", buffering=0) as handle:
            handle.seek(offset)
            handle.readinto(bytearray(READ_CHUNK))

    with ThreadPoolExecutor(num_threads) as pool:
        jobs = [
            pool.submit(read, file, offset) for file in files for offset in range(0, file.stat().st_size, READ_CHUNK)
        ]
        for job in jobs:
            job.result()
