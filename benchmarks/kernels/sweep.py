r"""Launch settings of a kernel, tried one after another: thresholds are chosen from what this measures.

    PYTHONPATH=src python -m benchmarks.kernels.sweep rms_norm --only '8192x4096 forward' --module rms_norm_kernels \
        --set rows=1,2 --set num_warps=4,8,16

The works are those of the row's script, and what varies is what `kernelgraft.kernels.<module>.<function>` answers: a
frozen dataclass, some of whose fields are replaced; with `--where gated=True` only in calls that have such an argument.
What is wrong or does not launch is listed with its reason. What is there without a change is measured first and last.
"""

import argparse
import ast
import dataclasses
import fnmatch
import importlib
import inspect
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import torch

from benchmarks import machine
from benchmarks.kernels import measure, script
from benchmarks.kernels.measure import Work, WrongError
from kernelgraft.benchmark import _clock

Changes = dict[str, Any]


class Swept:
    """A function that answers settings, with some of them replaced.

    Args:
        module: Where it stands.
        function: Its name.
        where: Arguments that a call must have for its answer to be replaced.

    Attributes:
        calls: How often it was asked so.
        answers: What it answered then, replaced.
    """

    def __init__(self, module: Any, function: str, where: Changes) -> None:
        self.module, self.function, self.where = module, function, where
        self.calls = 0
        self.answers: list[Any] = []

    @contextmanager
    def changed(self, changes: Changes) -> Iterator[None]:
        """Inside the block it answers so."""
        real = getattr(self.module, self.function)
        self.calls, self.answers = 0, []
        signature = inspect.signature(real)

        def settings(*args: Any, **kwargs: Any) -> Any:
            asked = signature.bind(*args, **kwargs).arguments
            if any(asked[name] != value for name, value in self.where.items()):
                return real(*args, **kwargs)
            self.calls += 1
            answer = dataclasses.replace(real(*args, **kwargs), **changes)
            if answer not in self.answers:
                self.answers.append(answer)
            return answer

        setattr(self.module, self.function, settings)
        try:
            yield
        finally:
            setattr(self.module, self.function, real)


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweep, and print the settings from the fastest on."""
    made = script.parser(__doc__)
    made.add_argument("row", help="the script whose works are measured")
    made.add_argument("--module", required=True, help="of kernelgraft.kernels, whose settings are swept")
    made.add_argument("--function", default="settings")
    made.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE,...", help="values that are tried")
    made.add_argument("--where", action="append", default=[], metavar="ARGUMENT=VALUE", help="only calls with these")
    made.add_argument("--variant", default="ours", help="which variant of the works runs the kernel")
    made.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which no other setting is tried"
    )
    asked = script.completed(made, "sweep", arguments)
    module = importlib.import_module(f"kernelgraft.kernels.{asked.module}")
    where = {name: values[0] for name, values in _fields(asked.where).items()}
    swept = Swept(module, asked.function, where)
    works = importlib.import_module(f"benchmarks.kernels.{asked.row}").works(asked)
    described, found = machine.describe(), []
    end = time.monotonic() + asked.budget
    with measure.compiling(), measure.clock_on(torch.device(asked.device)) as clock:
        copied = clock.machine(measure.DTYPE).copy_bandwidth
        for work in works:
            if fnmatch.fnmatchcase(work.name, asked.only):
                grid = _grid(asked.set)
                lines = [_tried(work, changes, swept, clock, asked) for changes in grid if time.monotonic() < end]
                if len(lines) < len(grid):
                    print(f"the budget of {asked.budget:.0f} s is spent: {grid[len(lines) :]} were not tried")
                found += [{**line, "copy_bandwidth": copied} for line in lines]
                print(_said(work, lines, copied), flush=True)
    now = datetime.now(UTC)
    asked.out.mkdir(parents=True, exist_ok=True)
    file = asked.out / f"{now:%Y-%m-%d}-{machine.slug(described)}-sweep.jsonl"
    common = {
        "module": asked.module,
        "where": where,
        "command": asked.command,
        "date": now.isoformat(timespec="seconds"),
    }
    with file.open("a") as handle:
        handle.writelines(json.dumps({**line, **common, "machine": described}) + "\n" for line in found)
    print(file)
    return int(not any("median_us" in line for line in found))


def _grid(given: Sequence[str]) -> list[Changes]:
    """All combinations, with none at the start and at the end."""
    fields = _fields(given)
    grid = [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]
    return [{}, *(changes for changes in grid if changes), {}]


def _fields(given: Sequence[str]) -> dict[str, list[Any]]:
    """From name=value,value."""
    pairs = (each.partition("=") for each in given)
    return {name: [ast.literal_eval(value) for value in values.split(",")] for name, _, values in pairs}


def _tried(
    work: Work, changes: Changes, swept: Swept, clock: measure.Clock, asked: argparse.Namespace
) -> dict[str, Any]:
    """One setting: checked, then timed."""
    line: dict[str, Any] = {"work": work.name, "changes": changes}
    try:
        with torch.set_grad_enabled(work.gradients), swept.changed(changes):
            exact = [tensor.clone() for tensor in measure.tensors(work.reference())]
            ready = measure.make_ready(work, asked.variant, torch.device(asked.device))
            ready.before()
            error = measure.distance((ready.outputs or ready.call)(), exact)
            if not swept.calls:
                raise WrongError(f"{swept.module.__name__}.{swept.function} was not asked")
            # There is no eager beside it to compare with: so much is rounding in what is swept, a kernel or a layer.
            if not error <= 2 * torch.finfo(measure.DTYPE).eps:
                raise WrongError(f"the relative error is {error:.2g}")
            times = []
            for _ in range(measure.WARMUP):
                ready.before()
                ready.call()
            ready.before()
            writes = clock.writes_ahead_of(ready.call)
            clock.clean = work.reads and clock.is_cuda
            for _ in range(asked.repeats):
                ready.before()
                times.append(clock.milliseconds(ready.call, writes))
            timing = _clock.timing(times, None)
            figures = {f"{name}_us": 1e3 * getattr(timing, name) / work.units for name in ("median", "p20", "p80")}
            line |= figures | {"settings": [str(answer) for answer in swept.answers], "relative_error": error}
            if work.bytes:
                line["gb_s"] = work.bytes * work.units / (timing.median / 1e3) / 1e9
    except Exception as error:  # a setting that does not launch is an answer too
        line["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
    finally:
        clock.clean = False
    return line


def _said(work: Work, lines: Sequence[dict[str, Any]], copied: float) -> str:
    said = [f"{work.name}:"]
    for line in sorted(lines, key=lambda line: line.get("median_us", float("inf"))):
        changes = ", ".join(f"{name}={value}" for name, value in line["changes"].items()) or "as it is"
        if "error" in line:
            said.append(f"  {changes}: {line['error']}")
            continue
        share = f", {1e9 * line['gb_s'] / copied:.1%} of copy" if "gb_s" in line else ""
        said.append(
            f"  {line['median_us']:9.2f} us ({line['p20_us']:.2f} - {line['p80_us']:.2f}){share}  {changes}"
            f"  {'; '.join(line['settings'])}"
        )
    return "\n".join(said)


if __name__ == "__main__":
    sys.exit(main())
