"""What is on a disk at every step of a program, for a process that is killed there and for a machine without power.

Without power a folder has of each name what it had at some moment since it was last synced, whichever, and a file that
was not synced says nothing of what was written into it. File systems with a journal lose less.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from kills import STEPS

LOST = "lost"


@dataclass(frozen=True)
class Moment:
    """A tree at one moment.

    Attributes:
        root: The number of its outermost folder.
        folders: For each folder what it has had by name since it was last synced, the present in the end.
        files: For each file what it says, and what of it is on the disk.
        links: The target of each link.
    """

    root: int
    folders: dict[int, tuple[dict[str, int], ...]]
    files: dict[int, tuple[str, str]]
    links: dict[int, str]

    def killed(self, path):
        """Make the tree as a killed process leaves it."""
        self._make(self.root, path, lambda history: history[-1], 0, {})

    def without_power(self, path, choose):
        """Make a tree that is left without power; `choose` makes a folder of what it had since it was last synced."""
        self._make(self.root, path, choose, 1, {})

    def _make(self, number, path, choose, which, made):
        if number in self.links:
            os.symlink(self.links[number], path)
        elif number in self.files and number in made:
            os.link(made[number], path)
        elif number in self.files:
            made[number] = path
            path.write_text(self.files[number][which])
        else:
            path.mkdir()
            for name, child in choose(self.folders[number]).items():
                self._make(child, path / name, choose, which, made)


def least(history):
    """Of what is not synced nothing is there."""
    return history[0]


def any_part(drawn):
    """Of what is not synced any part is there, as a random generator draws."""

    def choose(history):
        if any("lock" in names for names in history) or drawn.randrange(2):
            # Of the folder of a save the lock goes last.
            return drawn.choice(history)
        found = {name: drawn.choice(history).get(name) for name in {name: 0 for names in history for name in names}}
        return {name: number for name, number in found.items() if number is not None}

    return choose


def visibly_different(moments):
    """The moments without those that a killed process leaves as the one before."""
    found = []
    for moment in moments:
        folders = {number: history[-1] for number, history in moment.folders.items()}
        seen = folders, {number: said for number, (said, _) in moment.files.items()}, moment.links
        if not found or seen != found[-1][0]:
            found.append((seen, moment))
    return [moment for _, moment in found]


class Disk:
    """Watches a tree while something changes it. What is there at first is on the disk."""

    def __init__(self, root):
        self.moments: list[Moment] = []
        self._root = Path(root)
        self._numbers: dict[int, int] = {}  # by inode; one that is free again gets another number
        self._count = 0
        self._folders: dict[int, tuple[dict[str, int], ...]] = {}
        self._files: dict[int, tuple[str, str]] = {}
        self._links: dict[int, str] = {}
        self._look(is_synced=True)

    def watch(self, patch):
        """From now on keep each moment, and let nothing wait for the real disk."""
        for name in STEPS:
            patch.setattr(os, name, self._watched(getattr(os, name)))

        def fsync(fd):
            self._look()
            number = self._numbers[os.fstat(fd).st_ino]
            if number in self._files:
                self._files[number] = (self._files[number][0],) * 2
            else:
                self._folders[number] = self._folders[number][-1:]
            self._look()

        patch.setattr(os, "fsync", fsync)

    def _watched(self, call):
        def watched(*args, **kwargs):
            self._look()
            try:
                return call(*args, **kwargs)
            finally:
                self._look()

        return watched

    def _look(self, is_synced=False):
        seen: set[int] = set()
        root = self._visit(self._root, seen, is_synced)
        self._numbers = {inode: number for inode, number in self._numbers.items() if inode in seen}
        moment = Moment(root, self._folders.copy(), self._files.copy(), self._links.copy())
        if not self.moments or moment != self.moments[-1]:
            self.moments.append(moment)

    def _visit(self, path, seen, is_synced):
        inode = path.lstat().st_ino
        seen.add(inode)
        if inode not in self._numbers:
            self._count += 1
            self._numbers[inode] = self._count
        number = self._numbers[inode]
        if path.is_symlink():
            self._links[number] = os.readlink(path)
        elif path.is_file():
            said = path.read_text()
            self._files[number] = said, said if is_synced else self._files.get(number, (said, LOST))[1]
        else:
            found = {each.name: self._visit(each, seen, is_synced) for each in sorted(path.iterdir())}
            history = self._folders.get(number, () if is_synced else ({},))
            self._folders[number] = history if history[-1:] == (found,) else (*history, found)
        return number
