"""A save that is killed, or loses power, at any step: a folder holds the old checkpoint or the new one, whole."""

import ctypes
import itertools
import os
import random

import pytest

from disk import Disk, any_part, least, visibly_different
from forked import forked
from kernelgraft.checkpoint.replace import Names, replacing
from kernelgraft.errors import SaveError
from kills import fail, kill_at, refuse
from leftovers import assert_nothing_left, temporary_files
from small_checkpoints import (
    SOME,
    before_and_after,
    checkpoint,
    everything,
    loads,
    loads_of,
    put,
    put_links,
    save,
    save_in_vain,
)

pytestmark = pytest.mark.usefixtures("without_waiting")

OTHERS = {"tokenizer.json": "theirs", "logs/run.txt": "theirs"}
NEWER = checkpoint("newer", config="changed")

# The config of the new checkpoint, and how the old one is put there.
SITUATIONS = {
    "the small files stay": ("same", put),
    "small files differ": ("changed", put),
    "the old files are links": ("changed", put_links),
}

CASES = [
    (*kinds, situation)
    for kinds, situation in itertools.product([*SOME, ("stale index", "two")], SITUATIONS)
    if kinds[0] != "nothing" or situation == "small files differ"
]


def moments_of(root, work):
    """What is under a folder at each moment of some work."""
    disk = Disk(root)
    with pytest.MonkeyPatch.context() as patch:
        disk.watch(patch)
        work()
    return disk.moments


def moments_of_a_save(tmp_path, old, new, situation):
    """What is beside and in a folder at each moment of a save, and what the two checkpoints load."""
    config, put_old = SITUATIONS[situation]
    before, after = before_and_after(old, new, config)
    folder = tmp_path / "watched" / "folder"
    folder.parent.mkdir()
    if old != "nothing":
        put_old(folder, before | OTHERS)
    moments = moments_of(folder.parent, lambda: save(folder, after))
    return moments, loads_of(before), loads_of(after)


def assert_goes_on(folder, found, others):
    """The next save starts from there: what it finds it does not change before it is done."""
    if found is not None:
        assert others.items() <= everything(folder).items()
    save_in_vain(folder)
    assert not temporary_files(folder)
    assert (loads(folder) if folder.exists() else None) == found
    save(folder, NEWER)
    assert everything(folder) == NEWER | others
    assert all(path.exists() for path in folder.rglob("*"))
    assert_nothing_left(folder)


@pytest.mark.parametrize(("old", "new", "situation"), CASES)
def test_a_kill_at_every_step(old, new, situation, tmp_path):
    moments, before, after = moments_of_a_save(tmp_path, old, new, situation)
    others = {} if old == "nothing" else OTHERS
    drawn = random.Random(f"{old}{new}{situation}")
    seen = []
    for n, moment in enumerate(visibly_different(moments)):
        moment.killed(tmp_path / f"{n}")
        folder = tmp_path / f"{n}" / "folder"
        found = loads(folder)
        assert found in (before, after), n
        if found == after:
            assert others.items() <= everything(folder).items()
        seen.append(found)
        if drawn.randrange(4) == 0:
            assert_goes_on(folder, found, others)
    turn = seen.index(after)
    assert seen == [before] * turn + [after] * (len(seen) - turn), "first the old one, then the new one"


@pytest.mark.parametrize(("old", "new", "situation"), CASES)
def test_a_loss_of_power_at_every_step(old, new, situation, tmp_path):
    """Of what is not synced any part may be lost."""
    moments, before, after = moments_of_a_save(tmp_path, old, new, situation)
    others = {} if old == "nothing" else OTHERS
    drawn = random.Random(f"{old}{new}{situation}")
    for n, moment in enumerate(moments):
        moment.without_power(tmp_path / f"{n}", drawn.choice((least, any_part(drawn))))
        folder = tmp_path / f"{n}" / "folder"
        found = loads(folder) if folder.exists() else None
        assert found in (before, after), n
        if n % 2 == 0:
            assert_goes_on(folder, found, others)
    moments[-1].without_power(tmp_path / "last", least)
    assert loads(tmp_path / "last" / "folder") == after


