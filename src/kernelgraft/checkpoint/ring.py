"""Positioned reads that the kernel's own threads carry out, many at a time, for one thread of ours: Linux's io_uring.

The layout of what the kernel shares, and the numbers, are those of `linux/io_uring.h`. They are the same on x86-64, on
aarch64 and on every machine that Linux has come to since.
"""

import ctypes
import errno
import mmap
import os
import platform
import struct
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from typing import Any

from kernelgraft.errors import CheckpointError

_SETUP, _ENTER, _REGISTER = 425, 426, 427
_MAX_WORKERS = 19  # IORING_REGISTER_IOWQ_MAX_WORKERS, of Linux 5.15
_GETEVENTS = 1  # IORING_ENTER_GETEVENTS
_READ = 22  # IORING_OP_READ
# IOSQE_ASYNC: a thread of the kernel reads. Otherwise `enter` itself would copy what is in the page cache.
_ASYNC = 1 << 4

_SQES_OFFSET = 0x10000000  # IORING_OFF_SQES
_PARAMS_SIZE, _SQ_PARAMS, _CQ_PARAMS = 120, 40, 80  # io_uring_params, and where its sq_off and cq_off begin
_SQE = struct.Struct("=BBHiQQIIQ24x")  # opcode, flags, ioprio, fd, off, addr, len, rw_flags, user_data
_CQE = struct.Struct("=QiI")  # user_data, res, flags
_U32 = 0xFFFFFFFF

_LOADS_PASS_LOADS = platform.machine() not in ("x86_64", "AMD64")


class RingError(CheckpointError):
    """The kernel, or what confines this process, does not grant a ring."""


