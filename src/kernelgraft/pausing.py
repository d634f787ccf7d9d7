"""What a load asks of the interpreter: no walks over what is no garbage, and turns that are short."""

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Seconds of a load of Qwen3-8B, plain and with q/k/v and gate/up merged, by milliseconds (an H200's host of 16 cores,
# Python 3.12, 2026-11-29, fresh processes in turn, medians of 7): 0.5 0.443, 0.504; 0.2 0.419, 0.488; 0.1 0.430, 0.488.
# With 5 ms 3.8 of its 16.4 GB had been read when the merged one was planned, and with 0.5 7.1.
TURN = 0.0002
"""Seconds that a thread keeps the interpreter at most when another waits for it, inside `interpreter_handed_over`."""

_lock = threading.Lock()
_users = 0
_was_enabled = False
_turns = 0
_turn_before = _turn = 0.0


@contextmanager
def collector_paused() -> Iterator[None]:
    """Inside the block Python's garbage collector does not start by itself, in the whole process.

    Each hundred thousand new objects let it walk all that torch and Transformers keep, and find nothing. Blocks of
    several threads may overlap; when the last one ends the collector is as it was before the first, and what was made
    counts as old: to walk over new objects once, at the next one that is made, took 7 ms after each block of a load.
    """
    global _users, _was_enabled
    with _lock:
        if _users == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _was_enabled:
                if not gc.get_freeze_count():  # else the caller has frozen something, and means to keep it so
                    gc.freeze()
                    gc.unfreeze()
                gc.enable()


@contextmanager
def interpreter_handed_over() -> Iterator[None]:
    """Inside the block a thread that waits for the interpreter has it after `TURN` seconds, in the whole process.

    Python's own interval is 5 ms. A thread that feeds a device needs a little of the interpreter often: beside one
    that only computes it would get nothing done. Blocks of several threads may overlap; when the last one ends the
    interval is as it was before the first, unless somebody has set another one since.
    """
    global _turns, _turn_before, _turn
    with _lock:
        if _turns == 0:
            _turn_before = sys.getswitchinterval()
            _set_interval(min(TURN, _turn_before))
            _turn = sys.getswitchinterval()
        _turns += 1
    try:
        yield
    finally:
        with _lock:
            _turns -= 1
            if _turns == 0 and sys.getswitchinterval() == _turn:
                _set_interval(_turn_before)


def _set_interval(seconds: float) -> None:
    # Python cuts off what is not a whole microsecond: 0.0002 would be 199 of them.
    sys.setswitchinterval(seconds + 5e-7)
