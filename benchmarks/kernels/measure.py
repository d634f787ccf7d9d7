"""What the benchmarks of the kernels share: variants checked against float32, then timed in turn, and written as rows.

A script of a row makes `Work`s: the variants of one computation, each by a function that makes it ready, and what they
are checked against. A variant that is not installed, fails or is wrong has a row that says so, and no time.
"""

import argparse
import contextlib
import fnmatch
import importlib.util
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from kernelgraft.benchmark import _clock

DTYPE = torch.bfloat16
RESULTS = Path(__file__).parents[1] / "results"

WARMUP = 3
YARDSTICK = "eager"
"""The variant whose own error says how far others may be off."""

REFERENCE = "float32"
"""What a row of a failed reference calls it."""

FAR = 0.1
"""The most that the yardstick may be off from float32, relatively: through 36 layers bfloat16 is off by percents."""

Row = dict[str, Any]


class Skipped(Exception):
    """A variant cannot run here, and the message says why."""


class WrongError(Exception):
    """A variant does not compute what it should: its time says nothing."""


class Clock(_clock.Clock):
    """The clock of `kernelgraft.benchmark`, which can leave the L2 cache without anything to write back.

    The buffer that is written before a call leaves as much in the cache as that holds, and it goes to memory while the
    call runs. A call that writes as much itself leaves its own there in turn, and the two cancel, as in the copy that
    shows the bandwidth. To one that only reads, 302 MB of weights say, it would add a sixth.

    Attributes:
        clean: Whether another buffer is read before a call, after the one that is written.
    """

    clean = False

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._read = torch.zeros_like(self._written).view(torch.int64) if self.is_cuda else self._written

    def close(self) -> None:
        """Give the buffers back."""
        super().close()
        self._read = self._written

    def _between_events(self, call: Callable[[], Any]) -> float:
        if self.clean:
            self._read.amax()
        return super()._between_events(call)


@contextlib.contextmanager
def clock_on(device: torch.device) -> Iterator[Clock]:
    """A clock, whose memory is free again afterwards."""
    clock = Clock(device)
    try:
        yield clock
    finally:
        clock.close()


@dataclass(frozen=True)
class Ready:
    """A variant that can be called.

    Attributes:
        call: What is timed.
        outputs: What is compared with the reference; by default what `call` returns.
        before: Runs before each call and is not timed.
        graft: The graft of a model that is called; its kernels must have run.
        says: What the row says beside its time.
    """

    call: Callable[[], Any]
    outputs: Callable[[], Any] | None = None
    before: Callable[[], None] = lambda: None
    graft: Any = None
    says: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """One computation.

    Attributes:
        name: What the table calls it.
        shape: Its sizes.
        variants: What makes each variant ready. It may raise `Skipped`.
        reference: The outputs in float32.
        bytes: What one unit has to move: inputs, weights and outputs, each once.
        operations: Multiplications and additions of one unit.
        units: How often a call does the work: copies in a graph, tokens of a generation.
        graph: Whether calls are captured in a CUDA graph whose replays are timed.
        with_host: Whether what the host takes to launch counts.
        gradients: Whether autograd records.
        reads: Whether it writes next to nothing, see `Clock`.
        repeats: Rounds, if not as many as are asked for.
    """

    name: str
    shape: Mapping[str, int]
    variants: Mapping[str, Callable[[], Ready]]
    reference: Callable[[], Any]
    bytes: int = 0
    operations: int = 0
    units: int = 1
    graph: bool = False
    with_host: bool = False
    gradients: bool = False
    reads: bool = False
    repeats: int | None = None


def tensors(found: Any) -> list[torch.Tensor]:
    """The floating tensors of a call's outcome, in order."""
    if isinstance(found, torch.Tensor):
        return [found] if found.is_floating_point() else []
    if isinstance(found, Mapping):
        return tensors(list(found.values()))
    return [each for part in found for each in tensors(part)] if isinstance(found, list | tuple) else []


def distance(found: Any, exact: Any) -> float:
    """The largest relative error of the tensors, by their norms; not a number where any is."""
    pairs = list(zip(tensors(found), tensors(exact), strict=True))
    if not pairs:
        raise WrongError("there is nothing to compare")
    errors = []
    for one, other in pairs:
        if one.shape != other.shape:
            raise WrongError(f"the shape is {tuple(one.shape)}, and not {tuple(other.shape)}")
        other = other.float()
        norm = torch.linalg.vector_norm(other)
        errors.append(torch.linalg.vector_norm(one.to(other) - other) / norm)
    return float(torch.stack([error.cpu() for error in errors]).max())  # of torch, so that NaN stays