class Ring:
    """A queue of reads to the kernel and one of their results back; one thread uses it.

    How far reads have come is known from the four counters that the kernel shares, and from nothing else: whatever
    interrupts a method, they stay true.

    Attributes:
        entries: How many reads may be on their way at once: queued, with the kernel, or ended and not yet `completed`.
    """

    # What makes plain loads and stores do, where the kernel's header asks for acquire and release:
    # - What is queued is read by this same thread, inside `enter`: a thread sees its own stores in order.
    # - The tail of what has ended may move at any time, by another core. x86 keeps loads in order. Elsewhere, between
    #   the load of the tail and the loads of what lies before it, stands one more `enter`: there ctypes gives the
    #   interpreter up before it and takes it again afterwards, a release and an acquire, which no load passes.
    # - That our head moves before its entries were loaded does no harm: there are twice as many places for results as
    #   reads may be on their way, so the kernel never comes near what we have not taken.

    def __init__(self, entries: int) -> None:
        """Set a ring up.

        Args:
            entries: At least so many entries; the kernel takes the next power of two.

        Raises:
            RingError: It is not granted: not by kernels before 5.15, nor where the administrator has switched io_uring
                off, a container's filter of system calls refuses it, or there is no descriptor left, or no memory
                (Linux counts it as locked in some versions).
        """
        if sys.platform != "linux":
            raise RingError("io_uring is Linux's.")
        with ExitStack() as stack:
            try:
                self._set_up(entries, stack)
            except OSError as error:
                raise RingError(f"io_uring cannot be used: {error}") from error
            self._stack = stack.pop_all()

    def _set_up(self, entries: int, stack: ExitStack) -> None:
        params = ctypes.create_string_buffer(_PARAMS_SIZE)
        self._fd = _call(_SETUP, entries, params)
        # A ring that nobody came to use, and so nobody closes, gives its descriptor back nevertheless.
        finalizer = weakref.finalize(self, os.close, self._fd)
        finalizer.atexit = False
        stack.callback(finalizer)
        sizes: tuple[int, int] = struct.unpack_from("=2I", params)
        self.entries, num_results = sizes
        self._sq_head, self._sq_tail, sq_mask, _, _, _, sq_array = _words("=7I", params, _SQ_PARAMS)
        self._cq_head, self._cq_tail, cq_mask, _, _, cqes = _words("=6I", params, _CQ_PARAMS)
        self._cqes = cqes * 4
        size = max(sq_array * 4 + self.entries * 4, self._cqes + num_results * _CQE.size)
        self._shared = stack.enter_context(_mapped(self._fd, size, 0))
        self._sqes = stack.enter_context(_mapped(self._fd, self.entries * _SQE.size, _SQES_OFFSET))
        words = stack.enter_context(memoryview(self._shared))
        self._word = stack.enter_context(words[: size // 4 * 4].cast("I"))
        self._sq_mask, self._cq_mask = self._word[sq_mask], self._word[cq_mask]
        for index in range(self.entries):
            self._word[sq_array + index] = index
        # What refuses one of the other calls alone is found out here; both do nothing.
        self._limit(0)
        _call(_ENTER, self._fd, 0, 0, _GETEVENTS, None, 0)

    def limit(self, workers: int) -> None:
        """Say how many of the kernel's threads may read for the calling thread (on each NUMA node, in older kernels).

        It holds for every ring of the thread, and of the one that made this ring, and outlasts the ring.

        Raises:
            RingError: The kernel refuses.
        """
        try:
            self._limit(workers)
        except OSError as error:
            raise RingError(f"io_uring's threads cannot be limited to {workers}: {error}") from error

    def _limit(self, workers: int) -> None:
        # Reads of files count as bounded work, but those that are asynchronous from the start as unbounded.
        _call(_REGISTER, self._fd, _MAX_WORKERS, (ctypes.c_uint * 2)(workers, workers), 2)

    @property
    def room(self) -> int:
        """How many more reads can be queued."""
        return self.entries - ((self._word[self._sq_tail] - self._word[self._cq_head]) & _U32)

    @property
    def under_way(self) -> int:
        """How many reads the kernel has taken that `completed` has not given back."""
        return (self._word[self._sq_head] - self._word[self._cq_head]) & _U32

    def read(self, fd: int, address: int, nbytes: int, offset: int, tag: int) -> None:
        """Queue a read of a file into memory, which must stay until `completed` gives the tag; there must be `room`."""
        word = self._word
        tail = word[self._sq_tail]
        at = (tail & self._sq_mask) * _SQE.size
        _SQE.pack_into(self._sqes, at, _READ, _ASYNC, 0, fd, offset, address, nbytes, 0, tag)
        word[self._sq_tail] = (tail + 1) & _U32

    def enter(self, least: int = 0) -> None:
        """Hand over what is queued, and wait until there are `least` results; signals may end it before.

        Where nothing is waited for the thread keeps the interpreter: it takes microseconds, and to have it back from a
        thread that works in Python takes `sys.getswitchinterval()`.

        Raises:
            RingError: The kernel refuses, or has no memory for any read.
        """
        queued = (self._word[self._sq_tail] - self._word[self._sq_head]) & _U32
        keep = not least and not _LOADS_PASS_LOADS
        try:
            _call(_ENTER, self._fd, queued, least, _GETEVENTS, None, 0, keep=keep)
        except InterruptedError:
            return
        except BlockingIOError as error:
            # No memory for one more read: when others have ended there is, and it is still queued.
            if not self.under_way:
                raise RingError(f"io_uring takes no reads: {error}") from error
            if least:
                self._wait()
        except OSError as error:
            raise RingError(f"io_uring cannot be entered: {error}") from error

    def _wait(self) -> None:
        """Wait for one result, and hand nothing over; signals may end it before."""
        try:
            _call(_ENTER, self._fd, 0, 1, _GETEVENTS, None, 0)
        except InterruptedError:
            return
        except OSError as error:
            raise RingError(f"io_uring cannot be waited for: {error}") from error

    def completed(self) -> list[tuple[int, int]]:
        """Reads that have ended, each once: the tag, and how many bytes were read, or the negative of an errno."""
        head, tail = self._word[self._cq_head], self._word[self._cq_tail]
        if head == tail:
            return []
        if _LOADS_PASS_LOADS:
            self.enter()
        found = []
        while head != tail:
            tag, result, _ = _CQE.unpack_from(self._shared, self._cqes + (head & self._cq_mask) * _CQE.size)
            found.append((tag, result))
            head = (head + 1) & _U32
        self._word[self._cq_head] = head
        return found

    def close(self) -> None:
        """Wait until no read writes to memory any more, and give everything back. What was only queued is not read.

        Raises:
            RingError: It cannot be waited for. Then nothing was given back, and the memory must stay.
        """
        if self._fd < 0:
            return
        while self.under_way:
            if self._word[self._cq_head] == self._word[self._cq_tail]:
                self._wait()
            self._word[self._cq_head] = self._word[self._cq_tail]
        self._fd = -1
        self._stack.close()


def ring_for_another(entries: int) -> Ring:
    """A ring for another thread than the calling one, which the kernel will not connect with it.

    It connects a ring with the thread that makes it: what that other thread says by `limit` would hold for all rings of
    the calling one too. So a thread makes it that ends at once.

    Raises:
        RingError: See `Ring`.
    """
    with ThreadPoolExecutor(1) as maker:
        return maker.submit(Ring, entries).result()


def _words(layout: str, params: Any, at: int) -> list[int]:
    """Offsets in the shared memory as indices of 4-byte words."""
    return [offset // 4 for offset in struct.unpack_from(layout, params, at)]


def _mapped(fd: int, size: int, offset: int) -> mmap.mmap:
    return mmap.mmap(fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)


def _call(number: int, *arguments: Any, keep: bool = False) -> int:
    """A system call that the C library has no name for.

    Args:
        number: Its number.
        *arguments: Its arguments.
        keep: Whether the thread keeps the interpreter meanwhile.

    Raises:
        OSError: It fails.
    """
    result: int = _libc(keep).syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{errno.errorcode.get(code, code)}, {os.strerror(code)}")
    return result


@cache
def _libc(keep: bool) -> Any:
    return (ctypes.PyDLL if keep else ctypes.CDLL)(None, use_errno=True)