@pytest.mark.parametrize(("old", "new", "situation"), [case for case in CASES if case[0] in ("single", "two")])
def test_a_kill_at_every_step_of_a_recovery(old, new, situation, tmp_path):
    """And a loss of power at each."""
    moments, before, after = moments_of_a_save(tmp_path, old, new, situation)
    drawn = random.Random(f"{old}{new}{situation}")
    for n in sorted(drawn.sample(range(len(moments)), 3)):
        root = tmp_path / f"{n}"
        moments[n].killed(root)
        found = loads(root / "folder")
        assert found in (before, after)
        recovery = moments_of(root, lambda root=root: save_in_vain(root / "folder"))
        for i, moment in enumerate(visibly_different(recovery)):
            moment.killed(tmp_path / f"{n}-{i}")
            assert loads(tmp_path / f"{n}-{i}" / "folder") == found, (n, i)
            if drawn.randrange(8) == 0:
                assert_goes_on(tmp_path / f"{n}-{i}" / "folder", found, OTHERS)
        for i, moment in enumerate(recovery):
            moment.without_power(tmp_path / f"{n}-{i}-dark", drawn.choice((least, any_part(drawn))))
            assert loads(tmp_path / f"{n}-{i}-dark" / "folder") == found, (n, i)


def test_a_stale_index_is_not_put_back_over_the_new_one(tmp_path):
    """Where the folder in which the new checkpoint was made has all of it still, as nothing of it was synced again."""
    moments, before, after = moments_of_a_save(tmp_path, "stale index", "two", "the small files stay")

    def choose(history):
        is_new = "config.json" in history[0] and "tokenizer.json" not in history[0]
        return history[0] if is_new else history[-1]

    for n, moment in enumerate(moments):
        moment.without_power(tmp_path / f"{n}", choose)
        folder = tmp_path / f"{n}" / "folder"
        found = loads(folder)
        assert found in (before, after), n
        assert_goes_on(folder, found, OTHERS)


# Kinds, config, and what the file system refuses.
UNDONE = [
    ("single", "two", "changed", None),
    ("two", "two", "changed", None),
    ("stale index", "two", "same", None),
    ("two", "single", "changed", "symlink"),
    ("two", "two", "changed", "symlink"),
]


@pytest.mark.parametrize(("old", "new", "config", "refused"), UNDONE)
def test_what_an_error_has_undone_is_on_the_disk(old, new, config, refused, tmp_path):
    before, after = before_and_after(old, new, config)
    possible = [loads_of(before), loads_of(after)]
    for n in itertools.count(random.Random(f"{old}{new}{config}{refused}").randint(1, 7), 7):
        folder = tmp_path / f"{n}" / "folder"
        put(folder, before)
        disk = Disk(folder.parent)
        with pytest.MonkeyPatch.context() as patch:
            disk.watch(patch)
            if refused is not None:
                refuse(patch, refused)
            count = fail(patch, n, n)
            try:
                save(folder, after)
                # What failed may be that it was synced in the end.
                expected = possible if count[0] >= n else possible[1:]
            except SaveError:
                expected = possible[:1]
        disk.moments[-1].without_power(tmp_path / f"{n}-dark", least)
        assert loads(tmp_path / f"{n}-dark" / "folder") in expected, n
        if count[0] < n:
            break


# --- real kills


def in_the_folder(folder):
    """Work in it."""
    os.chdir(folder)


