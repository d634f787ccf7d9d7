"""The constants of reading, each beside others: seconds of a fill, page cache warm.

    PYTHONPATH=src python benchmarks/reading.py
    PYTHONPATH=src python benchmarks/reading.py --device cuda --only '_S*'    # what holds for reading to a GPU too

The variants of a work are the same fill with another number in the constant's place; what it is now is marked. They
take turns in one process, and each fills memory that nothing has touched, as a load does, or memory of a GPU. Before
anything is timed, what each variant fills is compared with what was written into the file. Raw rows go to
`benchmarks/results/`, and docstrings and comments of the constants quote them.
"""

import argparse
import contextlib
import fnmatch
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine
import table
import torch
from safetensors.torch import save_file

from kernelgraft.checkpoint import reader
from kernelgraft.checkpoint.files import Checkpoint
from kernelgraft.checkpoint.memory import fresh

MB = 1 << 20
ALWAYS = 1 << 62
DTYPE = torch.bfloat16

Tensors = Mapping[str, torch.Tensor]
Ways = Mapping[str, Mapping[str, Any]]
"""For each variant what `module.name` is in it; `threads` is the argument of `fill`."""


@dataclass(frozen=True)
class Work:
    """One fill.

    Attributes:
        name: What `--only` calls it.
        tensors: What the file has.
        made: What is made of the file's tensors; of lazy ones and of others.
        ways: The variants.
        dtype: What is filled.
    """

    name: str
    tensors: Callable[[], Tensors]
    made: Callable[[Tensors], Sequence[torch.Tensor]]
    ways: Ways
    dtype: torch.dtype = DTYPE


def works(small: bool) -> Iterator[Work]:
    """Every constant."""
    yield from _shares(2 if small else 16, 40 if small else 4096)
    total = 1 << 12 if small else 64 * MB
    for run in (64, 256) if small else (512, 2048, 4096, 8192, 16384, 32768, 65536, 131072):
        yield from _runs(run, total)
    for run, gap in ((64, 64),) if small else [(run, gap) for run in (1024, 8192) for gap in _GAPS]:
        yield _gaps(run, gap, total)


_GAPS = (1024, 4096, 8192, 16384, 32768, 65536)


