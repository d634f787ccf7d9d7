"""What every script of a row does: its command line, its works checked and timed in turn, its rows and their table."""

import argparse
import fnmatch
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.kernels.measure import (
    DTYPE,
    REFERENCE,
    WARMUP,
    YARDSTICK,
    Clock,
    Ready,
    Row,
    Skipped,
    Work,
    allowed,
    checked,
    clock_on,
    compiling,
    make_ready,
    profiled,
    tensors,
)
from kernelgraft.benchmark import _clock

RESULTS = Path(__file__).parents[1] / "results"


class Bench:
    """One run of one script: its rows, and the file that they go to."""

    def __init__(self, row: str, asked: argparse.Namespace) -> None:
        self.row, self.asked = row, asked
        self.device = torch.device(asked.device)
        self.described = machine.describe()
        now = datetime.now(UTC)
        self.run = now.isoformat(timespec="seconds")
        self.file = asked.out / f"{now:%Y-%m-%d}-{machine.slug(self.described)}-kernels.jsonl"
        self.rows: list[Row] = []
        self.clock: Clock
        self.ceilings: dict[str, Any] = {}

    def measure(self, works: Iterator[Work]) -> None:
        """All works, one after another."""
        with compiling(), clock_on(self.device) as self.clock:
            self.look_at_machine(self.clock)
            names = []
            for work in works:
                names.append(work.name)
                if fnmatch.fnmatchcase(work.name, self.asked.only):
                    self._work(work)
                del work  # and its tensors, before the next one is made
            if not fnmatch.filter(names, self.asked.only):
                sys.exit(f"No work matches {self.asked.only!r}. There are: {'; '.join(names)}.")

    def look_at_machine(self, clock: Clock) -> None:
        """What it does at most, for the rows from now on."""
        found = clock.machine(DTYPE)
        self.ceilings = {
            "copy_bandwidth": found.copy_bandwidth,
            "matrix_rate": found.matrix_rate,
            "cold_cache": found.cold_cache,
        }

    # --- one work

    def _work(self, work: Work) -> None:
        began = datetime.now(UTC)
        with torch.set_grad_enabled(work.gradients):
            ready = self._checked(work)
            if self.asked.profile:
                for name, (each, _) in ready.items():
                    print(f"{work.name}, {name}:\n{profiled(each, self.device)}", flush=True)
                return
            for name, (timing, error) in self._timed(work, ready).items():
                self.keep(work, name, self.figures(work, ready[name][0].says, timing) | {"relative_error": error})
        torch._dynamo.reset()
        ready.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{self.row}: {work.name}: {(datetime.now(UTC) - began).total_seconds():.0f} s", flush=True)

    def _checked(self, work: Work) -> dict[str, tuple[Ready, float]]:
        """The variants that are ready and right, with their errors."""
        try:
            exact = [tensor.clone() for tensor in tensors(work.reference())]
        except Exception as error:  # it may have no room; other works have
            self._failed(work, REFERENCE, error)
            return {}
        chosen = [name for name in work.variants if name == YARDSTICK or self.wants(work.name, name)]
        chosen.sort(key=lambda name: name != YARDSTICK)
        found: dict[str, tuple[Ready, float]] = {}
        for name in chosen:
            try:
                found[name] = self._right(work, name, exact, found)
            except Skipped as reason:
                self.keep(work, name, {"skipped": str(reason)})
            except Exception as error:  # one that fails takes no other away
                self._failed(work, name, error)
                if name == YARDSTICK:
                    break
        return {name: each for name, each in found.items() if self.wants(work.name, name)}

    def wants(self, work: str, variant: str) -> bool:
        """Whether the command line asks for a variant of a work."""
        names = any(fnmatch.fnmatchcase(variant, pattern) for pattern in self.asked.variants.split(";"))
        return names and fnmatch.fnmatchcase(work, self.asked.only)

    def _right(
        self, work: Work, name: str, exact: list[torch.Tensor], found: Mapping[str, tuple[Ready, float]]
    ) -> tuple[Ready, float]:
        ready = make_ready(work, name, self.device)
        yardstick = found[YARDSTICK][1] if name != YARDSTICK else 0.0
        return ready, checked(ready, exact, allowed(name, yardstick))

    def _timed(self, work: Work, found: Mapping[str, tuple[Ready, float]]) -> dict[str, tuple[_clock.Timing, float]]:
        """All variants in turn, round by round."""
        alive = dict(found)
        writes: dict[str, int] = {}
        peaks: dict[str, int | None] = {}
        times: dict[str, list[float]] = {name: [] for name in alive}

        def each(do: Callable[[str, Ready], None]) -> None:
            for name in list(alive):
                try:
                    alive[name][0].before()
                    do(name, alive[name][0])
                except Exception as error:
                    self._failed(work, name, error)
                    del alive[name]

        for _ in range(1 if work.repeats == 1 else WARMUP):
            each(lambda _, ready: ready.call())
        each(lambda name, ready: writes.update({name: 0 if work.with_host else self.clock.writes_ahead_of(ready.call)}))
        each(lambda name, ready: peaks.update({name: self.clock.peak(ready.call)}))
        most = max(writes.values(), default=0)
        self.clock.clean = work.reads and self.clock.is_cuda
        for _ in range(work.repeats or self.asked.repeats):
            each(lambda name, ready: times[name].append(self.clock.milliseconds(ready.call, most)))
        self.clock.clean = False
        return {name: (_clock.timing(times[name], peaks[name]), error) for name, (_, error) in alive.items()}

    # --- rows

    def figures(self, work: Work, says: Mapping[str, Any], timing: _clock.Timing) -> Row:
        """What a row says of the times of a variant."""
        seconds = timing.median / 1e3 / work.units
        row: Row = {f"{name}_us": 1e3 * getattr(timing, name) / work.units for name in ("median", "p20", "p80")}
        row |= {"repeats": work.repeats or self.asked.repeats, "peak_bytes": timing.peak_bytes, **says}
        if work.bytes:
            row |= {
                "gb_s": work.bytes / seconds / 1e9,
                "copy_share": work.bytes / seconds / self._most("copy_bandwidth"),
            }
        if work.operations:
            row["tflop_s"] = work.operations / seconds / 1e12
            row["matrix_share"] = work.operations / seconds / self._most("matrix_rate")
        return row

    def _most(self, name: str) -> float:
        return float(self.ceilings[name])

    def _failed(self, work: Work, name: str, error: Exception) -> None:
        traceback.print_exception(error, limit=-8, file=sys.stderr)
        first = (str(error).strip().splitlines() or [""])[0]
        self.keep(work, name, {"error": f"{type(error).__name__}: {first}"[:500]})

    def keep(self, work: Work, name: str, said: Row) -> None:
        """Write a row of a variant."""
        row = {
            "row": self.row,
            "work": work.name,
            "variant": name,
            **said,
            "shape": dict(work.shape),
            "dtype": str(DTYPE).removeprefix("torch."),
            "bytes": work.bytes,
            "operations": work.operations,
            "units": work.units,
            "graph": work.graph,
            "with_host": work.with_host,
            "reads": work.reads,
            **self.ceilings,
            "device": self.asked.device,
            "tiny": self.asked.tiny,
            "seed": self.asked.seed,
            "run": self.run,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": self.asked.command,
            "machine": self.described,
        }
        self.rows.append(row)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")


