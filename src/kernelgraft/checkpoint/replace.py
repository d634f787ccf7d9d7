"""A checkpoint put into the place of another: at every moment a folder holds the one or the other, and no mixture.

What is new is made in a folder of its own and brought to the disk there. How it then takes its place depends on what
is in the folder, as `from_pretrained` looks for `config.json` and for `model.safetensors`, or else for the index:

- No weights yet: first the small files, then the weights, and at last the name by which they are found.
- The small files are what they were: shards come under names that are free, and one rename, or the removal of
  `model.safetensors`, makes them the checkpoint. If the shards had to take other names than they should have, they get
  the right ones by a second round of the same kind.
- Small files differ: the whole folder, with links to all else that is in it, changes places with the old one in one
  step of the file system. What cannot be linked (folders), folders that are mount points, the working folder, and file
  systems without such a step are done otherwise: the names by which the old weights are found are taken away, the
  small files are put in, and the new weights take those names. A kill between the first and the last of these renames
  leaves a folder that loads nothing; the old checkpoint is in it still, and the next save puts it back.
"""

import filecmp
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kernelgraft.checkpoint.claims import Place, others
from kernelgraft.checkpoint.files import INDEX, SINGLE
from kernelgraft.checkpoint.system import exchange, sync, uninterrupted
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
    try:
        made = _make(folder)
        place = Place.claimed(folder)
        try:
            for other in others(folder):
                if other != place and other.claim():
                    _recover(other)
                    other.remove()
            yield place.new
            _sync_tree(place.new)
            uninterrupted(_Commit(place, names, obsolete).run)
        finally:
            uninterrupted(place.remove)
    except BaseException as error:
        for path in reversed(made):
            with suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError) and not isinstance(error, SaveError):
            raise SaveError(
                error.errno,
                f"Saving into {folder} failed: {error.strerror or error}"
                f"{f' ({error.filename})' if error.filename else ''}. Nothing in it has changed.",
            ) from error
        raise


def _make(folder: Path) -> list[Path]:
    """Make a folder; the folders that had to be made, outermost first."""
    missing: list[Path] = []
    path = folder
    while not path.exists():
        missing.insert(0, path)
        path = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _sync_tree(folder: Path) -> None:
    for path, folders, files in os.walk(folder):
        for name in (*files, *folders):
            sync(Path(path, name))
    sync(folder)


def _recover(dead: Place) -> None:
    """Undo what a killed save had begun, unless its checkpoint is there: then no weights are where it was made."""
    folder = dead.folder
    if any(".safetensors" in path.name for path in _files(dead.new)):
        for path in _files(dead.aside):
            os.replace(dead.aside / path, folder / path)
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
        differs = bool(self.changed or self.gone)
        holds_weights = any(name.endswith(_WEIGHTS) for name in os.listdir(self.folder))
        if differs and holds_weights and self._exchange_folders():
            return
        try:
            stand_ins = self._put_shards()
            if differs and holds_weights:
                self._put_aside(Path(self.names.index), Path(self.names.single))
            self._put_small()
            self._put_head()
        except BaseException:
            for step in reversed(self._undo):
                step()
            raise
        with suppress(OSError):
            # It is there. What follows puts in order, and the next save will where this one cannot.
            sync(self.folder)
            self._remove_old(stand_ins)
            if stand_ins:
                self._rename_stand_ins(stand_ins)

    def _move(self, source: Path, target: Path) -> None:
        """Rename a file; `target` must be free."""
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(source, target)
        self._undo.append(lambda: os.rename(target, source))

    def _put_shards(self) -> dict[str, str]:
        """Put shards into the folder; stand-ins for their names, by these, if one of them was taken."""
        taken = any((self.folder / name).exists() for name in self.shards)
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

    def _put_aside(self, *paths: Path) -> None:
        for path in paths:
            if (self.folder / path).exists():
                self._move(self.folder / path, self.place.aside / path)

    def _put_small(self) -> None:
        self._put_aside(*self.changed, *self.gone)
        for path in self.changed:
            self._move(self.place.new / path, self.folder / path)
        if self.changed or self.gone:
            sync(self.folder)

    def _put_head(self) -> None:
        """The commit: one step by which the weights are found, and the old ones no more."""
        if self.head is None:
            return
        if self.head == self.names.index and (self.folder / self.names.single).exists():
            # As long as the single file is there, it is what is loaded.
            self._put_aside(Path(self.head))
            self._move(self.place.new / self.head, self.folder / self.head)
            sync(self.folder)
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

    def _exchange_folders(self) -> bool:
        """Let a folder with all that shall be there change places with the old one; false if that cannot be done."""
        folder, place = self.folder, self.place
        there = sorted(set(os.listdir(folder)) - {place.inside.name})
        kept = [name for name in there if not self._is_replaced(name)]
        if os.path.ismount(folder) or not all(_can_be_linked(folder / name) for name in there):
            return False
        try:
            if folder.samefile(Path.cwd()):
                return False
            os.rename(place.new, place.beside)
        except OSError:
            return False
        linked: list[str] = []
        try:
            _become(place.beside, folder)
            for name in kept:
                os.link(folder / name, place.beside / name, follow_symlinks=False)
                linked.append(name)
            sync(place.beside)
            sync(folder.parent)
            done = exchange(folder, place.beside)
        except OSError:
            done = False
        if not done:
            for name in linked:
                os.unlink(place.beside / name)
            os.rename(place.beside, place.new)
            return False
        with suppress(OSError):
            sync(folder.parent)
        self._bring_latecomers()
        return True

    def _is_replaced(self, name: str) -> bool:
        """Whether what has this name in the old folder has no place in the new one."""
        weights = (self.names.single, self.names.index)
        return (
            (self.place.new / name).exists()
            or Path(name) in self.gone
            or (self.head is not None and (name in weights or self.names.is_shard(name)))
        )

    def _bring_latecomers(self) -> None:
        """What others wrote into the old folder at the last moment comes into the new one."""
        old, new = self.place.beside, self.folder
        for name in set(os.listdir(old)) - {self.place.inside.name}:
            weights = (self.names.single, self.names.index, *map(str, (*self.changed, *self.gone)))
            there = new / name
            is_theirs = name not in weights and not self.names.is_shard(name)
            if is_theirs and not (there.exists() and there.samefile(old / name)):
                with suppress(OSError):
                    os.replace(old / name, there)
        with suppress(OSError):
            sync(new)


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def _can_be_linked(path: Path) -> bool:
    return path.is_symlink() or path.is_file()


def _become(folder: Path, model: Path) -> None:
    """Give a folder the mode, the times and the owner of another.

    Raises:
        OSError: The owner cannot be changed.
    """
    wanted, found = model.stat(), folder.stat()
    if (wanted.st_uid, wanted.st_gid) != (found.st_uid, found.st_gid):
        os.chown(folder, wanted.st_uid, wanted.st_gid)
    shutil.copystat(model, folder)
