"""A ring of reads with the kernel: what it gives, what stops it, and what is left when it is closed."""

import ctypes
import errno
import mmap
import os
import random
import threading
import time

import pytest

from forked import forked
from kernelgraft.checkpoint import ring
from kernelgraft.checkpoint.ring import Ring, RingError
from rings import io_workers, needs_a_ring, open_rings, ring_of

KB = 1 << 10


class Buffer:
    """Memory for reads, all ones before."""

    def __init__(self, nbytes, flags=mmap.MAP_SHARED):
        self.memory = mmap.mmap(-1, nbytes, flags)
        self.memory.write(b"\x01" * nbytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


@pytest.fixture
def file(tmp_path):
    """An open file, and what it holds."""
    data = random.Random(0).randbytes(4 << 20)
    (tmp_path / "file").write_bytes(data)
    with open(tmp_path / "file", "rb") as opened:
        yield opened.fileno(), data


def results(ring, count):
    found = {}
    while len(found) < count:
        ring.enter(1)
        found |= dict(ring.completed())
    assert not ring.completed()
    return found


@needs_a_ring
@pytest.mark.parametrize("reorders", [False, True])
@pytest.mark.parametrize("nbytes", [1, 4095, 4097, 64 * KB, 300 * KB + 7])
def test_reads_give_the_bytes_of_the_file(file, nbytes, reorders, monkeypatch):
    monkeypatch.setattr(ring, "_LOADS_PASS_LOADS", reorders or ring._LOADS_PASS_LOADS)
    fd, data = file
    granted, buffer = ring_of(5), Buffer(8 * nbytes)
    assert granted.entries == granted.room == 8
    for round_number in range(7):  # the counters go around
        offsets = [nbytes * index + round_number for index in range(8)]
        for index, offset in enumerate(offsets):
            granted.read(fd, buffer.address + index * nbytes, nbytes, offset, 100 + index)
        assert granted.room == 0
        assert results(granted, 8) == {100 + index: nbytes for index in range(8)}
        assert buffer.memory[:] == b"".join(data[offset : offset + nbytes] for offset in offsets)
    granted.close()


@needs_a_ring
def test_the_end_of_a_file_and_errors_are_results(file, tmp_path):
    fd, data = file
    granted, buffer = Ring(4), Buffer(100)
    with open(tmp_path / "other", "wb") as other:
        granted.read(fd, buffer.address, 100, len(data) - 10, 1)
        granted.read(fd, buffer.address, 100, len(data), 2)
        granted.read(other.fileno(), buffer.address, 100, 0, 3)
        granted.read(fd, 0, 100, 0, 4)
        assert results(granted, 4) == {1: 10, 2: 0, 3: -errno.EBADF, 4: -errno.EFAULT}
    granted.close()


@needs_a_ring
def test_closing_waits_for_what_the_kernel_reads(file):
    fd, data = file
    for _ in range(20):
        granted, buffer = ring_of(64), Buffer(64 * 64 * KB)
        for index in range(63):
            granted.read(fd, buffer.address + index * 64 * KB, 64 * KB, index * 64 * KB, index)
        granted.enter()
        granted.read(fd, buffer.address + 63 * 64 * KB, 64 * KB, 0, 63)  # only queued
        granted.close()
        assert buffer.memory[: 63 * 64 * KB] == data[: 63 * 64 * KB]
        assert set(buffer.memory[63 * 64 * KB :]) == {1}
        granted.close()
    assert open_rings() == 0


@needs_a_ring
@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_threads_of_the_kernel_read_than_may(file, workers):
    fd, _ = file
    seen = []

    granted, buffer = Ring(32), Buffer(32 * 512 * KB)

    def work():
        granted.limit(workers)
        for number in range(300):
            while not granted.room:
                granted.enter(1)
                granted.completed()
            granted.read(fd, buffer.address + number % 32 * 512 * KB, 512 * KB, number % 7 * 512 * KB, number)
            granted.enter()
            seen.append(io_workers(threading.get_native_id()))
        granted.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert 0 < max(seen) <= workers
    end = time.monotonic() + 10
    while io_workers(thread.native_id) and time.monotonic() < end:
        time.sleep(0.01)
    assert io_workers(thread.native_id) == 0


# --- what interrupts


def interrupting(monkeypatch, error):
    """Every other time that the ring is entered it fails, before anything is done."""
    real, entered = ring._call, []

    def call(number, *arguments, **options):
        if number == ring._ENTER:
            entered.append(number)
            if len(entered) % 2:
                raise OSError(error, os.strerror(error))
        return real(number, *arguments, **options)

    monkeypatch.setattr(ring, "_call", call)
    return entered


@needs_a_ring
def test_signals_do_not_lose_reads(file, monkeypatch):
    fd, data = file
    granted, buffer = ring_of(32), Buffer(17 * 64 * KB)
    entered = interrupting(monkeypatch, errno.EINTR)
    for index in range(17):
        granted.read(fd, buffer.address + index * 64 * KB, 64 * KB, index * 64 * KB, index)
        granted.enter()
    # The last read was not handed over, so to wait for it enters once more at least.
    assert results(granted, 17) == dict.fromkeys(range(17), 64 * KB)
    assert buffer.memory[:] == data[: 17 * 64 * KB]
    granted.close()
    assert len(entered) > 17


@needs_a_ring
def test_a_kernel_without_memory_gets_reads_later(file, monkeypatch):
    fd, data = file
    granted, buffer = ring_of(8), Buffer(8 * 64 * KB)
    granted.read(fd, buffer.address, 64 * KB, 0, 0)
    granted.enter()
    interrupting(monkeypatch, errno.EAGAIN)
    for index in range(1, 8):
        granted.read(fd, buffer.address + index * 64 * KB, 64 * KB, index * 64 * KB, index)
    granted.enter()
    assert (granted.under_way, granted.room) == (1, 0)
    granted.enter()
    assert (granted.under_way, granted.room) == (8, 0)
    monkeypatch.undo()
    assert len(results(granted, 8)) == 8
    assert buffer.memory[:] == data[: 8 * 64 * KB]
    granted.close()


@needs_a_ring
def test_a_kernel_without_memory_for_any_read_is_an_error(file, monkeypatch):
    granted, buffer = Ring(8), Buffer(8)
    interrupting(monkeypatch, errno.EAGAIN)
    granted.read(file[0], buffer.address, 8, 0, 0)
    with pytest.raises(RingError, match=r"takes no reads: .*temporarily"):
        granted.enter(1)
    granted.close()


@needs_a_ring
def test_a_ring_that_cannot_be_waited_for_keeps_what_it_has(file, monkeypatch):
    fd, _ = file
    granted, buffer = Ring(8), Buffer(1 << 20)
    granted.read(fd, buffer.address, 1 << 20, 0, 0)
    granted.enter()
    monkeypatch.setattr(Ring, "under_way", 1)
    interrupting(monkeypatch, errno.EBADF)
    granted._word[granted._cq_head] = granted._word[granted._cq_tail]
    with pytest.raises(RingError, match="cannot be waited for"):
        granted.close()
    assert open_rings() > 0
    monkeypatch.undo()
    granted.close()
    assert open_rings() == 0


# --- forks


@needs_a_ring
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_disturbs_no_reads_and_has_rings_of_its_own(file):
    fd, data = file

    def read_all(granted, buffer):
        assert results(granted, 64) == dict.fromkeys(range(64), 64 * KB)
        assert buffer.memory[:] == data[: 64 * 64 * KB]
        granted.close()

    def begin():
        granted, buffer = ring_of(64), Buffer(64 * 64 * KB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for index in range(64):
            granted.read(fd, buffer.address + index * 64 * KB, 64 * KB, index * 64 * KB, index)
        granted.enter()
        return granted, buffer

    for _ in range(5):
        granted, buffer = begin()
        assert forked(lambda: read_all(*begin())) == "done"  # while the first is read
        read_all(granted, buffer)
    assert open_rings() == 0


@needs_a_ring
def test_a_ring_that_nobody_closes_gives_its_descriptor_back():
    granted = Ring(4)
    assert open_rings() > 0
    del granted
    assert open_rings() == 0


@needs_a_ring
@pytest.mark.parametrize("reorders", [False, True])
def test_only_what_waits_gives_the_interpreter_up(file, reorders, monkeypatch):
    monkeypatch.setattr(ring, "_LOADS_PASS_LOADS", reorders)
    granted, buffer, seen, real = ring_of(4), Buffer(4 * KB), [], ring._call

    def call(number, *arguments, keep=False):
        seen.append(((arguments[1], arguments[2]), keep))
        return real(number, *arguments, keep=keep)

    monkeypatch.setattr(ring, "_call", call)
    granted.read(file[0], buffer.address, KB, 0, 1)
    granted.enter()
    granted.enter(1)
    # By giving it up and taking it back loads are put in order, where machines do not.
    assert seen == [((1, 0), not reorders), ((0, 1), False)]
    assert granted.completed() == [(1, KB)]
    assert seen[2:] == ([((0, 0), False)] if reorders else [])


@needs_a_ring
def test_a_limit_that_is_refused_is_an_error(monkeypatch):
    granted = Ring(4)

    def call(*_, **__):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with monkeypatch.context() as patch:
        patch.setattr(ring, "_call", call)
        with pytest.raises(RingError, match=r"threads cannot be limited to 3: .*Invalid argument"):
            granted.limit(3)
    granted.close()


@needs_a_ring
def test_a_program_that_is_started_does_not_get_the_ring():
    granted = Ring(4)
    assert not os.get_inheritable(granted._fd)
    granted.close()