def compiled(what: Any, asked: argparse.Namespace, **options: Any) -> Any:
    """`torch.compile` of a function or module for these shapes; in a trial without the code generator."""
    if asked.tiny:
        options = {"backend": "eager"}
    return torch.compile(what, fullgraph=True, dynamic=False, **options)


def compiling() -> contextlib.ExitStack:
    """What `torch.compile` has to be told for a benchmark, until the stack is closed."""
    import torch._dynamo.config
    import torch._functorch.config

    stack = contextlib.ExitStack()
    # A backward here is called again and again, so it may not give up what it was handed.
    stack.enter_context(torch._functorch.config.patch(donated_buffer=False))
    # Layers of one model are compiled one by one, each for its own index.
    stack.enter_context(torch._dynamo.config.patch(recompile_limit=64))
    return stack


def need(module: str, package: str, asked: argparse.Namespace) -> None:
    """Skip a variant unless a package is there, and a GPU for it.

    Raises:
        Skipped: It cannot run here.
    """
    if importlib.util.find_spec(module) is None:
        raise Skipped(f"{package} is not installed")
    if asked.device != "cuda":
        raise Skipped(f"{package} needs a GPU")


def graphed(ready: Ready) -> tuple[Callable[[], Any], Any]:
    """A call captured in a CUDA graph: its replay, and what each replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            ready.before()
            ready.call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ready.call()
    return graph.replay, out


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
            found = self.clock.machine(DTYPE)
            self.ceilings = {
                "copy_bandwidth": found.copy_bandwidth,
                "matrix_rate": found.matrix_rate,
                "cold_cache": found.cold_cache,
            }
            names = []
            for work in works:
                names.append(work.name)
                if fnmatch.fnmatchcase(work.name, self.asked.only):
                    self._work(work)
                del work  # and its tensors, before the next one is made
            if not fnmatch.filter(names, self.asked.only):
                sys.exit(f"No work matches {self.asked.only!r}. There are: {'; '.join(names)}.")

    # --- one work

    def _work(self, work: Work) -> None:
        began = datetime.now(UTC)
        with torch.set_grad_enabled(work.gradients):
            ready = self._checked(work)
            if self.asked.profile:
                self._profile(work, ready)
                return
            for name, (timing, error) in self._timed(work, ready).items():
                self.keep(work, name, self._figures(work, ready[name][0], timing) | {"relative_error": error})
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
        ready.before()
        error = distance((ready.outputs or ready.call)(), exact)
        allowed = FAR if name == YARDSTICK else 2 * found[YARDSTICK][1] + torch.finfo(DTYPE).eps / 4
        if not error <= allowed:
            raise WrongError(f"the relative error is {error:.2g}, and {allowed:.2g} at most would be rounding")
        if ready.graft is not None and (not ready.graft.calls.kernel or ready.graft.calls.reference):
            raise WrongError(f"not the kernels ran: {ready.graft.calls}")
        return ready, error

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

    def _profile(self, work: Work, found: Mapping[str, tuple[Ready, float]]) -> None:
        """Where the time of each variant goes, in one call after others."""
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        for name, (ready, _) in found.items():
            for _ in range(WARMUP):
                ready.before()
                ready.call()
            ready.before()
            activities = {torch.profiler.ProfilerActivity.CPU, getattr(torch.profiler.ProfilerActivity, kind.upper())}
            with torch.profiler.profile(activities=activities) as profile:
                ready.call()
                if kind == "cuda":
                    torch.cuda.synchronize()
            found_there = profile.key_averages().table(
                sort_by=f"self_{kind}_time_total", row_limit=16, max_name_column_width=70
            )
            print(f"{work.name}, {name}:\n{found_there}", flush=True)

    # --- rows

    def _figures(self, work: Work, ready: Ready, timing: _clock.Timing) -> Row:
        seconds = timing.median / 1e3 / work.units
        row: Row = {f"{name}_us": 1e3 * getattr(timing, name) / work.units for name in ("median", "p20", "p80")}
        row |= {"repeats": work.repeats or self.asked.repeats, "peak_bytes": timing.peak_bytes, **ready.says}
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


def make_ready(work: Work, name: str, device: torch.device) -> Ready:
    """A variant that can be called: where the work says so, the replay of a CUDA graph."""
    ready = work.variants[name]()
    if not work.graph or device.type != "cuda":
        return ready
    replay, out = graphed(ready)

    def outputs() -> Any:
        replay()
        return out

    return Ready(replay, outputs, ready.before, ready.graft, ready.says)


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
