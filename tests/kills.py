"""Steps that change the disk: the process is killed in front of one, or one fails."""

import errno
import os
import threading

from forked import kill_self

# What changes the disk, as the code under test calls it.
STEPS = (
    *("rename", "replace", "link", "symlink", "unlink", "rmdir", "mkdir"),
    *("open", "fsync", "ftruncate", "pwrite", "chmod"),
)

# Those of them that a full or a broken disk refuses.
FAILING = ("rename", "replace", "link", "symlink", "mkdir", "unlink", "fsync")


def kill_at(n):
    """In this process: die in front of the `n`-th call that changes the disk; how many there were, in a list."""
    turn, count = threading.Lock(), [0]

    def dying(call):
        def counted(*args, **kwargs):
            with turn:
                count[0] += 1
                if count[0] == n:
                    kill_self()
            return call(*args, **kwargs)

        return counted

    for name in STEPS:
        setattr(os, name, dying(getattr(os, name)))
    return count


def refuse(patch, name, code=errno.EPERM):
    """Let a call of `os` do nothing and fail."""

    def refuses(*_, **__):
        raise OSError(code, os.strerror(code))

    patch.setattr(os, name, refuses)


def fail(patch, first, last):
    """Let the calls from number `first` to `last` fail, as a full or a broken disk does; their count in a list."""
    count = [0]

    def failing(call):
        def called(*args, **kwargs):
            count[0] += 1
            if first <= count[0] <= last:
                raise OSError(errno.EIO, "Input/output error")
            return call(*args, **kwargs)

        return called

    for name in FAILING:
        patch.setattr(os, name, failing(getattr(os, name)))
    return count
