"""A checkpoint takes the place of another: whatever happens, and whenever, a folder holds the one or the other."""

import errno
import itertools
import json
import os
import random
import re
import signal
from pathlib import Path

import pytest

from forked import forked, kill_self
from kernelgraft.checkpoint import replace as replacing_module
from kernelgraft.checkpoint.claims import Place
from kernelgraft.checkpoint.replace import Names, replacing
from kernelgraft.errors import SaveError
from leftovers import assert_nothing_left, temporary_files

SINGLE, INDEX = Names().single, Names().index
OBSOLETE = ("kernelgraft.json",)

# What changes the disk, by the modules that the code under test calls it through.
STEPS = ("rename", "replace", "link", "unlink", "rmdir", "mkdir", "open", "fsync", "ftruncate", "pwrite")


def checkpoint(tag, shards=0, config="same", record=False):
    """Files of a checkpoint, whose weights all say `tag`."""
    files = {"config.json": config, "generation_config.json": "same"}
    if record:
        files["kernelgraft.json"] = f"record of {tag}"
    if not shards:
        return {**files, SINGLE: tag}
    names = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    index = {"weight_map": {f"w{i}": name for i, name in enumerate(names)}}
    return {**files, **dict.fromkeys(names, tag), INDEX: json.dumps(index)}


