"""A save that fails, or meets another one: the folder holds the old checkpoint, or the next save puts it back."""

import errno
import itertools
import os
import random
import signal
from contextlib import suppress

import pytest

from forked import forked, kill_self
from kernelgraft.checkpoint.claims import Place
from kernelgraft.checkpoint.replace import Names, replacing
from kernelgraft.errors import SaveError
from kills import fail, refuse
from leftovers import assert_nothing_left, temporary_files
from small_checkpoints import (
    KINDS,
    SINGLE,
    SOME,
    before_and_after,
    checkpoint,
    everything,
    exactly,
    loads,
    loads_of,
    put,
    put_links,
    save,
    save_in_vain,
)

CHANGED = checkpoint("new", config="changed")


def save_and_raise(folder, error):
    with replacing(folder, Names()) as new:
        put(new, checkpoint("new"))
        raise error


def test_a_block_that_fails_changes_nothing(tmp_path):
    folder = tmp_path / "a" / "b"
    for error in (ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")):
        with pytest.raises(SaveError if isinstance(error, OSError) else type(error)):
            save_and_raise(folder, error)
        assert list(tmp_path.iterdir()) == []
    put(folder, checkpoint("old", 2) | {"x": "y"})
    with pytest.raises(SaveError, match=r"Saving into .*b failed: No space left on device\. Nothing in it has changed"):
        save_and_raise(folder, OSError(errno.ENOSPC, "No space left on device"))
    assert everything(folder) == checkpoint("old", 2) | {"x": "y"}


# How: the config of the new checkpoint, how the old one is put there, and what the file system refuses.
WAYS = {
    "same": ("same", put, None),
    "changed": ("changed", put, None),
    "over links": ("changed", put_links, None),
    "without links": ("changed", put, "symlink"),
}


@pytest.mark.usefixtures("without_waiting")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("old", "new"), SOME)
def test_every_step_may_fail(old, new, way, tmp_path, monkeypatch):
    """As long as the new checkpoint is not there, an error leaves the old one as it was."""
    config, put_old, refused = WAYS[way]
    before, after = before_and_after(old, new, config)
    for n in itertools.count(1):
        folder = tmp_path / f"{n}"
        put_old(folder, before)
        there = exactly(folder)
        with monkeypatch.context() as patch:
            if refused is not None:
                refuse(patch, refused)
            count = fail(patch, n, n)
            try:
                save(folder, after)
                error = None
            except SaveError as raised:
                error = str(raised)
        if error is None:
            assert loads(folder) == loads_of(after), n
        else:
            assert error.endswith("Nothing in it has changed."), n
            assert exactly(folder) == there, n
        if temporary_files(folder):  # it could not be put in order
            assert loads(folder) == loads_of(after), n
            save(folder, after)
        assert_nothing_left(folder)
        if count[0] < n:
            break


@pytest.mark.usefixtures("without_waiting")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("old", "new"), SOME)
def test_a_disk_that_fails_from_some_step_on(old, new, way, tmp_path, monkeypatch):
    """What cannot be put back at once is put back by the next save."""
    config, put_old, refused = WAYS[way]
    before, after = before_and_after(old, new, config)
    possible = [loads_of(before), loads_of(after)]
    for n in itertools.count(random.Random(f"{old}{new}{way}").randint(1, 3), 3):
        folder = tmp_path / f"{n}"
        put_old(folder, before)
        with monkeypatch.context() as patch:
            if refused is not None:
                refuse(patch, refused)
            count = fail(patch, n, 1 << 30)
            with suppress(SaveError):
                save(folder, after)
        found = loads(folder)
        assert found in possible or (refused and found is None), n
        save_in_vain(folder)
        assert loads(folder) in ([found] if found is not None else possible), n
        newer = checkpoint("newer", KINDS[new], "changed")
        save(folder, newer)
        assert everything(folder) == newer, n
        assert_nothing_left(folder)
        if count[0] < n:
            break


