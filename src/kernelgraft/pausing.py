"""Work that makes many objects and no garbage, without the garbage collector walking over all that there is."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_users = 0
_was_enabled = False


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
