"""Processes that get ready side by side, wait, and are then asked in turn: what is measured has the machine to itself.

Both ends are here. What a process says is a line of JSON behind a mark, so that whatever else a library prints is not
taken for it. The process ends when its parent does, because its input does.
"""

import contextlib
import faulthandler
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NoReturn

from benchmarks import machine
from benchmarks.kernels.measure import Skipped

Said = dict[str, Any]
"""What a process says; with "error" or "skipped" in it, it is the last that it does."""

MARK = "::said "
NOTE = "note"
CHILD = "--child"
_POLL_S = 0.02
_WHERE_S = 2.0
_BEGAN = time.monotonic()


def note(line: str) -> None:
    """Print a line of progress."""
    print(f"[{time.monotonic() - _BEGAN:4.0f} s] {line}", flush=True)


class Process:
    """A process of a script: started at once, and asked later.

    Args:
        name: What lines of progress call it.
        module: The script, which is started with `CHILD` and the arguments.
        arguments: Its command line.
        environment: Variables that it has beside ours.
    """

    def __init__(
        self, name: str, module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        path = os.pathsep.join(filter(None, [str(machine.ROOT / "src"), os.environ.get("PYTHONPATH")]))
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, CHILD, *arguments],
            cwd=machine.ROOT,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to: IO[str] = self._process.stdin
        self._said: queue.Queue[Said | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, lines: IO[str]) -> None:
        with lines:
            for line in lines:
                if not line.startswith(MARK):
                    continue
                said = json.loads(line.removeprefix(MARK))
                if NOTE in said:
                    note(f"{self.name}: {said[NOTE]}")
                else:
                    self._said.put(said)
        self._said.put(None)

    @property
    def has_spoken(self) -> bool:
        """Whether there is something to hear, if only that it has ended."""
        return not self._said.empty()

    def hear(self, limit_s: float) -> Said:
        """What it says next. If it ends or stays silent, that is an error that it is taken to say."""
        try:
            said = self._said.get(timeout=max(limit_s, _POLL_S))
        except queue.Empty:
            self.say_where()
            said = {"error": f"the process said nothing for {limit_s:.0f} s"}
        if said is None:
            code = self._process.wait()
            said = {"error": f"the process ended with code {code}: {(self._logged().splitlines() or [''])[-1]}"[:500]}
        return self.end(said) if "error" in said or "skipped" in said else said

    def end(self, why: Said) -> Said:
        """End it for a reason, which is printed with what it has logged."""
        for what in ("error", "skipped"):
            if what in why:
                note(f"{self.name}: {what}: {why[what]}")
        if "error" in why:
            print(self._logged()[-4000:], file=sys.stderr, flush=True)
        self.close()
        return why

    def say_where(self) -> None:
        """Have it log what it is at, which takes it no time unless it is stopped."""
        logged, ends = os.fstat(self._log.fileno()).st_size, time.monotonic() + _WHERE_S
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1)
        while self._process.poll() is None and os.fstat(self._log.fileno()).st_size == logged:
            if time.monotonic() > ends:
                return
            time.sleep(_POLL_S)
        time.sleep(_POLL_S)  # the lines behind the first

    def _logged(self) -> str:
        self._log.seek(0)
        return self._log.read().strip()

    def ask(self, word: str, limit_s: float) -> Said:
        """Tell it what to do, and hear what comes of it."""
        with contextlib.suppress(OSError, ValueError):  # it may have ended, and `hear` says so
            self._to.write(word + "\n")
            self._to.flush()
        return self.hear(limit_s)

    def finish(self, limit_s: float) -> None:
        """Let it end by itself, so that it is off the machine before the next one is asked."""
        with contextlib.suppress(OSError, ValueError):
            self._to.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(limit_s)
        self.close()

    def close(self) -> None:
        """End it if it has not ended."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join(1)  # what the process has started itself may hold its output open for longer
        with contextlib.suppress(OSError, ValueError):
            self._to.close()
        self._log.close()


def when_ready(processes: Sequence[Process], limit_s: float) -> Iterator[tuple[Process, Said]]:
    """What each process says first, as it comes. Those that are silent past the limit are ended, which is an error."""
    pending, ends = list(processes), time.monotonic() + limit_s
    while pending:
        late = time.monotonic() > ends
        for process in [each for each in pending if late or each.has_spoken]:
            pending.remove(process)
            if process.has_spoken:
                yield process, process.hear(0)
            else:
                process.say_where()
                yield process, process.end({"error": f"the process was not ready within {limit_s:.0f} s"})
        time.sleep(_POLL_S)


@contextlib.contextmanager
def closing(processes: Sequence[Process]) -> Iterator[None]:
    """End what has not ended of them, whatever happens in between."""
    try:
        yield
    finally:
        for process in processes:
            process.close()


# --- in such a process


def say(**what: Any) -> None:
    """Tell the parent."""
    print(f"\n{MARK}{json.dumps(what)}", flush=True)  # a line of its own, whatever a library has begun to print


def told() -> str:
    """Wait for what the parent asks for; empty once it has nothing more to ask, or is gone."""
    return sys.stdin.readline().strip()


def serve(work: Callable[[], None]) -> NoReturn:
    """Do the work of such a process, tell why it fails if it does, and end the process."""
    code = 0
    faulthandler.register(signal.SIGUSR1)
    try:
        work()
    except Skipped as reason:
        say(skipped=str(reason))
    except Exception as error:
        traceback.print_exception(error, limit=-8, file=sys.stderr)
        first = (str(error).strip().splitlines() or [""])[0]
        say(error=f"{type(error).__name__}: {first}"[:500])
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Python takes seconds to take everything down, and the next process waits for that
