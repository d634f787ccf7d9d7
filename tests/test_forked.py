"""Children that are killed, and what they might take with them."""

import tqdm.auto

from forked import forked, kill_self


def test_how_it_ended():
    def wrong():
        raise ValueError("no")

    assert forked(lambda: None) == "done"
    assert forked(kill_self) == "killed"
    assert forked(wrong) == "ValueError: no"


def test_a_child_that_is_killed_inside_a_bar_keeps_no_lock():
    class Bar(tqdm.auto.tqdm):
        """As the Hub's: a class of bars whose lock is its own if it was the first."""

    def killed_inside():
        for cls in (tqdm.tqdm, tqdm.auto.tqdm, Bar):
            cls.get_lock().acquire()
        kill_self()

    for cls in (Bar, tqdm.auto.tqdm, tqdm.tqdm):
        cls.get_lock()
    assert forked(killed_inside) == "killed"
    for cls in (Bar, tqdm.auto.tqdm, tqdm.tqdm):
        for lock in cls.get_lock().locks:
            assert lock.acquire(timeout=5)
            lock.release()