def on_a_mount_point(folder):
    """Let it be one, for this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    user_and_mounts, bind = 0x10000000 | 0x20000, 4096
    path = os.fsencode(folder)
    if libc.unshare(user_and_mounts) or libc.mount(path, path, None, ctypes.c_ulong(bind), None):
        raise PermissionError("no mounts")
    with pytest.raises(OSError, match="busy"):
        os.rename(folder, folder.with_name("elsewhere"))


def without_links(_):
    """Let the file system have no symbolic links."""
    refuse(pytest.MonkeyPatch(), "symlink")


WHERE = {"a folder": lambda _: None, "the working folder": in_the_folder, "a mount point": on_a_mount_point}


def save_and_die(where, folder, files, n=0):
    """In a process of its own: save, and die in front of the call number `n` that changes the disk."""

    def run():
        where(folder)
        count = kill_at(n)
        save(folder, files)
        (folder.parent / "count").write_text(f"{count[0]}")

    ended = forked(run)
    if ended == "PermissionError: no mounts":
        pytest.skip("mounts are not allowed here")
    return ended


def drawn_steps(where, folder, before, after):
    """Some of the steps of a save."""
    put(folder, before)
    assert save_and_die(where, folder, after) == "done"
    steps = int((folder.parent / "count").read_text())
    return sorted(random.Random(f"{before}{after}").sample(range(1, steps + 1), 8))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("old", "new"), SOME[2:])
def test_a_process_that_is_killed(old, new, where, tmp_path):
    before, after = before_and_after(old, new, "changed")
    found = []
    for n in drawn_steps(WHERE[where], tmp_path / "first", before | OTHERS, after):
        folder = tmp_path / f"{n}" / "folder"
        put(folder, before | OTHERS)
        assert save_and_die(WHERE[where], folder, after, n) == "killed"
        found.append(loads(folder))
        assert found[-1] in (loads_of(before), loads_of(after)), n
        assert_goes_on(folder, found[-1], OTHERS)
    assert found == sorted(found, key=[loads_of(before), loads_of(after)].index)


@pytest.mark.parametrize(("old", "new"), SOME)
def test_a_file_system_without_links_holds_one_checkpoint_or_nothing_that_loads(old, new, tmp_path):
    """The one exception, and the next save puts the old checkpoint back, also if it is killed itself."""
    before, after = before_and_after(old, new, "changed")
    others = OTHERS if before else {}
    possible = [loads_of(before), loads_of(after)]
    for n in drawn_steps(without_links, tmp_path / "first", before | others, after):
        folder = tmp_path / f"{n}" / "folder"
        put(folder, before | others)
        assert save_and_die(without_links, folder, after, n) == "killed"
        found = loads(folder)
        assert found in (*possible, None), n
        moments = moments_of(folder.parent, lambda folder=folder: save_in_vain(folder))
        for i, moment in enumerate(visibly_different(moments)):
            moment.killed(folder.parent / f"{i}")
            assert loads(folder.parent / f"{i}" / "folder") in (found, possible[0]), (n, i)
            if i % 8 == 0:
                assert_goes_on(folder.parent / f"{i}" / "folder", found or possible[0], others)
        assert loads(folder) == (found or possible[0])
        moments[-1].without_power(folder.parent / "dark", least)
        assert loads(folder.parent / "dark" / "folder") == (found or possible[0]), n


@pytest.mark.parametrize("config", ["same", "changed"])
def test_a_save_of_other_weights_after_a_kill(config, tmp_path):
    before, after = before_and_after("two", "two", config)
    for n in drawn_steps(WHERE["a folder"], tmp_path / "first", before | OTHERS, after):
        folder = tmp_path / f"{n}"
        put(folder, before | OTHERS)
        assert save_and_die(WHERE["a folder"], folder, after, n) == "killed"
        found = loads(folder)
        with replacing(folder, Names.of_variant("fp16")) as new:
            put(new, {"model.fp16.safetensors": "half"})
        assert loads(folder) == found, n
        assert (folder / "model.fp16.safetensors").read_text() == "half"
        assert_nothing_left(folder)
