"""Files that become others in one step, and what becomes of links that were there before."""

import errno
import os
from pathlib import Path

import pytest

from kernelgraft.checkpoint.claims import Place
from kernelgraft.checkpoint.switch import prepare, put_links, settle, turn
from leftovers import temporary_files
from small_checkpoints import everything, exactly, put

OLD = {"a": "old", "sub/b": "old", "gone": "old", "stays": "s"}
NEW = {"a": "new", "sub/b": "new", "sub/deep/c": "new"}
AFTER = {**NEW, "stays": "s"}
PATHS = [Path(name) for name in ("a", "sub/b", "gone", "sub/deep/c")]


def said(folder):
    """What the files say, those of the save left out."""
    return {name: text for name, text in everything(folder).items() if not name.startswith(".kernelgraft-save-")}


def a_place(folder):
    """A place that has what shall be there."""
    place = Place.claimed(folder)
    put(place.new, NEW)
    for path in PATHS:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
    return place


def linked(folder):
    """A place whose links are in the folder."""
    place = a_place(folder)
    assert prepare(place, PATHS)
    put_links(place, PATHS)
    return place


def test_all_change_in_one_step(tmp_path):
    put(tmp_path, OLD)
    place = a_place(tmp_path)
    assert prepare(place, PATHS)
    assert said(tmp_path) == OLD
    put_links(place, PATHS)
    assert said(tmp_path) == OLD
    assert all((tmp_path / path).is_symlink() for path in PATHS)
    turn(place, place.new)
    assert said(tmp_path) == AFTER
    settle(place)
    assert said(tmp_path) == AFTER
    place.remove()
    assert everything(tmp_path) == AFTER
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize(
    "target", ["../blobs/a", "./stays", "sub/../../blobs/a", "/absolute", "../nowhere", ".kernelgraft-save-0/old/x"]
)
def test_a_link_is_kept_as_it_is(target, is_done, tmp_path):
    folder = tmp_path / "folder"
    put(tmp_path, {"blobs/a": "blob"})
    put(folder, {"stays": "s", "sub/x": "x"})
    links = {"a": target, "sub/b": target if os.path.isabs(target) else f"../{target}"}
    for name, text in links.items():
        (folder / name).symlink_to(text)
    found = {name: (folder / name).exists() and (folder / name).read_text() for name in links}
    place = linked(folder)
    assert {name: (folder / name).exists() and (folder / name).read_text() for name in links} == found
    if is_done:
        turn(place, place.new)
        turn(place, place.old)
    settle(place)
    place.remove()
    assert {name: os.readlink(folder / name) for name in links} == links
    assert everything(tmp_path / "blobs") == {"a": "blob"}


@pytest.mark.parametrize("target", ["../elsewhere/far", None])
def test_a_folder_that_is_a_link(target, tmp_path):
    folder, there = tmp_path / "folder", tmp_path / "elsewhere" / "far"
    put(there, {"deep/x": "x"})
    put(folder, {"a": "old", "gone": "old", "stays": "s"})
    (folder / "sub").symlink_to(there if target is None else target)
    (there / "b").symlink_to("deep/x")
    place = linked(folder)
    assert (folder / "sub" / "b").read_text() == "x"
    turn(place, place.new)
    assert (folder / "sub" / "b").read_text() == "new"
    turn(place, place.old)
    settle(place)
    assert os.readlink(there / "b") == "deep/x"
    assert not (there / "deep" / "c").is_symlink()
    place.remove()


@pytest.mark.parametrize("to", ["old", "new"])
def test_a_folder_that_was_moved_before_all_was_settled(to, tmp_path):
    put(tmp_path / "folder", OLD)
    place = linked(tmp_path / "folder")
    turn(place, place.inside / to)
    place.release()
    (tmp_path / "folder").rename(tmp_path / "moved")
    expected = OLD if to == "old" else AFTER
    assert said(tmp_path / "moved") == expected
    moved = Place(tmp_path / "moved", place.mark)
    settle(moved)
    moved.remove()
    assert everything(tmp_path / "moved") == expected


@pytest.mark.parametrize("to", ["old", "new"])
def test_where_links_are_refused_later(to, tmp_path, monkeypatch):
    put(tmp_path, OLD)
    place = linked(tmp_path)
    turn(place, place.inside / to)

    def refuses(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", refuses)
    settle(place)
    place.remove()
    assert everything(tmp_path) == (OLD if to == "old" else AFTER)


def test_what_somebody_has_put_into_the_place_of_a_link_stays(tmp_path):
    put(tmp_path, OLD)
    place = linked(tmp_path)
    put(tmp_path, {"theirs": "theirs"})
    os.replace(tmp_path / "theirs", tmp_path / "a")
    (tmp_path / "gone").unlink()
    settle(place)
    place.remove()
    assert everything(tmp_path) == {"a": "theirs", "sub/b": "old", "stays": "s"}


@pytest.mark.parametrize("call", ["link", "symlink"])
@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSPC, errno.EIO])
def test_a_file_system_without_links_and_one_that_fails(code, call, tmp_path, monkeypatch):
    put(tmp_path, OLD)
    place = a_place(tmp_path)
    before = exactly(tmp_path)

    def refuses(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, refuses)
    if code in (errno.EPERM, errno.EOPNOTSUPP):
        assert not prepare(place, PATHS)
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            prepare(place, PATHS)
    settle(place)
    assert {name: text for name, text in exactly(tmp_path).items() if name in before} == before
    place.remove()
    assert temporary_files(tmp_path) == []
