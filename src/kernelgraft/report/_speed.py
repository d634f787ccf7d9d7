"""The part of the page about speed and memory: original and grafted in turn, in one run."""

from collections.abc import Sequence

from kernelgraft.benchmark.report import Report, Row, Timing, _ms, _size
from kernelgraft.benchmark.report import _share as percent
from kernelgraft.report._charts import Bar, Pair, bars
from kernelgraft.report._html import Html, joined, tag
from kernelgraft.verify.report import WHOLE_MODEL

ARROW = "\N{RIGHTWARDS ARROW}"


def benchmark_section(report: Report) -> Html:
    """Times and memory, the whole model first."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:
        groups.setdefault((row.kind, row.site), []).append(row)
    ordered = sorted(groups.items(), key=lambda group: group[0][0] != WHOLE_MODEL)
    machine = report.machine
    cold = f"{_size(machine.cold_cache)} written before each run" if machine.cold_cache else "caches are warm"
    return joined(
        tag(
            "p",
            f"{report.device}, {report.dtype}, {report.date}: medians of {report.repeats} runs with the range from the "
            f"20th to the 80th percentile, original and grafted in turn, {cold}. The machine copies "
            f"{_size(machine.copy_bandwidth)}/s and multiplies {machine.matrix_dtype} matrices at "
            f"{machine.matrix_rate / 1e12:.3g} TFLOP/s.",
        ),
        tag("p", ", ".join(f"{name} {version}" for name, version in report.versions.items()), class_="versions"),
        *(_group(report, kind, site, rows) for (kind, site), rows in ordered),
        *(tag("p", f"Note: {note}", class_="note") for note in report.notes),
    )


def speedups_of_whole_model(report: Report) -> list[float]:
    """How many times as fast the whole model is, in each of its rows."""
    return [row.speedup for row in report.rows if row.kind == WHOLE_MODEL]


def _group(report: Report, kind: str, site: str, rows: Sequence[Row]) -> Html:
    timed = bars([_time_pair(row) for row in rows], "time over the original's; 2x is twice as fast")
    remembered = [pair for row in rows if (pair := _memory_pair(row)) is not None]
    memory = [tag("h4", "Peak memory"), bars(remembered, "memory over the original's")] if remembered else []
    return joined(
        tag("h3", f"{kind[:1].upper()}{kind[1:]}"),
        tag("div", tag("code", site), class_="paths") if site else "",
        tag("h4", "Time"),
        timed,
        *memory,
        tag("details", tag("summary", "All figures"), _table(report, rows)),
    )


def _time_pair(row: Row) -> Pair:
    figures = joined(
        f"{_ms(row.original.median)} {ARROW} {_ms(row.grafted.median)} ms ", tag("strong", f"{row.speedup:.2f}x")
    )
    return Pair(_label(row), figures, _bar(row.original), _bar(row.grafted))


def _bar(timing: Timing) -> Bar:
    return Bar(timing.median, timing.p20, timing.p80)


def _memory_pair(row: Row) -> Pair | None:
    """Peak memory in two bars; `None` where it is not known, or the original takes none to compare with."""
    before, after = row.original.peak_bytes, row.grafted.peak_bytes
    if not before or after is None:
        return None
    figures = joined(f"{_size(before)} {ARROW} {_size(after)} ", tag("strong", f"{100 * after / before:.0f}%"))
    return Pair(_label(row), figures, Bar(before, before, before), Bar(after, after, after))


def _label(row: Row) -> Html:
    return joined(row.case, ", ", _tokens(row))


def _tokens(row: Row) -> str:
    if row.tokens is None:
        return "inputs as given"
    return f"{row.tokens} token{'s' * (row.tokens != 1)}"


def _table(report: Report, rows: Sequence[Row]) -> Html:
    names = ("", "tokens", "original ms", "grafted ms", "speedup", "copy", "matrix", "peak memory", "calls", "input")
    head = tag("tr", *(tag("th", name) for name in names))
    body = [tag("tr", *(tag("td", cell) for cell in _cells(report, row))) for row in rows]
    note = tag(
        "p",
        "copy, matrix: the share of the machine's measured bandwidth and rate that the original and the grafted use; "
        "calls: of kernels, and of originals in their place, in the timed runs",
        class_="note",
    )
    return joined(note, tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll"))


def _cells(report: Report, row: Row) -> tuple[str, ...]:
    sides = row.original, row.grafted
    peaks = [_size(side.peak_bytes) for side in sides if side.peak_bytes is not None]
    arrow = f" {ARROW} "
    return (
        row.case,
        "as given" if row.tokens is None else str(row.tokens),
        *(f"{_ms(side.median)} ({_ms(side.p20)} to {_ms(side.p80)})" for side in sides),
        f"{row.speedup:.2f}x",
        arrow.join(percent(report.copy_share(row, side)) for side in sides),
        arrow.join(percent(report.matrix_share(row, side)) for side in sides) if row.operations else "-",
        arrow.join(peaks) or "-",
        f"{row.kernel_calls}, {row.original_calls}",
        row.input,
    )
