"""A checkpoint put into the place of another: at every moment a folder holds the one or the other, and no mixture.

What is new is made in a folder of its own and brought to the disk there. How it then takes its place depends on what
is in the folder, as `from_pretrained` looks for `config.json` and for `model.safetensors`, or else for the index:

- No weights, and none of the small files: these come first, then the name by which weights are found.
- The small files are what they were: shards come under names that are free, and one rename, or the removal of
  `model.safetensors`, makes them the checkpoint. If the shards had to take other names than they should have, they get
  the right ones by a second round of the same kind.
- Small files differ: all that do, and the names by which weights are found, become others in one step, through a link
  (`switch.py`). Shards come before it and get their right names after it, in the same way.
- The same on a file system without symbolic links or without hard links: the names by which the old weights are found
  are taken away, the small files are put in, and the new weights take those names. A kill between the first and the
  last of these renames leaves a folder that loads nothing; the old checkpoint is in it still, and the next save puts it
  back.
"""

import filecmp
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kernelgraft.checkpoint.claims import Place, others
from kernelgraft.checkpoint.files import INDEX, SINGLE
from kernelgraft.checkpoint.switch import prepare, put_links, settle, sync_folders, turn
from kernelgraft.checkpoint.system import sync, uninterrupted
from kernelgraft.errors import SaveError

# What may hold weights that somebody loads together with the small files.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


@dataclass(frozen=True)
class Names:
    """The names by which a checkpoint's weights are found: a single file, or the index of several."""

    single: str = SINGLE
    index: str = INDEX

    @classmethod
    def of_variant(cls, variant: str | None) -> "Names":
        """The names with a variant in them, as Transformers spells them."""
        if variant is None:
            return cls()
        single, index = (".".join([*name.split(".")[:-1], variant, name.split(".")[-1]]) for name in (SINGLE, INDEX))
        return cls(single, index)

    def is_shard(self, name: str) -> bool:
        """Whether this is the name of one of several files, be it one that only stands in for the right one."""
        stem = re.escape(self.single.removesuffix(".safetensors"))
        return re.fullmatch(rf"{stem}(-kg[0-9a-f]{{8}})?-\d{{5}}-of-\d{{5}}\.safetensors", name) is not None

    def stand_in(self, shard: str, mark: str) -> str:
        """Another name for a shard; Transformers too takes it for one, and removes it when it saves anew."""
        stem = self.single.removesuffix(".safetensors")
        return f"{stem}-kg{mark}{shard.removeprefix(stem)}"