def test_an_error_says_what_must_stay_until_the_next_save(tmp_path, monkeypatch):
    put(tmp_path, checkpoint("old"))
    call = os.replace

    def once(source, target):
        call(source, target)
        refuse(monkeypatch, "replace", errno.EIO)
        refuse(monkeypatch, "rename", errno.EIO)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(SaveError, match="Not all could be put back: the next save into it does that") as error:
        save(tmp_path, CHANGED)
    monkeypatch.undo()
    (left,) = [path for path in temporary_files(tmp_path) if path.parent == tmp_path]
    assert f"needs {left} until" in str(error.value)
    assert loads(tmp_path) == loads_of(checkpoint("old"))
    save(tmp_path, CHANGED)
    assert everything(tmp_path) == CHANGED


def test_two_saves_into_one_folder(tmp_path):
    with replacing(tmp_path / "folder", Names()) as new:
        put(new, checkpoint("first"))
        with pytest.raises(SaveError, match=r"Another save into .*folder is under way"):
            save(tmp_path / "folder", checkpoint("second"))
    assert loads(tmp_path / "folder") == loads_of(checkpoint("first"))
    assert_nothing_left(tmp_path / "folder")


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    folder = tmp_path / "folder"
    put(folder, checkpoint("old"))

    def killed():
        with replacing(folder, Names()) as new:
            put(new, checkpoint("half"))
            kill_self()

    assert forked(killed) == "killed"
    assert len(temporary_files(folder)) == 1
    assert loads(folder) == loads_of(checkpoint("old"))
    save(folder, checkpoint("new"))
    assert everything(folder) == checkpoint("new")
    assert_nothing_left(folder)


def test_a_recovery_that_fails_is_left_to_the_next_save(tmp_path, monkeypatch):
    put(tmp_path, checkpoint("old"))

    def run():
        kill_at_the_step_of(tmp_path)
        save(tmp_path, CHANGED)

    assert forked(run) == "killed"
    assert (tmp_path / SINGLE).is_symlink()
    with monkeypatch.context() as patch:
        refuse(patch, "replace", errno.EIO)
        with pytest.raises(SaveError, match="Input/output error"):
            save(tmp_path, checkpoint("newer"))
    assert loads(tmp_path) == loads_of(CHANGED)
    save_in_vain(tmp_path)
    assert everything(tmp_path) == CHANGED
    assert_nothing_left(tmp_path)


def kill_at_the_step_of(folder):
    """In this process: die as soon as the new checkpoint is there."""
    fsync = os.fsync

    def dying(fd):
        fsync(fd)
        if loads(folder) == loads_of(CHANGED):
            kill_self()

    os.fsync = dying


def test_what_looks_like_ours_and_is_somebody_s_stays(tmp_path):
    folder = tmp_path / "folder"
    theirs = {".kernelgraft-notes": "mine", "model-kept.safetensors": "mine", "model-00001-of-00002.bin": "mine"}
    put(folder, checkpoint("old") | theirs)
    save(folder, checkpoint("new"))
    assert everything(folder) == checkpoint("new") | theirs


def test_where_nothing_can_be_claimed_saves_still_work(tmp_path, monkeypatch):
    import fcntl

    def refuses(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuses)
    Place.claimed(tmp_path).release()
    save(tmp_path, checkpoint("new"))
    assert loads(tmp_path) == loads_of(checkpoint("new"))
    assert len(temporary_files(tmp_path)) == 1, "whose it is cannot be known"


def test_ctrl_c_while_the_new_checkpoint_takes_its_place(tmp_path, monkeypatch):
    rename = os.rename

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return rename(*args)

    monkeypatch.setattr(os, "rename", interrupted)
    put(tmp_path / "folder", checkpoint("old", 2))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "folder", checkpoint("new", 2))
    assert everything(tmp_path / "folder") == checkpoint("new", 2)
    assert_nothing_left(tmp_path / "folder")