# --- the command line


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every script."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the file that rows are added to")
    made.add_argument("--tiny", action="store_true", help="tiny sizes: a trial of the program")
    made.add_argument("--device", choices=("cuda", "cpu"), help="cpu is for --tiny")
    made.add_argument("--seed", type=int, default=0, help="what inputs and weights are drawn with")
    made.add_argument("--repeats", type=int, help="timed calls of each variant, in turn")
    made.add_argument("--only", default="*", help="works whose name matches this pattern")
    made.add_argument("--variants", default="*", help="variants by name or pattern, joined by semicolons")
    made.add_argument("--profile", action="store_true", help="one call of each variant under a profiler; no rows")
    return made


def completed(made: argparse.ArgumentParser, row: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with what it leaves out."""
    asked = made.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)
    asked.command = shlex.join(["python", "-m", f"benchmarks.kernels.{row}", *given])
    asked.device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    asked.repeats = asked.repeats or (2 if asked.tiny else 50)
    if asked.device == "cpu" and not asked.tiny:
        made.error("the sizes of the table are for a GPU; --tiny tries the program without one")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.manual_seed(asked.seed)
    return asked


def main(
    row: str,
    description: str | None,
    works: Callable[[argparse.Namespace], Iterator[Work]],
    arguments: Sequence[str] | None = None,
    made: argparse.ArgumentParser | None = None,
) -> int:
    """Measure what the command line asks for, and print the table.

    Returns:
        The exit code: 1 if a variant of ours, or what it is checked against, failed or was wrong.
    """
    asked = completed(made or parser(description), row, arguments)
    bench = Bench(row, asked)
    bench.measure(works(asked))
    return finish(bench)


def finish(bench: Bench) -> int:
    """Print the table of a run; the exit code."""
    from benchmarks.kernels import table

    if not bench.rows:  # a profile keeps none, and a pattern may match none
        return 0
    print("\n" + table.render(bench.rows) + f"\n\n{bench.file}", flush=True)
    failed = [row["variant"] for row in bench.rows if "error" in row]
    return int(any(name in (YARDSTICK, REFERENCE) or name.startswith("ours") for name in failed))