@contextmanager
def replacing(folder: str | Path, names: Names, obsolete: Sequence[str] = ()) -> Iterator[Path]:
    """Make a new checkpoint in the folder that this gives; at the end of the block it takes its place in `folder`.

    If the block fails, nothing in `folder` has changed.

    Args:
        folder: Where the checkpoint goes; made if it is not there. Other files in it stay.
        names: The names of its weights.
        obsolete: Names of files that must not stay, unless the new checkpoint has them.

    Raises:
        SaveError: It cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    made: list[Path] = []
    place: Place | None = None
    try:
        made = _make(folder)
        for path in made:
            sync(path.parent)
        place = Place.claimed(folder)
        try:
            for other in others(folder):
                if other != place and other.claim():
                    try:
                        _recover(other)
                        other.remove()
                    finally:
                        other.release()
            yield place.new
            _sync_tree(place.new)
            uninterrupted(_Commit(place, names, obsolete).run)
        finally:
            uninterrupted(place.release if place.is_needed else place.remove)
    except BaseException as error:
        for path in reversed(made):
            _remove_empty(path)
        if isinstance(error, OSError) and not isinstance(error, SaveError):
            left = "Nothing in it has changed."
            if place is not None and place.is_needed:
                left = (
                    f"Not all could be put back: the next save into it does that, and needs {place.inside} until then."
                )
            raise SaveError(
                error.errno,
                f"Saving into {folder} failed: {error.strerror or error}"
                f"{f' ({error.filename})' if error.filename else ''}. {left}",
            ) from error
        raise


def _make(folder: Path) -> list[Path]:
    """Make a folder; the folders that had to be made, outermost first."""
    missing: list[Path] = []
    path = folder
    while not path.exists():
        missing.insert(0, path)
        path = path.parent
    try:
        for path in missing:
            path.mkdir(exist_ok=True)
        folder.mkdir(exist_ok=True)  # an error if it is a file
    except OSError:
        for path in reversed(missing):
            _remove_empty(path)
        raise
    return missing


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # it was not made, or somebody has put something in
        folder.rmdir()


def _sync_tree(folder: Path) -> None:
    for path, folders, files in os.walk(folder):
        for name in (*files, *folders):
            sync(Path(path, name))
    sync(folder)


def _recover(dead: Place) -> None:
    """Undo what a killed save had begun, unless its checkpoint is there."""
    folder = dead.folder
    settle(dead)
    if any(".safetensors" in path.name for path in _files(dead.new)):
        kept, absent = _files(dead.aside), _files(dead.absent)
        for path in absent:
            (folder / path).unlink(missing_ok=True)
        # That by which weights are found comes last.
        for path in sorted(kept, key=lambda path: ".safetensors" in path.name):
            os.replace(dead.aside / path, folder / path)
        sync_folders(folder, [*kept, *absent])
    names = os.listdir(folder)
    found = {shard for name in names if ".safetensors.index" in name for shard in _named(folder / name)}
    for name in names:
        if f"-kg{dead.mark}-" in name and name not in found:
            os.unlink(folder / name)


def _named(index: Path) -> set[str]:
    """The files that an index names; none if it cannot be read."""
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()


def _files(folder: Path) -> list[Path]:
    """Paths of all files under a folder, relative to it."""
    return sorted(Path(path, name).relative_to(folder) for path, _, files in os.walk(folder) for name in files)


class _Commit:
    """The last step of a save."""

    def __init__(self, place: Place, names: Names, obsolete: Sequence[str]) -> None:
        self.place = place
        self.names = names
        self.folder = folder = place.folder
        new = _files(place.new)
        self.shards = [path.name for path in new if names.is_shard(str(path))]
        self.head = next((name for name in (names.index, names.single) if Path(name) in new), None)
        small = [path for path in new if path.name not in self.shards and str(path) != self.head]
        self.changed = [path for path in small if not _same(place.new / path, folder / path)]
        self.gone = [Path(name) for name in obsolete if (folder / name).exists() and Path(name) not in new]
        self._undo: list[Callable[[], object]] = []

    def run(self) -> None:
        """Let the new checkpoint take its place."""
        small = [*self.changed, *self.gone]
        holds_weights = any(name.endswith(_WEIGHTS) for name in os.listdir(self.folder))
        together = bool(small) and (holds_weights or any(os.path.lexists(self.folder / path) for path in small))
        self.place.is_needed = True
        try:
            stand_ins = self._put_shards()
            if not (together and self._switch()):
                if together:
                    self._take_away()
                self._put_small()
                self._put_head()
        except BaseException:
            with suppress(OSError):  # the first one is raised
                self._put_back()
            raise
        with suppress(OSError):
            # It is there. What follows puts in order, and the next save will where this one cannot.
            settle(self.place)
            sync(self.folder)
            self.place.is_needed = False
            self._remove_old(stand_ins)
            if stand_ins:
                self._rename_stand_ins(stand_ins)

    def _put_back(self) -> None:
        """Undo what was done. Where that fails, the place stays, and the next save does it."""
        if self.place.current.is_symlink():
            turn(self.place, self.place.old)
            settle(self.place)
        for step in reversed(self._undo):
            step()
        sync_folders(self.folder, [*self.changed, *self.gone])
        self.place.is_needed = False

    def _heads(self) -> list[Path]:
        """The names by which weights are found that change."""
        names = (self.names.single, self.names.index) if self.head is not None else ()
        return [Path(name) for name in names if name == self.head or os.path.lexists(self.folder / name)]

    def _move(self, source: Path, target: Path) -> None:
        """Rename a file; `target` must be free."""
        self._make_folder(target.parent)
        os.rename(source, target)
        self._undo.append(lambda: os.rename(target, source))

    def _make_folder(self, folder: Path) -> None:
        self._undo.extend(partial(_remove_empty, path) for path in _make(folder))

    def _put_shards(self) -> dict[str, str]:
        """Put shards into the folder; stand-ins for their names, by these, if one of them was taken."""
        taken = any(os.path.lexists(self.folder / name) for name in self.shards)
        stand_ins = {name: self.names.stand_in(name, self.place.mark) for name in self.shards} if taken else {}
        for name in self.shards:
            self._move(self.place.new / name, self.folder / stand_ins.get(name, name))
        if stand_ins and self.head is not None:
            # The right one is kept until names are right.
            index = json.loads((self.place.new / self.head).read_text(encoding="utf-8"))
            os.rename(self.place.new / self.head, self.place.inside / self.head)
            index["weight_map"] = {key: stand_ins[name] for key, name in index["weight_map"].items()}
            (self.place.new / self.head).write_text(json.dumps(index), encoding="utf-8")
            sync(self.place.new / self.head)
        sync(self.folder)
        return stand_ins

    def _switch(self) -> bool:
        """The commit of several files at once; false where the file system has no links."""
        paths = [*self.changed, *self.gone, *self._heads()]
        for path in self.changed:
            self._make_folder((self.folder / path).parent)
        if not prepare(self.place, paths):
            return False
        put_links(self.place, paths)
        turn(self.place, self.place.new)
        return True

    def _take_away(self) -> None:
        """What that switch replaces, where there are no links."""
        for path in self.changed:
            if not os.path.lexists(self.folder / path):
                # A recovery takes it away.
                mark = self.place.absent / path
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch()
        self._put_aside(*self._heads(), *self.changed, *self.gone)

    def _put_aside(self, *paths: Path) -> None:
        for path in paths:
            if os.path.lexists(self.folder / path):
                self._move(self.folder / path, self.place.aside / path)

    def _put_small(self) -> None:
        for path in self.changed:
            self._move(self.place.new / path, self.folder / path)
        if self.changed or self.gone:
            sync_folders(self.folder, [*self.changed, *self.gone])

    def _put_head(self) -> None:
        """The commit of one file: one step by which the weights are found, and the old ones no more."""
        if self.head is None:
            return
        if self.head == self.names.index and (self.folder / self.names.single).exists():
            # As long as the single file is there, it is what is loaded.
            self._put_aside(Path(self.head))
            self._move(self.place.new / self.head, self.folder / self.head)
            sync(self.folder)
            sync(self.place.new)  # the index is there: a recovery does not put the old one back
            os.unlink(self.folder / self.names.single)
        else:
            os.replace(self.place.new / self.head, self.folder / self.head)

    def _remove_old(self, stand_ins: dict[str, str]) -> None:
        """Remove the weights that nothing names any more."""
        kept = set(stand_ins.values()) or set(self.shards)
        for name in os.listdir(self.folder):
            stale_index = self.head == self.names.single and name == self.names.index
            if stale_index or (self.names.is_shard(name) and name not in kept):
                os.unlink(self.folder / name)

    def _rename_stand_ins(self, stand_ins: dict[str, str]) -> None:
        """Give shards their right names, by links, so that an index names complete files throughout."""
        assert self.head is not None
        linked: list[Path] = []
        try:
            for name, stand_in in stand_ins.items():
                os.link(self.folder / stand_in, self.folder / name)
                linked.append(self.folder / name)
            sync(self.folder)
        except OSError:
            for path in linked:
                path.unlink()
            raise
        os.replace(self.place.inside / self.head, self.folder / self.head)
        sync(self.folder)
        for stand_in in stand_ins.values():
            os.unlink(self.folder / stand_in)


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)
