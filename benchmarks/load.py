"""Loading, updating and saving at the speed of the machine: makes the table of issue 5.

    PYTHONPATH=src python benchmarks/load.py all
    PYTHONPATH=src python benchmarks/load.py gpu --rows 'limit-*,ours-*'

Every repetition is a process of its own, and the cases take turns. Raw rows go to `benchmarks/results/`; what they
hold is said there. `--table` prints the table of rows that were measured before.
"""

import argparse
import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import machine
import models
import pages
import table
from cases import GROUPS, Case, small
from watch import Watch

HERE = Path(__file__).resolve().parent
IMPORT_LIMIT_S = 600
# A load to the GPU takes little of the host; one to the CPU its model, and what Transformers needs beside it.
ALL = "all"
GPU_RESERVE_GB = 4
CPU_RESERVE = 1.4


class Worker:
    """A process that imports what a case needs and then waits for its turn."""

    def __init__(self, case: Case, asked: argparse.Namespace) -> None:
        self.case = case
        command = [sys.executable, str(HERE / "worker.py"), case.measure, json.dumps(dict(case.arguments))]
        command += ["--model", case.model, "--folder", str(asked.folder), "--device", asked.device]
        command += ["--small"] if asked.small else []
        command += ["--profile"] if asked.profile else []
        path = os.pathsep.join(filter(None, [str(machine.ROOT / "src"), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if asked.profile else self._log,
            env=environment,
            bufsize=0,
        )
        self._pending = b""

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def go(self) -> None:
        """Let it measure."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has failed, and the answer says how
            self._process.stdin.write(b"go\n")

    def answer(self, limit_s: float) -> dict[str, Any]:
        """The next line that it sends; an error if none comes."""
        assert self._process.stdout is not None
        end = time.monotonic() + limit_s
        while b"\n" not in self._pending:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                return {"error": f"no answer within {limit_s:.0f} s"}
            data = self._process.stdout.read(1 << 16)
            if not data:
                return {"error": f"the process ended with code {self._process.wait()}"}
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def log(self, most: int = 12) -> str:
        """The end of what it printed."""
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-most:])

    def close(self) -> None:
        """End it if it has not ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._process.poll() is None:
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._log.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == [ALL]:
        for group in GROUPS:
            main([group, *given[1:]])
        return
    asked = _parsed(given)
    if asked.table:
        rows = [json.loads(line) for file in asked.table for line in file.read_text().splitlines()]
        print("\n\n".join(table.by_run(rows, asked.group)))
        return
    cases = [case for case in GROUPS[asked.group] if any(fnmatchcase(case.name, each) for each in asked.rows)]
    if not cases:
        names = ", ".join(case.name for case in GROUPS[asked.group])
        sys.exit(f"No row of {asked.group!r} matches {','.join(asked.rows)!r}. There are: {names}.")
    if asked.small:
        cases = [small(case) for case in cases]
    session = Session(asked)
    session.prepare({case.model for case in cases})
    session.measure(cases)
    print("\n" + "\n\n".join([*table.by_run(session.rows, asked.group), str(session.file)]), flush=True)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=[*GROUPS, ALL], help=f"{ALL}: one after the other")
    parser.add_argument("--rows", default="*", help="names of rows, or patterns, joined by commas (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="processes for each row (default: 5)")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written, and found again")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where the rows go")
    parser.add_argument("--small", action="store_true", help="tiny models: a trial of the program")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cpu tries the rows of 'gpu' that need none")
    parser.add_argument("--reserve", type=float, help="GB of memory kept warm for each measurement")
    parser.add_argument("--budget", type=float, help="seconds after which no further round starts")
    parser.add_argument("--profile", action="store_true", help="one process for each row under cProfile; no rows")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of these files, and measure nothing")
    asked = parser.parse_args(arguments)
    asked.rows = asked.rows.split(",")
    asked.device = asked.device or ("cuda" if asked.group == "gpu" else "cpu")
    asked.folder = (asked.folder or machine.roomy_folder()).resolve()
    return asked


class Session:
    """One run of the program: its models, its rows, and the file that they go to."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.began = time.monotonic()
        self.machine = machine.describe()
        now = datetime.now(UTC)
        self.run = now.isoformat(timespec="seconds")
        self.file = asked.results / f"{now:%Y-%m-%d}-{machine.slug(self.machine)}-load.jsonl"
        self.models = models.SMALL if asked.small else models.LARGE
        self.rows: list[table.Row] = []
        self.reserve = pages.Reserve(0, 1)
        self.gpu = 0 if asked.device == "cuda" else None

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)

    def prepare(self, names: set[str]) -> None:
        """Write the checkpoints that are not there, and have them in the page cache."""
        self.asked.folder.mkdir(parents=True, exist_ok=True)
        self.asked.results.mkdir(parents=True, exist_ok=True)
        for name in sorted(names):
            model = self.models[name]
            place = models.write(model, self.asked.folder, self.machine["cores"])
            self.say(
                f"{place}: {model.nbytes / 1e9:.2f} GB, {len(model.tensors)} tensors; {self.cached(name):.0%} cached"
            )

    def cached(self, name: str) -> float:
        """Read a model's files if they are not all in the page cache; how much of them is there then."""
        files = self.models[name].files(self.asked.folder)
        if (fraction := pages.resident_fraction(files)) < 1:
            pages.read_all(files, self.machine["cores"])
            fraction = pages.resident_fraction(files)
        return fraction

    def measure(self, cases: Sequence[Case]) -> None:
        """All repetitions, round by round: in each, every case in turn."""
        self.reserve = pages.Reserve(self._reserved(cases), self.machine["cores"])
        self.reserve.hold()
        rounds = {
            case.name: case.warm_ups + min(self.asked.repeats, case.repeats or self.asked.repeats) for case in cases
        }
        for number in range(1 if self.asked.profile else max(rounds.values())):
            elapsed = time.monotonic() - self.began
            if number and self.asked.budget and elapsed > self.asked.budget:
                self.say(f"the budget of {self.asked.budget:.0f} s is spent; {number} rounds are done")
                return
            turn = [case for case in cases if number < rounds[case.name] and self._can_run(case, number)]
            self._round(number, turn)

    def _reserved(self, cases: Sequence[Case]) -> int:
        """Bytes that any measurement may want; none for a trial of the program."""
        if self.asked.reserve is not None:
            return int(self.asked.reserve * 1e9)
        if self.asked.small:
            return 0
        if self.asked.device == "cuda":
            return int(GPU_RESERVE_GB * 1e9)
        return int(CPU_RESERVE * max(self.models[case.model].nbytes for case in cases))

    def _can_run(self, case: Case, number: int) -> bool:
        reason = None
        if case.cuda and self.asked.device != "cuda":
            reason = "needs a GPU"
        elif case.package and self.machine[case.package] is None:
            reason = f"{case.package} is not installed"
        if reason and not number:
            self._keep(case, number, {"error": reason})
        return reason is None

    def _round(self, number: int, cases: Sequence[Case]) -> None:
        """Processes import side by side; then each measures alone."""
        cached = {name: self.cached(name) for name in {case.model for case in cases}}
        workers = [Worker(case, self.asked) for case in cases]
        try:
            ready = [worker.answer(IMPORT_LIMIT_S) for worker in workers]
            for worker, state in zip(workers, ready, strict=True):
                answer = self._turn(worker, number) if "ready" in state else state
                if "error" in answer and not self.asked.profile:
                    print(worker.log(), flush=True)
                worker.close()
                self.reserve.hold()
                self.reserve.settle()
                self._keep(worker.case, number, answer | {"cached": cached[worker.case.model]})
        finally:
            for worker in workers:
                worker.close()

    def _turn(self, worker: Worker, number: int) -> dict[str, Any]:
        self.reserve.release()
        with Watch(worker.pid, self.gpu if not number else None) as watch:
            worker.go()
            answer = worker.answer(worker.case.limit_s)
        if "error" not in answer:
            answer["peaks"] = watch.peaks(*(answer.pop(name) for name in ("began", "ended", "before", "after")))
        return answer

    def _keep(self, case: Case, number: int, answer: dict[str, Any]) -> None:
        row = {
            "case": case.name,
            "group": self.asked.group,
            "round": number,
            "warm_up": number < case.warm_ups,
            "run": self.run,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": self.models[case.model].name,
            "arguments": dict(case.arguments),
            "device": self.asked.device,
            "small": self.asked.small,
            **answer,
            "machine": self.machine,
        }
        said = answer.get("error") or f"{answer['seconds']:.3f} s"
        self.say(f"{number + 1}. {case.name}: {said}")
        if self.asked.profile:
            return
        self.rows.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
