"""Folders that belong to one save: where a new checkpoint is made, and what a save that was killed has left behind.

A save claims a folder of its own inside the one it saves into. Its name says whose it is, and a lock in it, which the
kernel of the system drops when the process ends, says whether the save is still under way.
"""

import errno
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from kernelgraft.checkpoint.system import claim
from kernelgraft.errors import SaveError

_NAME = ".kernelgraft-save-"
_LOCK = "lock"


class Place:
    """What one save has to itself. Two are equal if they are of the same save.

    Attributes:
        folder: The folder that is saved into.
        mark: What tells this save from others.
        inside: The save's folder, inside `folder`.
        new: Where the new checkpoint is made.
        old: What it replaces, where several files change through links.
        current: The link that they change through, to `old` or to `new`; not there otherwise.
        links: The links to files in it, before they are put into `folder`.
        aside: What it replaces, where there are no links.
        absent: Empty files for what is not replaced but new, where there are no links.
        is_needed: Whether files of `folder` may be in here alone, so that it must stay for the next save.
    """

    def __init__(self, folder: Path, mark: str) -> None:
        self.folder = folder
        self.mark = mark
        self.inside = folder / f"{_NAME}{mark}"
        self.new = self.inside / "new"
        self.old = self.inside / "old"
        self.current = self.inside / "current"
        self.links = self.inside / "links"
        self.aside = self.inside / "aside"
        self.absent = self.inside / "absent"
        self.is_needed = False
        self._lock: int | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Place) and other.inside == self.inside

    def __hash__(self) -> int:
        return hash(self.inside)

    @classmethod
    def claimed(cls, folder: Path) -> "Place":
        """A place for a new save into `folder`.

        Raises:
            SaveError: Another save into it is under way.
        """
        while True:
            place = cls(folder, secrets.token_hex(4))
            place.inside.mkdir()
            try:
                mine = place.claim(make=True)
                if mine is False or any(each.is_alive() for each in others(folder) if each != place):
                    raise _under_way(folder)
                place.new.mkdir()
            except FileNotFoundError:  # another save took it for that of a dead one
                place.release()
                continue
            except BaseException:
                place.remove()
                raise
            return place

    def claim(self, *, make: bool = False) -> bool | None:
        """Make the place ours. False if a save that is under way has it, `None` if that cannot be known."""
        flags = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | (os.O_CREAT if make else 0)
        try:
            self._lock = os.open(self.inside / _LOCK, flags, 0o666)
        except FileNotFoundError:
            if make:
                raise
            # A save that is about to lock its place has nothing in it, and makes another one if it is gone.
            return not any(files for _, _, files in os.walk(self.inside)) or None
        found = claim(self._lock)
        if not found and not make:
            self.release()
        return found

    def is_alive(self) -> bool:
        """Whether a save that is under way has the place."""
        found = self.claim()
        self.release()
        return found is False

    def remove(self) -> None:
        """Remove all that is left of it, its lock in the end, and let go of it."""
        with suppress(OSError):
            for name in os.listdir(self.inside):
                if name != _LOCK:
                    shutil.rmtree(self.inside / name, ignore_errors=True)
                    with suppress(OSError):
                        os.unlink(self.inside / name)
        shutil.rmtree(self.inside, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Let go of it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _under_way(folder: Path) -> SaveError:
    return SaveError(
        errno.EBUSY,
        f"Another save into {folder} is under way, in this process or in another one. Wait for it, or save into "
        f"another folder.",
    )


def others(folder: Path) -> list[Place]:
    """The places of all saves into `folder`, dead and alive."""
    names: list[str] = []
    with suppress(OSError):
        names = sorted(name for name in os.listdir(folder) if name.startswith(_NAME))
    return [Place(folder, name.removeprefix(_NAME)) for name in names]
