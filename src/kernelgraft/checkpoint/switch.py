"""Files of a folder that become others in one step: the renaming of one symbolic link.

In a save's own folder lie `old`, with what the files are (hard links), `new`, with what they shall be, and `current`, a
link to one of the two. First each file is replaced by a link to the file of its name in `current`: it says what it
said. A name that is not there is a link to nothing, which counts as absent. Then `current` is replaced, which is the
step. In the end each link is replaced by a file again, which says what the link said.

Whoever finds this half done, be it after a kill or a loss of power, finds every file as it was before the step or every
file as it is after it, and `settle` makes files of the links that are left. What a rename relies on is on the disk
before it: `old`, `new` and `current` before the first link, all links before the step, the step before the first file.
"""

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from kernelgraft.checkpoint.claims import Place
from kernelgraft.checkpoint.system import sync

# What file systems say that have no symbolic links, or no hard links of these files.
_NO_LINKS = frozenset(
    {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EMLINK, errno.EXDEV, errno.EROFS}
)


def prepare(place: Place, paths: Sequence[Path]) -> bool:
    """Make what the step needs. No file in the folder changes.

    Args:
        place: Whose `new` has what the files shall be.
        paths: The files, relative to the folder. One that is not in `new` shall be absent.

    Returns:
        False where there are no links; then the step cannot be done.

    Raises:
        OSError: The disk is full, or fails.
    """
    place.old.mkdir()
    try:
        for path in paths:
            file, kept, link = (top / path for top in (place.folder, place.old, place.links))
            for each in (kept, link):
                each.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(os.path.relpath(place.current / path, os.path.realpath(file.parent)), link)
            if os.path.lexists(file):
                _make_twin(file, kept, kept.parent)
        os.symlink(place.old.name, place.current)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return False
    for tree in (place.old, place.new):
        for made in [Path(at) for at, _, _ in os.walk(tree)]:
            _open_as(place.folder / made.relative_to(tree), place.folder, made)
            sync(made)
    _open_as(place.folder, place.folder, place.inside)
    sync(place.inside)
    return True


def put_links(place: Place, paths: Sequence[Path]) -> None:
    """Put a link into the place of each file. What it says stays the same."""
    for path in paths:
        os.replace(place.links / path, place.folder / path)
    sync_folders(place.folder, paths)


def turn(place: Place, to: Path) -> None:
    """The step, to the place's `new`; or back, to its `old`."""
    if os.readlink(place.current) == to.name:
        return
    following = place.inside / "following"
    following.unlink(missing_ok=True)
    os.symlink(to.name, following)
    os.replace(following, place.current)
    sync(place.inside)


def settle(place: Place) -> None:
    """Put a file into the place of each link that is left. What it says stays the same.

    It may be killed and called again.
    """
    if not place.current.is_symlink():
        return
    paths = sorted(
        Path(at, name).relative_to(tree)
        for tree in (place.old, place.new)
        for at, folders, files in os.walk(tree)
        for name in (*folders, *files)
    )
    said = place.inside / os.readlink(place.current)
    for path in paths:
        link = place.folder / path
        if not _is_ours(link, place, path):
            continue
        if os.path.lexists(said / path):
            _put(said / path, link, place.inside / "twin")
        else:
            link.unlink()
    # Also what was put by somebody who was killed before this.
    sync_folders(place.folder, paths)


def sync_folders(folder: Path, paths: Iterable[Path]) -> None:
    """Bring to the disk which files, relative to a folder, are there, and which of the folders that they are in."""
    for each in sorted({Path(), *(parent for path in paths for parent in path.parents)}, reverse=True):
        if (folder / each).is_dir():
            sync(folder / each)


def _is_ours(link: Path, place: Place, path: Path) -> bool:
    """Whether it is a link into the place; the folder may have been moved since it was made."""
    end = os.path.join(place.inside.name, place.current.name, path)
    return link.is_symlink() and os.readlink(link).endswith(end)


def _put(source: Path, link: Path, twin: Path) -> None:
    # By a twin, because a reader may be on its way through the link: what it leads to must stay a while.
    twin.unlink(missing_ok=True)
    try:
        _make_twin(source, twin, link.parent)
    except OSError:
        if source.is_symlink():
            raise
        twin = source  # a full disk has room for this
    os.replace(twin, link)


def _make_twin(source: Path, twin: Path, where: Path) -> None:
    """Make `twin` say in the folder `where` what `source` says in its own."""
    if not source.is_symlink():
        os.link(source, twin)
        return
    target = os.readlink(source)
    if not os.path.isabs(target):
        here, there = os.path.realpath(source.parent), os.path.realpath(where)
        # A link that is brought back gets the target that it had.
        back = os.path.join(os.path.relpath(there, here), "")
        is_back = target.startswith(back)
        target = target.removeprefix(back) if is_back else os.path.join(os.path.relpath(here, there), target)
    os.symlink(target, twin)


def _open_as(model: Path, otherwise: Path, folder: Path) -> None:
    """Let those read through a folder who may read what is in another."""
    wanted, found = (model if model.is_dir() else otherwise).stat(), folder.stat()
    with suppress(OSError):
        if wanted.st_gid != found.st_gid:
            os.chown(folder, -1, wanted.st_gid)
        if wanted.st_uid != found.st_uid:
            os.chown(folder, wanted.st_uid, -1)
    with suppress(OSError):
        folder.chmod(stat.S_IMODE(wanted.st_mode) | stat.S_IRWXU)