def _shares(count: int, rows: int) -> Iterator[Work]:
    """How reads are shared out: of pairs of large tensors that are joined, and of small ones that are stacked."""

    def large() -> Tensors:
        return {f"{index:02}": drawn(rows, rows) for index in range(count)}

    def small() -> Tensors:
        return {f"{index:03}": drawn(rows // 8, rows // 4) for index in range(32 * count)}

    def joined(given: Tensors) -> list[torch.Tensor]:
        names = sorted(given)
        return [torch.cat([given[one], given[other]]) for one, other in zip(names[::2], names[1::2], strict=True)]

    def stacked(given: Tensors) -> list[torch.Tensor]:
        names = sorted(given)
        return [torch.stack([given[name] for name in names[start : start + 64]]) for start in range(0, len(names), 64)]

    def turned(given: Tensors) -> list[torch.Tensor]:
        return [each.t() for each in joined(given)]

    chunks = {f"{mb} MB": {"reader.CHUNK": mb * MB} for mb in (1, 2, 4, 8, 16, 32, 64)}
    yield Work("CHUNK, joined", large, joined, chunks)
    yield Work("CHUNK, stacked", small, stacked, chunks)
    staged = {f"{mb} MB": {"reader.STAGED": mb * MB} for mb in (1, 2, 4, 8, 16)}
    yield Work("STAGED, cast", large, joined, staged, torch.float32)
    yield Work("STAGED, transposed", large, turned, staged)
    threads = {f"{each} threads": {"threads": each} for each in (1, 2, 4, 8, 16)}
    yield Work("MOST_THREADS, joined", large, joined, threads)
    yield Work("MOST_THREADS, cast", large, joined, threads, torch.float32)
    yield Work("MOST_THREADS, transposed", large, turned, threads)


def _runs(run: int, total: int) -> Iterator[Work]:
    """Runs that lie apart in what is filled, and in the file."""
    columns = run // DTYPE.itemsize
    rows = total // (2 * run)
    ways = {
        "straight into place": {"requests._SHORTEST_RUN": 0},
        "by a staging buffer": {"requests._SHORTEST_RUN": ALWAYS},
    }
    yield Work(
        f"_SHORTEST_RUN, {run} bytes, apart in the tensor",
        lambda: {name: drawn(rows, columns) for name in "ab"},
        lambda given: [torch.cat([given["a"], given["b"]], 1)],
        ways,
    )
    yield Work(
        f"_SHORTEST_RUN, {run} bytes, apart in the file",
        lambda: {"a": drawn(rows, 2 * columns)},
        lambda given: [given["a"][:, :columns]],
        ways,
    )


def _gaps(run: int, gap: int, total: int) -> Work:
    """Columns of a tensor, cast: so they go by a staging buffer whatever their length."""
    columns = run // DTYPE.itemsize
    return Work(
        f"_SMALL_GAP, {gap} bytes between {run}",
        lambda: {"a": drawn(total // (run + gap), (run + gap) // DTYPE.itemsize)},
        lambda given: [given["a"][:, :columns]],
        {"each run alone": {"requests._SMALL_GAP": 1}, "read along": {"requests._SMALL_GAP": ALWAYS}},
        torch.float32,
    )


def drawn(*shape: int) -> torch.Tensor:
    """Random numbers that are none of them NaN."""
    return torch.randint(-99, 99, shape, dtype=torch.int16).to(DTYPE)


class Bench:
    """One run: its rows, and the file that they go to."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.machine = machine.describe()
        now = datetime.now(UTC)
        self.run = now.isoformat(timespec="seconds")
        self.file = asked.results / f"{now:%Y-%m-%d}-{machine.slug(self.machine)}-reading.jsonl"

    def measure(self, work: Work, folder: Path) -> list[list[str]]:
        """All variants of a work in turn, round by round; the lines of its table."""
        given = work.tensors()
        file = folder / "model.safetensors"
        save_file(dict(given), file)
        os.sync()  # or the disk goes on writing
        with Checkpoint([file]) as checkpoint:
            lazies = work.made(checkpoint)
            wanted = [each.to(work.dtype) for each in work.made(given)]
            for name, way in work.ways.items():
                _, outs = timed(lazies, work.dtype, way, self.asked.device)
                if not all(torch.equal(out.cpu(), each) for out, each in zip(outs, wanted, strict=True)):
                    sys.exit(f"{work.name}, {name}: what was filled differs from the file.")
            del given, wanted, outs
            times: dict[str, list[float]] = {name: [] for name in work.ways}
            for _ in range(self.asked.repeats):
                for name, way in work.ways.items():
                    times[name].append(timed(lazies, work.dtype, way, self.asked.device)[0])
            nbytes = sum(each.numel() * DTYPE.itemsize for each in lazies)
        return [self._kept(work, name, times[name], nbytes) for name in work.ways]

    def _kept(self, work: Work, name: str, seconds: list[float], nbytes: int) -> list[str]:
        """Write a row of a variant; its line of the table."""
        median, now = statistics.median(seconds), is_now(work.ways[name], work.name)
        row = {
            "work": work.name,
            "variant": name,
            "now": now,
            "changes": dict(work.ways[name]),
            "median_s": median,
            "seconds": seconds,
            "bytes": nbytes,
            "device": self.asked.device.type,
            "small": self.asked.small,
            "run": self.run,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": self.machine,
        }
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        least, most = min(seconds), max(seconds)
        figures = [f"{each * 1e3:.2f}" for each in (median, least, most)]
        return [work.name, f"{name}{' (now)' if now else ''}", *figures, f"{nbytes / median / 1e9:.2f}"]


def timed(
    lazies: Sequence[torch.Tensor], dtype: torch.dtype, way: Mapping[str, Any], device: torch.device
) -> tuple[float, list[torch.Tensor]]:
    """The seconds of one fill, and what was filled."""
    threads = way.get("threads")
    with constants({place: value for place, value in way.items() if "." in place}):
        start = time.perf_counter()
        outs = [fresh(each.shape, dtype, device) for each in lazies]
        reader.fill(list(zip(lazies, outs, strict=True)), threads=threads)  # type: ignore[arg-type]
        return time.perf_counter() - start, outs


@contextlib.contextmanager
def constants(values: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block constants of `kernelgraft.checkpoint` are these."""
    before = {place: _of(place) for place in values}
    try:
        for place, value in values.items():
            _set(place, value)
        yield
    finally:
        for place, value in before.items():
            _set(place, value)


def is_now(way: Mapping[str, Any], work: str) -> bool:
    """Whether a variant does what the constants, as they are, say."""
    threads = way.get("threads")
    if threads is not None:
        return bool(threads == min(reader.MOST_THREADS, len(os.sched_getaffinity(0))))
    (place, value), *_ = way.items()
    now = _of(place)
    if place in ("reader.CHUNK", "reader.STAGED"):
        return bool(value == now)
    # What the work's runs or gaps, of so many bytes, fall under.
    nbytes = next(int(word) for word in work.split() if word.isdigit())
    return (nbytes < now) == (nbytes < value)


def _of(place: str) -> Any:
    module, _, name = place.partition(".")
    return getattr(_module(module), name)


def _set(place: str, value: Any) -> None:
    module, _, name = place.partition(".")
    setattr(_module(module), name, value)


def _module(name: str) -> Any:
    return importlib.import_module(f"kernelgraft.checkpoint.{name}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="works whose name matches this pattern")
    parser.add_argument("--repeats", type=int, default=9, help="timed fills of each variant, in turn (default: 9)")
    parser.add_argument("--folder", type=Path, help="where files are written for the time of a work")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="where the rows go")
    parser.add_argument("--device", type=torch.device, default="cpu", help="what is filled is there (default: cpu)")
    parser.add_argument("--small", action="store_true", help="tiny sizes: a trial of the program")
    asked = parser.parse_args(arguments)
    chosen = [work for work in works(asked.small) if fnmatch.fnmatchcase(work.name, asked.only)]
    if not chosen:
        sys.exit(f"No work matches {asked.only!r}. There are: {'; '.join(work.name for work in works(asked.small))}.")
    asked.results.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    bench = Bench(asked)
    lines = [["work", "variant", "median ms", "least", "most", "GB/s"]]
    within = asked.folder or machine.roomy_folder()
    within.mkdir(parents=True, exist_ok=True)
    for work in chosen:
        with tempfile.TemporaryDirectory(dir=within) as folder:
            lines += bench.measure(work, Path(folder))
        print(work.name, flush=True)
    print(f"\n{table.aligned(lines)}\n\n{bench.file}", flush=True)


if __name__ == "__main__":
    main()
