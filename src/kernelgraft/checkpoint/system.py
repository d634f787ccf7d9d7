"""What Linux offers savers beyond `os`: room taken at once, and a claim that dies with its process.

Elsewhere, and on file systems that refuse, each function says so or does the next best thing.
"""

import ctypes
import errno
import os
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

_UNSUPPORTED = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY})


def allocate(fd: int, nbytes: int) -> None:
    """Give an open file its length, and room on the disk too where the file system can take it at once.

    Raises:
        OSError: There is no room, or the file may not be so long.
    """
    # Not `os.posix_fallocate`: where the file system cannot, that writes a byte into every block.
    fallocate = getattr(_libc(), "fallocate", None) if sys.platform == "linux" else None
    if fallocate is not None and nbytes:
        while fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)):
            code = ctypes.get_errno()
            if code in _UNSUPPORTED:
                break
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
    os.ftruncate(fd, nbytes)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network file systems do not sync folders: they do it at every rename.
        if not path.is_dir() or error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(fd)


def claim(fd: int) -> bool | None:
    """Claim an open file until it is closed or the process ends, however it ends.

    Returns:
        True if it is ours now, False if another has it, and `None` where the file system has no such claims.
    """
    try:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError):
        return None
    return True


def uninterrupted(work: Callable[[], object], on_interrupt: Callable[[], object] = lambda: None) -> None:
    """Do something to its end: Ctrl-C, which only the main thread is told of, takes effect after it.

    Args:
        work: What to do; it runs in a thread of its own.
        on_interrupt: Called, perhaps more than once, when Ctrl-C has come, so that the work can end earlier.
    """
    turn, done = threading.Lock(), threading.Event()
    begun: list[bool] = []
    raised: list[BaseException] = []

    def run() -> None:
        with turn:
            if begun:
                return
            begun.append(True)
        try:
            work()
        except BaseException as error:  # raised again where it was asked for
            raised.append(error)
        finally:
            done.set()

    interrupt: KeyboardInterrupt | None = None
    thread: threading.Thread | None = None
    while not done.is_set() or (thread is not None and thread.is_alive()):
        try:
            if interrupt is not None:
                on_interrupt()
            if not begun:
                # Ctrl-C may come between the start of a thread and our knowing of it: the second one does nothing.
                thread = threading.Thread(target=run, name="kernelgraft-save")
                thread.start()
            done.wait()
            if thread is not None:
                thread.join()
        except KeyboardInterrupt as error:
            interrupt = error
    for failure in (*raised, interrupt):
        if failure is not None:
            raise failure


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
