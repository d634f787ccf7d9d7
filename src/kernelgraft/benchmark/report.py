"""What a benchmark found: plain data, there and back as JSON, and tables that a person reads."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

FORWARD, BACKWARD, TRAINING_STEP = "forward", "backward", "training step"


@dataclass(frozen=True)
class Machine:
    """What the device did at most in the same run.

    Attributes:
        copy_bandwidth: Bytes per second that a large copy reads and writes.
        matrix_rate: Operations per second of a large product of matrices, each multiplication and addition one.
        matrix_dtype: The dtype of those, which is the model's.
        cold_cache: Bytes that were written before each measurement so that caches are cold; 0 if they are not.
    """

    copy_bandwidth: float
    matrix_rate: float
    matrix_dtype: str
    cold_cache: int


@dataclass(frozen=True)
class Timing:
    """One side of a row.

    Attributes:
        median: Milliseconds.
        p20: Milliseconds that a fifth of the runs took less than.
        p80: Milliseconds that four fifths of the runs took less than.
        peak_bytes: Most memory allocated over what there was before the call; `None` on the CPU, where it is unknown.
    """

    median: float
    p20: float
    p80: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Row:
    """One measurement of original and kernel in turn.

    Attributes:
        kind: Title of the kind of site, or `kernelgraft.benchmark.WHOLE_MODEL`.
        site: Path of the module that was timed; "" for the whole model.
        case: "forward" or "backward"; of the whole model "prefill" or "forward", "decode" or "training step".
        tokens: Tokens in the call, or in the cache before the one that is decoded; `None` for inputs as they are.
        input: The tensors of the call by name, dtype and shape.
        original: The time of the original.
        grafted: The time with the kernel.
        bytes: Weights, inputs and outputs, each once.
        operations: Multiplications and additions in the original's products of matrices.
        kernel_calls: How often kernels ran in the timed runs; for a backward, in the forwards before it.
        original_calls: How often originals ran in a kernel's place then.
    """

    kind: str
    site: str
    case: str
    tokens: int | None
    input: str
    original: Timing
    grafted: Timing
    bytes: int
    operations: int
    kernel_calls: int
    original_calls: int

    @property
    def speedup(self) -> float:
        """The original's median over the kernel's."""
        return self.original.median / self.grafted.median


@dataclass(frozen=True)
class Report:
    """The outcome of `Graft.benchmark`.

    Attributes:
        model: Name of the model's class.
        device: Where it is.
        dtype: The model's floating dtype.
        date: When this ran, in UTC.
        inputs: What the activations come from: "given" or "drawn".
        seed: What everything was drawn with.
        repeats: Timed runs of each side.
        versions: Of what computed this.
        machine: What the device does at most.
        rows: The measurements.
        notes: What was not timed and why, and what else a reader should know.
    """

    model: str
    device: str
    dtype: str
    date: str
    inputs: str
    seed: int
    repeats: int
    versions: dict[str, str]
    machine: Machine
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def copy_share(self, row: Row, timing: Timing) -> float:
        """The bytes of a row per second, over the measured copy bandwidth."""
        return row.bytes / (timing.median / 1e3) / self.machine.copy_bandwidth

    def matrix_share(self, row: Row, timing: Timing) -> float:
        """The operations of a row per second, over the measured matrix rate."""
        return row.operations / (timing.median / 1e3) / self.machine.matrix_rate

    def to_json(self) -> dict[str, Any]:
        """The report as dicts, lists, text and numbers; what is computed of others is in it too."""
        found: dict[str, Any] = dataclasses.asdict(self)
        for said, row in zip(found["rows"], self.rows, strict=True):
            said["speedup"] = row.speedup
            for name, timing in (("original", row.original), ("grafted", row.grafted)):
                said[name]["copy_share"] = self.copy_share(row, timing)
                said[name]["matrix_share"] = self.matrix_share(row, timing)
        return {**found, "rows": list(found["rows"]), "notes": list(found["notes"])}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Report":
        """The report that `to_json` wrote."""
        rows = ({**row, **{side: _made(Timing, row[side]) for side in ("original", "grafted")}} for row in data["rows"])
        made = {
            **data,
            "machine": _made(Machine, data["machine"]),
            "rows": tuple(_made(Row, row) for row in rows),
            "notes": tuple(data["notes"]),
        }
        found: Report = _made(cls, made)
        return found

    def __str__(self) -> str:
        return "\n".join(_page(self))


def _made(cls: Any, data: dict[str, Any]) -> Any:
    return cls(**{each.name: data[each.name] for each in dataclasses.fields(cls)})


# --- the page


_HEAD = ("", "tokens", "original ms", "grafted ms", "speedup", "copy", "matrix", "peak memory", "ran")


def _page(report: Report) -> Iterable[str]:
    machine, versions = report.machine, ", ".join(f"{name} {version}" for name, version in report.versions.items())
    yield (
        f"Benchmark of {report.model} on {report.device} in {report.dtype}, {report.date} ({report.inputs} inputs, "
        f"seed {report.seed}, {versions})"
    )
    yield (
        f"Median and (p20 - p80) of {report.repeats} runs, original and grafted in turn; "
        f"{f'{_size(machine.cold_cache)} written before each' if machine.cold_cache else 'caches are warm'}"
    )
    yield (
        f"The machine copies {_size(machine.copy_bandwidth)}/s and multiplies {machine.matrix_dtype} matrices at "
        f"{machine.matrix_rate / 1e12:.3g} TFLOP/s"
    )
    yield (
        "copy, matrix: what share of that original -> grafted use; ran: calls of kernels, and of originals in their "
        "place, in the timed runs"
    )
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:
        groups.setdefault((row.kind, row.site), []).append(row)
    for (kind, site), rows in groups.items():
        yield ""
        yield f"{kind} at {site}" if site else kind[:1].upper() + kind[1:]
        yield from _aligned([_HEAD, *(_cells(report, row) for row in rows)])
    if report.notes:
        yield ""
        yield from (f"note: {note}" for note in report.notes)


def _cells(report: Report, row: Row) -> tuple[str, ...]:
    sides = row.original, row.grafted
    peaks = [_size(side.peak_bytes) for side in sides if side.peak_bytes is not None]
    return (
        row.case,
        "as given" if row.tokens is None else str(row.tokens),
        *(f"{_ms(side.median)} ({_ms(side.p20)} - {_ms(side.p80)})" for side in sides),
        f"{row.speedup:.2f}x",
        " -> ".join(_share(report.copy_share(row, side)) for side in sides),
        " -> ".join(_share(report.matrix_share(row, side)) for side in sides) if row.operations else "-",
        " -> ".join(peaks) or "-",
        f"{row.kernel_calls}, {row.original_calls}",
    )


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join(("  " + first.ljust(widths[0]), *cells))


def _ms(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:.0f}"


def _share(number: float) -> str:
    return f"{100 * number:.2g}%" if number < 0.995 else f"{100 * number:.0f}%"


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
