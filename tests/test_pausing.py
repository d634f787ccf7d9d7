"""The garbage collector, paused and as it was, and the turns of threads."""

import gc
import sys
import threading
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelgraft.pausing import TURN, collector_paused, interpreter_handed_over

SHORT = round(TURN * 1e6)


@contextmanager
def in_another_thread(block):
    """Meanwhile another thread is in a block; gives what ends that."""
    entered, left = threading.Event(), threading.Event()

    def other():
        with block:
            entered.set()
            left.wait(60)

    def leave():
        left.set()
        thread.join()

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(60)
    try:
        yield leave
    finally:
        leave()


@pytest.fixture(autouse=True)
def as_it_was():
    before = sys.getswitchinterval()
    yield
    gc.enable()
    sys.setswitchinterval(before)


def test_it_is_off_inside_and_on_afterwards():
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_who_had_it_off_has_it_off():
    gc.disable()
    with collector_paused():
        pass
    assert not gc.isenabled()


def test_an_error_ends_the_pause():
    with pytest.raises(KeyError), collector_paused():
        raise KeyError
    assert gc.isenabled()


def test_threads_that_overlap_leave_it_on():
    with in_another_thread(collector_paused()) as leave, collector_paused():
        leave()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_was_made_meanwhile_counts_as_old():
    gc.collect()
    with collector_paused():
        made = [[] for _ in range(10_000)]
    assert gc.get_count()[0] < 1_000
    old = {id(each) for each in gc.get_objects(generation=2)}
    assert all(id(each) in old for each in made)


def test_what_the_caller_has_frozen_stays_so_and_nothing_else_is():
    """By objects of our own, and not by how many are frozen: of all others some may end meanwhile."""
    before = [[] for _ in range(100)]
    gc.freeze()
    try:
        with collector_paused():
            made = [[] for _ in range(100)]
        assert gc.get_freeze_count() >= len(before)
        seen = {id(each) for each in gc.get_objects()}  # of what is frozen it has none
        assert not any(id(each) in seen for each in before)
        assert all(id(each) in seen for each in made)
    finally:
        gc.unfreeze()


def turn():
    """In microseconds."""
    return round(sys.getswitchinterval() * 1e6)


def test_turns_are_short_inside_and_as_before_afterwards():
    before = turn()
    assert before > SHORT
    with interpreter_handed_over():
        with interpreter_handed_over():
            assert turn() == SHORT
        assert turn() == SHORT
    assert turn() == before


@given(st.integers(1, 20_000))
def test_turns_of_any_length_are_as_before_afterwards(microseconds):
    sys.setswitchinterval(microseconds * 1e-6 + 5e-7)
    before = sys.getswitchinterval()
    for _ in range(3):
        with interpreter_handed_over():
            assert turn() == min(SHORT, microseconds)
    assert sys.getswitchinterval() == before


def test_an_error_ends_short_turns():
    before = sys.getswitchinterval()
    with pytest.raises(KeyError), interpreter_handed_over():
        raise KeyError
    assert sys.getswitchinterval() == before


def test_turns_that_somebody_sets_meanwhile_stay_so():
    with interpreter_handed_over():
        sys.setswitchinterval(0.002)
    assert sys.getswitchinterval() == 0.002


def test_turns_are_short_until_the_last_thread_is_through():
    before = turn()
    with in_another_thread(interpreter_handed_over()) as leave:
        with interpreter_handed_over():
            pass
        assert turn() == SHORT
        leave()
        assert turn() == before
