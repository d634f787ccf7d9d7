"""What a save or a load may leave behind, and must not."""

import os
import threading
from contextlib import suppress


def open_files(folder):
    """The files under a folder that this process has open (a mapped file needs no descriptor)."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that lists them is gone
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [path for path in found if path.startswith(f"{folder}{os.sep}")]


def mappings(folder):
    """The lines of this process's memory map that are files in a folder."""
    with open("/proc/self/maps") as lines:
        return [line for line in lines if str(folder) in line]


def our_threads():
    """Threads that we started."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("kernelgraft")]


def temporary_files(folder):
    """What of a save is in a folder."""
    return [path for path in folder.rglob("*") if "kernelgraft-save" in path.name]


def assert_nothing_left(folder):
    """Nothing of these is left."""
    assert temporary_files(folder) == []
    assert open_files(folder) == []
    assert our_threads() == []
