"""Reads that wait to be taken."""

import threading
from types import SimpleNamespace

import pytest

from kernelgraft.checkpoint.requests import Straight
from kernelgraft.checkpoint.waiting import Waiting

MB = 1 << 20


@pytest.fixture
def waiting():
    made = Waiting()
    made.num_lanes = 1
    return made


def reads(*sizes, file=None):
    file = file or SimpleNamespace()
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [Straight(file, "a", start, size, None, start) for start, size in zip(starts, sizes, strict=True)]


def test_reads_are_given_in_order_as_many_as_fit(waiting):
    made = reads(3 * MB, MB, MB, 4 * MB)
    waiting.put(made)
    assert waiting.take(4 * MB) == made[:2]
    assert waiting.take(4 * MB, count=1) == made[2:3]
    assert waiting.take(4 * MB) == made[3:]
    assert waiting.take(4 * MB) == []


def test_one_read_is_given_however_large_it_is(waiting):
    [read] = reads(10 * MB)
    waiting.put([read])
    assert waiting.take(MB) == [read]


def test_towards_the_end_less_is_given_at_once(waiting):
    waiting.num_lanes = 4
    waiting.put(reads(*[MB] * 16))
    sizes = []
    while task := waiting.take(16 * MB):
        sizes.append(len(task))
    assert sizes[0] == 2
    assert set(sizes[-8:]) == {1}


def test_a_gap_ends_what_is_given_at_once(waiting):
    near, far = reads(1000, 1000, 1000), reads(1000)
    waiting.put([near[0], near[1], *far, near[2]])
    assert waiting.take(MB, gap=0) == near[:2]
    assert waiting.take(MB, gap=0) == far


def test_whoever_comes_before_there_is_anything_waits(waiting):
    made, found = reads(1000), []
    thread = threading.Thread(target=lambda: found.append(waiting.take(MB)))
    thread.start()
    waiting.put(made, is_all=False)
    thread.join(60)
    assert found == [made]


def test_whoever_does_not_wait_gets_nothing_until_there_is_something(waiting):
    assert waiting.take(MB, wait=False) == []
    made = reads(1000)
    waiting.put(made, is_all=False)
    assert waiting.take(MB, wait=False) == made
    assert waiting.take(MB, wait=False) == []


def test_after_a_stop_nothing_is_given_or_taken(waiting):
    waiting.put(reads(1000), is_all=False)
    waiting.stop()
    assert waiting.take(MB) == []
    waiting.put(reads(1000))
    assert waiting.take(MB) == []


def test_what_was_done_before_there_was_somebody_to_tell_is_told_later(waiting):
    told = []
    waiting.done(reads(1000), None)
    waiting.done(reads(10, 20), told.append)
    waiting.done((), told.append)
    assert told == [1030, 0]
