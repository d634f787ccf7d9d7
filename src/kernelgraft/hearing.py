"""Hears of every `__init__` that a thread runs.

From Python 3.12 on through `sys.monitoring`, which lets go of all other functions: what builds a model of a thousand
modules takes as long as without. Before, through `sys.setprofile`, which sees each call of any function and takes about
as long again.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

from kernelgraft.errors import GraftError

Hear = Callable[[FrameType], None]
"""Gets the frame of a function of this name that begins, or that has just begun; it must not raise."""

_NAME = "__init__"


@contextmanager
def inits_heard(hear: Hear) -> Iterator[None]:
    """Inside the block `hear` is called for every `__init__` that begins in this thread.

    Raises:
        GraftError: Before Python 3.12, see `kernelgraft.recorded`.
    """
    monitoring = getattr(sys, "monitoring", None)
    if monitoring is not None and _monitor.begin(monitoring, hear):
        try:
            yield
        finally:
            _monitor.end(monitoring, hear)
    else:
        with _profiled(hear):
            yield


class _Monitor:
    """The one tool of `sys.monitoring` that we take, while any thread listens."""

    # Those that Python gives no name to; a debugger, coverage and profilers have others.
    TOOLS = (3, 4)

    def __init__(self) -> None:
        self._hearing: dict[int, tuple[Hear, ...]] = {}
        self._tool: int | None = None
        self._lock = threading.Lock()

    def begin(self, monitoring: Any, hear: Hear) -> bool:
        """Listen in this thread; `False` if others have all the tools."""
        with self._lock:
            if self._tool is None:
                free = [tool for tool in self.TOOLS if monitoring.get_tool(tool) is None]
                if not free:
                    return False
                self._tool = free[0]
                monitoring.use_tool_id(self._tool, "kernelgraft")
                start = monitoring.events.PY_START
                monitoring.register_callback(self._tool, start, self._started(monitoring.DISABLE))
                monitoring.set_events(self._tool, start)
            thread = threading.get_ident()
            self._hearing[thread] = (*self._hearing.get(thread, ()), hear)
        return True

    def end(self, monitoring: Any, hear: Hear) -> None:
        """Stop listening."""
        with self._lock:
            thread = threading.get_ident()
            left = tuple(each for each in self._hearing.pop(thread) if each is not hear)
            if left:
                self._hearing[thread] = left
            if not self._hearing:
                assert self._tool is not None
                monitoring.set_events(self._tool, 0)
                monitoring.register_callback(self._tool, monitoring.events.PY_START, None)
                monitoring.free_tool_id(self._tool)
                self._tool = None

    def _started(self, disable: object) -> Callable[[CodeType, int], Any]:
        def started(code: CodeType, _: int) -> Any:
            if code.co_name != _NAME:
                return disable  # not called for this function any more
            for hear in self._hearing.get(threading.get_ident(), ()):
                hear(sys._getframe(1))
            return None

        return started


_monitor = _Monitor()


@contextmanager
def _profiled(hear: Hear) -> Iterator[None]:
    """Through `sys.setprofile`; beside a profiler that has that place and is written in C, through `sys.settrace`."""
    before: Any = sys.getprofile()
    read: Callable[[], Any] = sys.getprofile
    write: Callable[[Any], None] = sys.setprofile
    # A C profiler (cProfile, torch.profiler with with_stack) shows as an object that cannot be called, and that nothing
    # in Python could put back.
    if before is not None and not callable(before):
        if sys.gettrace() is not None:
            raise GraftError(
                f"constructor arguments cannot be recorded: a profiler ({before!r}) and a tracer ({sys.gettrace()!r}) "
                "are both running in this thread. Stop one of them while the model is built, or build it in another "
                "thread."
            )
        before, read, write = None, sys.gettrace, sys.settrace
    ours = _listener(hear, before)
    write(ours)
    try:
        yield
    except BaseException:
        if read() is ours:
            write(before)
        raise
    if read() is not ours:
        raise GraftError(
            f"the profile or trace function of this thread was replaced by {read()!r} while constructor arguments were "
            "being recorded, so the record has holes. Start the profiler before the block, and stop it after it."
        )
    write(before)


def _listener(hear: Hear, before: Callable[..., Any] | None) -> Callable[..., None]:
    # Runs at every call, return and C call of the thread, so the first lines decide; it must never raise, because then
    # the interpreter drops it. As a trace function it returns None: no line events.
    def listen(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name == _NAME:
            hear(frame)

    def listen_and_relay(frame: FrameType, event: str, argument: Any) -> None:
        before(frame, event, argument)  # type: ignore[misc]
        if event == "call" and frame.f_code.co_name == _NAME:
            hear(frame)

    return listen if before is None else listen_and_relay
