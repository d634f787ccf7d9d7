"""Work done by a process of its own, that has all this one has loaded: it may be killed, or limited.

It must not be work that torch shares out among threads: in a forked process these never come.
"""

import os
import select
import signal
import sys
import threading
import traceback

from tqdm import tqdm


def forked(work, *args, kill_after=None):
    """Call `work` in a child process; how that ended: "done", "killed", or what it raised.

    With `kill_after` it is killed after so many seconds, if it is not done before.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _take_no_lock_along()
        said = "done"
        try:
            work(*args)
        except BaseException as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        sys.stderr.flush()
        os._exit(0)
    os.close(write)
    if kill_after is not None and not select.select([read], [], [], kill_after)[0]:
        os.kill(pid, signal.SIGKILL)
    with open(read, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    return "killed" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else said


def _take_no_lock_along():
    """Progress bars lock across processes: a child that is killed just then would keep their lock for ever.

    Each class of bars has one of its own if it was the first that was used, so all of them get another.
    """
    lock = threading.RLock()
    classes = [tqdm]
    for cls in classes:
        cls.set_lock(lock)
        classes += cls.__subclasses__()


def kill_self():
    """End this process as a machine that is switched off would: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()
