"""Pieces that a ring fills from files: their bytes, whatever the reads, and what stops them."""

import errno
import os
import random
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft.checkpoint import pieces
from kernelgraft.checkpoint.pieces import Pieces
from kernelgraft.checkpoint.ring import Ring, RingError
from kernelgraft.errors import CheckpointError
from rings import needs_a_ring, open_rings, ring_of

pytestmark = needs_a_ring


class File:
    """A file of random bytes that is open."""

    def __init__(self, path, nbytes, seed=0):
        self.path = path
        self.data = random.Random(seed).randbytes(nbytes)
        path.write_bytes(self.data)
        self.fd = os.open(path, os.O_RDONLY)


@dataclass(eq=False)
class Runs:
    """Of a read what pieces look at."""

    file: Any
    runs: list
    name: str = "a tensor"

    @property
    def nbytes(self):
        return sum(nbytes for _, nbytes in self.runs)

    @property
    def wanted(self):
        return b"".join(self.file.data[start : start + nbytes] for start, nbytes in self.runs)


@pytest.fixture
def make():
    """Makes pieces that are closed afterwards."""
    made = []

    def pieces_of(size, count, most=None):
        made.append(Pieces(size, count, ring_of(count), most or size))
        return made[-1]

    yield pieces_of
    for each in made:
        each.close()
    assert open_rings() == 0


@pytest.fixture
def file(tmp_path):
    made = File(tmp_path / "file", 100_000)
    yield made
    os.close(made.fd)


def carry_out(given_pieces, tasks):
    """(what a piece holds, what it should hold) of every task, with some of the pieces kept for a while."""
    found, kept = [], deque()

    def take(full):
        for piece in full:
            held = bytes(piece.bytes[: sum(read.nbytes for read in piece.task)].numpy())
            found.append((held, b"".join(read.wanted for read in piece.task)))
            kept.append(piece)

    for task in tasks:
        while not given_pieces.free:
            if kept:
                given_pieces.give_back([kept.popleft()])
            else:
                take(given_pieces.filled(wait=True))
        given_pieces.begin(task)
        take(given_pieces.filled(wait=False))
    while given_pieces.being_filled:
        take(given_pieces.filled(wait=True))
    given_pieces.give_back(kept)
    return found


SIZE = 5000
starts, lengths = st.integers(0, 60_000), st.one_of(st.integers(1, 300), st.integers(1, SIZE))


@st.composite
def tasks_of(draw):
    """For a few files, tasks of reads of runs that touch, overlap or lie anywhere."""
    tasks = []
    for _ in range(draw(st.integers(1, 12))):
        task, left = [], SIZE
        for _ in range(draw(st.integers(1, 4))):
            runs = []
            start = draw(starts)
            for _ in range(draw(st.sampled_from([1, 1, 2, 40]))):
                nbytes = min(draw(lengths), left)
                if nbytes:
                    runs.append((start, nbytes))
                    left -= nbytes
                    start = start + nbytes if draw(st.booleans()) else draw(starts)
            if runs:
                task.append((draw(st.integers(0, 1)), runs))
        tasks.append(task)
    return tasks


