"""A checkpoint takes the place of another: whatever happens, and whenever, a folder holds the one or the other."""

import itertools
import os
import re
import stat
from pathlib import Path

import pytest

from kernelgraft.checkpoint.replace import Names, replacing
from kills import STEPS, refuse
from leftovers import assert_nothing_left
from small_checkpoints import (
    KINDS,
    SINGLE,
    SOME,
    TRANSITIONS,
    before_and_after,
    checkpoint,
    everything,
    loads,
    loads_of,
    put,
    put_links,
    save,
)

CHANGED = checkpoint("new", config="changed")


@pytest.mark.parametrize("others", [{}, {"tokenizer.json": "theirs"}, {"logs/run.txt": "theirs", "optimizer.pt": "o"}])
@pytest.mark.parametrize("put_old", [put, put_links], ids=["files", "links"])
@pytest.mark.parametrize("config", ["same", "changed"])
@pytest.mark.parametrize(("old", "new"), TRANSITIONS)
def test_the_folder_holds_the_new_checkpoint_and_all_else_that_was_there(old, new, config, put_old, others, tmp_path):
    folder = tmp_path / "folder"
    before, after = before_and_after(old, new, config)
    put_old(folder, before | others)
    blobs = everything(tmp_path / "blobs")
    save(folder, after)
    assert everything(folder) == after | others
    assert all(path.exists() for path in folder.rglob("*"))
    assert everything(tmp_path / "blobs") == blobs
    assert all(path.is_symlink() == (put_old is put_links) for path in map(folder.joinpath, others))
    assert not any((folder / name).is_symlink() for name in after.keys() & {SINGLE, "config.json"} if config != "same")
    assert_nothing_left(folder)


@pytest.mark.parametrize("refused", ["symlink", "link"])
@pytest.mark.parametrize(("old", "new"), TRANSITIONS)
def test_a_file_system_without_links(old, new, refused, tmp_path, monkeypatch):
    refuse(monkeypatch, refused)
    folder = tmp_path / "folder"
    before, after = before_and_after(old, new, "changed")
    put(folder, before | {"tokenizer.json": "theirs"})
    save(folder, after)
    assert loads(folder) == loads_of(after)
    assert_nothing_left(folder)
    if refused == "symlink" or old != new or new == "single":
        assert everything(folder) == after | {"tokenizer.json": "theirs"}
    else:
        # The shards keep the names that were free, which Transformers too takes for shards.
        names = [name for name in everything(folder) if name.endswith(".safetensors")]
        assert all(re.fullmatch(r"model-kg[0-9a-f]{8}-\d{5}-of-\d{5}\.safetensors", name) for name in names)
        newer = checkpoint("newer", KINDS[new], "changed")
        save(folder, newer)
        assert loads(folder) == loads_of(newer)


def test_a_folder_stays_the_same_one_and_is_reached_through_links(tmp_path):
    folder = tmp_path / "folder"
    put(folder, checkpoint("old"))
    folder.chmod(0o2750)
    (tmp_path / "link").symlink_to(folder)
    before = folder.stat()
    save(tmp_path / "link", CHANGED)
    assert (tmp_path / "link").is_symlink()
    assert (folder.stat().st_ino, folder.stat().st_mode) == (before.st_ino, before.st_mode)
    assert loads(folder) == loads_of(CHANGED)


def test_the_working_folder_stays_the_working_folder(tmp_path, monkeypatch):
    put(tmp_path, checkpoint("old"))
    monkeypatch.chdir(tmp_path)
    save(Path(), CHANGED)
    assert everything(Path()) == CHANGED


def test_the_target_of_a_link_is_not_written_through(tmp_path):
    folder, blob = tmp_path / "folder", tmp_path / "blob"
    put(folder, checkpoint("old"))
    (folder / SINGLE).rename(blob)
    (folder / SINGLE).symlink_to(blob)
    save(folder, checkpoint("new"))
    assert blob.read_text() == "old"
    assert loads(folder) == loads_of(checkpoint("new"))


def test_names_with_a_variant_leave_the_other_weights_alone(tmp_path):
    names = Names.of_variant("fp16")
    assert (names.single, names.index) == ("model.fp16.safetensors", "model.safetensors.index.fp16.json")
    assert names.is_shard("model.fp16-00001-of-00002.safetensors")
    put(tmp_path / "folder", checkpoint("old", 2))
    with replacing(tmp_path / "folder", names) as new:
        put(new, {"config.json": "same", "model.fp16.safetensors": "half"})
    assert everything(tmp_path / "folder") == checkpoint("old", 2) | {"model.fp16.safetensors": "half"}


def hooked(patch, before=lambda: None, after=lambda: None):
    """Call these around each step that changes the disk."""

    def around(call):
        def called(*args, **kwargs):
            before()
            try:
                return call(*args, **kwargs)
            finally:
                after()

        return called

    for name in STEPS:
        patch.setattr(os, name, around(getattr(os, name)))


def test_what_others_write_meanwhile_is_kept(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    put(folder, checkpoint("old") | {"tokenizer.json": "theirs"})
    count = itertools.count()

    def write():
        n = next(count)
        (folder / f"{n}.txt").write_text("late")
        (folder / "tokenizer.json").write_text(f"{n}")

    with monkeypatch.context() as patch:
        hooked(patch, write)
        save(folder, CHANGED)
    n = next(count)
    late = {f"{i}.txt": "late" for i in range(n)}
    assert everything(folder) == CHANGED | late | {"tokenizer.json": f"{n - 1}"}


@pytest.mark.parametrize("put_old", [put, put_links], ids=["files", "links"])
@pytest.mark.parametrize(("old", "new"), SOME)
def test_a_reader_on_its_way_finds_what_it_was_led_to(old, new, put_old, tmp_path, monkeypatch):
    """A reader that has followed links to a file opens it one step later, unless the name is gone."""
    folder = tmp_path / "folder"
    before, after = before_and_after(old, new, "changed")
    put_old(folder, before)
    names = [name for name in before.keys() | after.keys() if "-of-" not in name]
    led = {}

    def follow():
        led.update({name: os.path.realpath(folder / name) for name in names if (folder / name).exists()})

    def arrive():
        for name, path in led.items():
            assert os.path.exists(path) or not (folder / name).exists()
        led.clear()

    with monkeypatch.context() as patch:
        hooked(patch, follow, arrive)
        save(folder, after)
    assert everything(folder) == after


def test_those_who_read_the_folder_may_read_it_through_links(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    put(folder, checkpoint("old"))
    folder.chmod(0o2755)
    (folder / "templates").chmod(0o751)
    found = {}

    def look():
        for name in ("config.json", "templates/deep/chat.jinja"):
            if (folder / name).is_symlink():
                parents = Path(os.path.realpath(folder / name)).relative_to(folder).parents
                found.update({str(path): stat.S_IMODE((folder / path).stat().st_mode) for path in parents})

    before = os.umask(0o077)
    try:
        with monkeypatch.context() as patch:
            hooked(patch, look)
            save(folder, CHANGED)
    finally:
        os.umask(before)
    modes = {name.partition("/")[2]: mode for name, mode in found.items()}
    assert modes.pop("") == 0o2755
    inside = {name: mode & 0o777 for name, mode in modes.items()}
    assert inside == {
        **dict.fromkeys(("old", "new"), 0o755),
        **{f"{tree}/templates": 0o751 for tree in ("old", "new")},
        **{f"{tree}/templates/deep": 0o755 for tree in ("old", "new")},
    }