def put(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def everything(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def visible(folder):
    return {name: text for name, text in everything(folder).items() if not name.startswith(".kernelgraft-save-")}


def save(folder, files, **options):
    with replacing(folder, Names(), OBSOLETE, **options) as new:
        put(new, files)


def loads(folder):
    """What plain Transformers would load: the config, and what the files say in which it finds weights."""
    config = (folder / "config.json").read_text() if (folder / "config.json").exists() else None
    if (folder / SINGLE).exists():
        return config, {(folder / SINGLE).read_text()}
    if (folder / INDEX).exists():
        names = json.loads((folder / INDEX).read_text())["weight_map"].values()
        return config, {(folder / name).read_text() for name in names}
    return None


KINDS = {"nothing": None, "single": 0, "two": 2, "three": 3}
TRANSITIONS = list(itertools.product(KINDS, ["single", "two", "three"]))
SOME = [("nothing", "two"), ("single", "two"), ("two", "single"), ("two", "two")]


def before_and_after(old, new, config, record):
    before = {} if old == "nothing" else checkpoint("old", KINDS[old], record=record)
    after = checkpoint("new", KINDS[new], "same" if config == "same" else "changed")
    return before, after


@pytest.mark.parametrize("others", [{}, {"tokenizer.json": "theirs"}, {"logs/run.txt": "theirs", "optimizer.pt": "o"}])
@pytest.mark.parametrize("config", ["same", "changed"])
@pytest.mark.parametrize(("old", "new"), TRANSITIONS)
def test_the_folder_holds_the_new_checkpoint_and_all_else_that_was_there(old, new, config, others, tmp_path):
    folder = tmp_path / "folder"
    before, after = before_and_after(old, new, config, record=True)
    put(folder, before | others)
    save(folder, after)
    assert everything(folder) == after | others
    assert_nothing_left(folder)


@pytest.mark.parametrize("refuses", ["exchange", "link"])
@pytest.mark.parametrize(("old", "new"), TRANSITIONS)
def test_a_file_system_that_cannot_do_all(old, new, refuses, tmp_path, monkeypatch):
    if refuses == "exchange":
        monkeypatch.setattr(replacing_module, "exchange", lambda *_: False)
    else:
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
    folder = tmp_path / "folder"
    before, after = before_and_after(old, new, "changed", record=True)
    put(folder, before | {"tokenizer.json": "theirs"})
    save(folder, after)
    assert loads(folder) == ("changed", {"new"})
    assert_nothing_left(folder)
    if refuses == "exchange" or old != new or new == "single":
        assert everything(folder) == after | {"tokenizer.json": "theirs"}
    else:
        # The shards keep the names that were free, which Transformers too takes for shards.
        names = [name for name in everything(folder) if name.endswith(".safetensors")]
        assert all(re.fullmatch(r"model-kg[0-9a-f]{8}-\d{5}-of-\d{5}\.safetensors", name) for name in names)
        save(folder, checkpoint("newer", KINDS[new], "changed"))
        assert loads(folder) == ("changed", {"newer"})


def test_a_folder_keeps_its_mode_and_is_reached_through_links(tmp_path):
    folder = tmp_path / "folder"
    put(folder, checkpoint("old"))
    folder.chmod(0o2750)
    (tmp_path / "link").symlink_to(folder)
    save(tmp_path / "link", checkpoint("new", config="changed"))
    assert (tmp_path / "link").is_symlink()
    assert folder.stat().st_mode & 0o7777 == 0o2750
    assert loads(folder) == ("changed", {"new"})


def test_the_working_folder_stays_the_working_folder(tmp_path, monkeypatch):
    put(tmp_path, checkpoint("old"))
    monkeypatch.chdir(tmp_path)
    save(Path(), checkpoint("new", config="changed"))
    assert loads(Path()) == ("changed", {"new"})
    assert everything(Path()) == checkpoint("new", config="changed")


def test_the_target_of_a_link_is_not_written_through(tmp_path):
    folder, blob = tmp_path / "folder", tmp_path / "blob"
    put(folder, checkpoint("old"))
    (folder / SINGLE).rename(blob)
    (folder / SINGLE).symlink_to(blob)
    save(folder, checkpoint("new"))
    assert blob.read_text() == "old"
    assert loads(folder) == ("same", {"new"})


def test_names_with_a_variant_leave_the_other_weights_alone(tmp_path):
    names = Names.of_variant("fp16")
    assert (names.single, names.index) == ("model.fp16.safetensors", "model.safetensors.index.fp16.json")
    assert names.is_shard("model.fp16-00001-of-00002.safetensors")
    put(tmp_path / "folder", checkpoint("old", 2))
    with replacing(tmp_path / "folder", names) as new:
        put(new, {"config.json": "same", "model.fp16.safetensors": "half"})
    assert everything(tmp_path / "folder") == checkpoint("old", 2) | {"model.fp16.safetensors": "half"}


def test_a_file_that_comes_at_the_last_moment_is_kept(tmp_path, monkeypatch):
    exchange = replacing_module.exchange

    def late(one, other):
        (folder / "late.txt").write_text("late")
        (folder / "tokenizer.tmp").write_text("newer")
        os.replace(folder / "tokenizer.tmp", folder / "tokenizer.json")
        return exchange(one, other)

    monkeypatch.setattr(replacing_module, "exchange", late)
    folder = tmp_path / "folder"
    put(folder, checkpoint("old") | {"tokenizer.json": "theirs"})
    save(folder, checkpoint("new", config="changed"))
    others = {"tokenizer.json": "newer", "late.txt": "late"}
    assert everything(folder) == checkpoint("new", config="changed") | others


# --- failures


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


@pytest.mark.parametrize("config", ["same", "changed"])
@pytest.mark.parametrize(("old", "new"), SOME)
def test_every_step_may_fail(old, new, config, tmp_path, monkeypatch):
    """As long as the new checkpoint is not there, an error leaves the old one as it was."""
    before, after = before_and_after(old, new, config, record=True)
    monkeypatch.setattr(replacing_module, "exchange", lambda *_: False)
    for n in itertools.count():
        folder = tmp_path / f"{n}"
        put(folder, before)
        with monkeypatch.context() as patch:
            count = fail_from(patch, n)
            try:
                save(folder, after)
                found = after
            except SaveError:
                found = before
        if found is before:
            assert everything(folder) == before, n
        else:
            assert loads(folder) == loads_of(after)
        assert_nothing_left(folder)
        if count[0] <= n:
            break


def fail_from(patch, n):
    """Let the call number `n` that changes the disk fail, of those that a full or a broken disk refuses."""
    count = [0]
    for name in ("rename", "replace", "link", "mkdir", "fsync"):
        call = getattr(os, name)

        def counted(*args, call=call, **kwargs):
            count[0] += 1
            if count[0] == n + 1:
                raise OSError(errno.EIO, "Input/output error")
            return call(*args, **kwargs)

        patch.setattr(os, name, counted)
    return count


def loads_of(files):
    return files["config.json"], {"new"}


def test_two_saves_into_one_folder(tmp_path):
    with replacing(tmp_path / "folder", Names()) as new:
        put(new, checkpoint("first"))
        with pytest.raises(SaveError, match=r"Another save into .*folder is under way"):
            save(tmp_path / "folder", checkpoint("second"))
    assert loads(tmp_path / "folder") == ("same", {"first"})
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
    assert loads(folder) == ("same", {"old"})
    save(folder, checkpoint("new"))
    assert everything(folder) == checkpoint("new")
    assert_nothing_left(folder)


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
    assert loads(tmp_path) == ("same", {"new"})
    assert len(temporary_files(tmp_path)) == 1, "whose it is cannot be known"


# --- kills


def kill_at(n):
    """In this process: die in front of the `n`-th call that changes the disk; the count so far."""
    count = itertools.count(1)

    def dying(call):
        def counted(*args, **kwargs):
            if next(count) == n:
                kill_self()
            return call(*args, **kwargs)

        return counted

    for name in STEPS:
        setattr(os, name, dying(getattr(os, name)))
    replacing_module.exchange = dying(replacing_module.exchange)
    return count


def steps_of(folder, files):
    """How many calls a save takes."""
    counted = folder.parent / "count"

    def run():
        count = kill_at(0)
        save(folder, files)
        n = next(count)
        counted.write_text(str(n))

    assert forked(run) == "done"
    return int(counted.read_text())


SITUATIONS = {
    "the small files stay": ("same", {}),
    "the folder is exchanged": ("changed", {"tokenizer.json": "theirs"}),
    "the folder cannot be exchanged": ("changed", {"logs/run.txt": "theirs"}),
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(("old", "new"), SOME)
def test_all_is_on_the_disk_before_it_takes_its_place(old, new, situation, tmp_path, monkeypatch):
    config, others = SITUATIONS[situation]
    before, after = before_and_after(old, new, config, record=True)
    folder = tmp_path / "folder"
    put(folder, before | others)
    known = {path.stat().st_ino for path in folder.rglob("*")}
    synced, lacking, trail = set(), [], []

    def fsync(fd, real=os.fsync):
        real(fd)
        synced.add(os.fstat(fd).st_ino)
        trail.append(os.fstat(fd).st_ino)

    def watched(move):
        def moved(source, *args, **kwargs):
            paths = [Path(source), *Path(source).rglob("*")]
            new = [path for path in paths if path.is_file() and path.stat().st_ino not in known]
            lacking.extend(path for path in new if path.stat().st_ino not in synced)
            trail.append("moved")
            return move(source, *args, **kwargs)

        return moved

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    real = replacing_module.exchange
    monkeypatch.setattr(replacing_module, "exchange", lambda one, other: watched(lambda _: real(one, other))(other))
    save(folder, after)
    monkeypatch.undo()
    assert everything(folder) == after | others
    assert lacking == []
    last = len(trail) - 1 - trail[::-1].index("moved")
    assert {folder.stat().st_ino, folder.parent.stat().st_ino} & set(trail[last:])


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(("old", "new"), SOME)
def test_a_kill_at_any_step(old, new, situation, tmp_path):
    config, others = SITUATIONS[situation]
    before, after = before_and_after(old, new, config, record=True)
    put(tmp_path / "first", before | others)
    steps = steps_of(tmp_path / "first", after)
    drawn = random.Random(f"{old}{new}{situation}").sample(range(1, steps + 1), min(steps, 8))
    for n in sorted(drawn):
        folder = tmp_path / f"{n}" / "folder"
        put(folder, before | others)

        def run(folder=folder, n=n):
            kill_at(n)
            save(folder, after)

        assert forked(run) in ("killed", "done")
        found = loads(folder)
        possible = [loads_of(after), ("same", {"old"}) if before else None]
        if situation == "the folder cannot be exchanged":
            possible.append(None)  # between the two
        assert found in possible, n
        assert others.items() <= visible(folder).items()

        # The next save starts from there, and a failing one leaves the old or the new checkpoint, whole.
        with pytest.raises(ZeroDivisionError), replacing(folder, Names()):
            raise ZeroDivisionError
        assert loads(folder) in (loads_of(after), ("same", {"old"}) if before else None), n
        save(folder, checkpoint("newer", config="changed"))
        assert everything(folder) == checkpoint("newer", config="changed") | others, n
        assert_nothing_left(folder)


def test_a_save_of_other_weights_after_a_kill(tmp_path):
    before, after = before_and_after("two", "two", "changed", record=True)
    others = {"logs/run.txt": "theirs"}
    put(tmp_path / "first", before | others)
    for n in range(1, steps_of(tmp_path / "first", after) + 1, 3):
        folder = tmp_path / f"{n}"
        put(folder, before | others)

        def run(folder=folder, n=n):
            kill_at(n)
            save(folder, after)

        assert forked(run) in ("killed", "done")
        found = loads(folder) or ("same", {"old"})
        with replacing(folder, Names.of_variant("fp16")) as new:
            put(new, {"model.fp16.safetensors": "half"})
        assert loads(folder) == found, n
        assert (folder / "model.fp16.safetensors").read_text() == "half"
        assert_nothing_left(folder)


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