@settings(max_examples=80, deadline=None)
@given(tasks=tasks_of(), count=st.integers(1, 5), most=st.sampled_from([SIZE, SIZE // 2, 700]), short=st.booleans())
def test_every_piece_holds_the_bytes_of_its_reads(tasks, count, most, short):
    real = Ring.read

    def read(self, fd, address, nbytes, offset, tag):
        real(self, fd, address, max(1, nbytes // 2) if short else nbytes, offset, tag)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Ring, "read", read):
        files = [File(Path(folder) / name, 80_000, seed) for seed, name in enumerate("ab")]
        made = Pieces(SIZE, count, ring_of(count), most)
        found = carry_out(made, [[Runs(files[index], runs) for index, runs in task] for task in tasks])
        assert len(found) == len(tasks)
        assert all(held == wanted for held, wanted in found)
        assert len(made.free) == count
        made.close()
        for each in files:
            os.close(each.fd)


@pytest.mark.parametrize("size", [1, 100, 4096, 33_333, 100_000])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_whole_file_goes_through_pieces_of_any_size(size, count, tmp_path, make):
    whole = File(tmp_path / "whole", min(100_000, 300 * size))
    length = len(whole.data)
    tasks = [[Runs(whole, [(at, min(size, length - at))])] for at in range(0, length, size)]
    found = carry_out(make(size, count), tasks)
    assert sorted(held for held, _ in found) == sorted(wanted for _, wanted in found)
    assert sum(len(held) for held, _ in found) == length
    os.close(whole.fd)


@pytest.fixture
def asked(monkeypatch):
    """(offset, bytes) of what the kernel is asked for."""
    found = []
    real = Ring.read

    def read(self, fd, address, nbytes, offset, tag):
        found.append((offset, nbytes))
        real(self, fd, address, nbytes, offset, tag)

    monkeypatch.setattr(Ring, "read", read)
    return found


def test_runs_that_touch_are_one_read(file, make, asked):
    task = [Runs(file, [(10, 5), (15, 5)]), Runs(file, [(20, 30)]), Runs(file, [(60, 1)])]
    [(held, wanted)] = carry_out(make(100, 1), [task])
    assert held == wanted
    assert asked == [(10, 40), (60, 1)]


def test_long_runs_are_several_reads(file, make, asked):
    task = [Runs(file, [(10, 40)]), Runs(file, [(50, 30)]), Runs(file, [(90, 20)])]
    [(held, wanted)] = carry_out(make(100, 1, most=30), [task])
    assert held == wanted
    assert asked == [(10, 30), (40, 30), (70, 10), (90, 20)]


@pytest.mark.parametrize("nbytes", [0, 101])
def test_what_does_not_go_into_a_piece_is_refused(nbytes, file, make):
    with pytest.raises(ValueError, match="do not go into a piece of 100"):
        make(100, 1).begin([Runs(file, [(0, nbytes)])])


@pytest.mark.parametrize("code", [errno.EINTR, errno.EAGAIN])
def test_reads_that_were_interrupted_are_asked_for_again(code, file, make, monkeypatch):
    real, spoilt = Ring.completed, set()

    def completed(self):
        found = []
        for tag, result in real(self):
            spoil = len(spoilt) < 5
            spoilt.add(tag)
            found.append((tag, -code if spoil else result))
        return found

    monkeypatch.setattr(Ring, "completed", completed)
    tasks = [[Runs(file, [(at, 1000), (at + 5000, 7)])] for at in range(0, 50_000, 1000)]
    assert all(held == wanted for held, wanted in carry_out(make(2000, 3), tasks))
    assert len(spoilt) == 105


# --- failures


def test_a_file_that_ends_names_tensor_and_offset(file, make):
    os.truncate(file.path, 40_000)
    task = [Runs(file, [(30_000, 9_999)], "first"), Runs(file, [(39_999, 5_000)], "second")]
    with pytest.raises(CheckpointError, match=rf"{file.path} ends at byte 40000, in the middle of second: it was cut"):
        carry_out(make(20_000, 4), [task])


def test_a_file_that_cannot_be_read_names_tensor_and_offset(file, make):
    os.close(file.fd)
    file.fd = os.open(file.path, os.O_WRONLY)
    task = [Runs(file, [(7, 100)], "the tensor")]
    with pytest.raises(CheckpointError, match=rf"{file.path}: the tensor cannot be read at byte 7: .*Bad file"):
        carry_out(make(1000, 4), [task])


def test_a_file_that_was_replaced_is_read_as_it_was_opened(file, make):
    other = file.path.with_name("other")
    other.write_bytes(b"\0" * len(file.data))
    os.replace(other, file.path)
    [(held, wanted)] = carry_out(make(90_000, 1), [[Runs(file, [(0, 90_000)])]])
    assert held == wanted


def test_closed_in_the_middle_nothing_is_written_any_more(file):
    def maps():
        with open("/proc/self/maps") as found:
            return "io_uring" in found.read()

    for _ in range(10):
        made = Pieces(90_000, 30, ring_of(30), 90_000)
        for _ in range(30):
            made.begin([Runs(file, [(0, 50_000), (55_000, 9)])])
        made.filled(wait=False)
        assert maps()
        made.settle()
        made._memory.bytes.fill_(7)
        time.sleep(0.002)
        assert made._memory.bytes.eq(7).all()
        made.close()
        assert not maps()
        assert open_rings() == 0


def test_without_memory_no_ring_is_left(monkeypatch):
    def fails(_):
        raise CheckpointError("no memory")

    monkeypatch.setattr(pieces, "Mapped", fails)
    with pytest.raises(CheckpointError, match="no memory"):
        Pieces(1000, 3, ring_of(3), 1000)
    assert open_rings() == 0


def test_memory_that_may_still_be_written_to_stays(file, monkeypatch):
    made = Pieces(1000, 3, ring_of(3), 1000)

    def fails(_):
        raise RingError("cannot be waited for")

    with monkeypatch.context() as patch:
        patch.setattr(Ring, "close", fails)
        with pytest.raises(RingError):
            made.close()
    [(held, wanted)] = carry_out(made, [[Runs(file, [(0, 1000)])]])
    assert held == wanted
    made.close()
