"""The rows as a table, and beside them what issue 5 asks for: reached, target, ok or missed."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

Row = dict[str, Any]
GB = 1e9


@dataclass(frozen=True)
class Judged:
    """One line of the table: `holds` is `None` where what it needs was not measured."""

    work: str
    reached: str
    target: str
    holds: bool | None


class Rows:
    """Rows by case, without warm-ups and failures."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.all = list(rows)
        self.good: dict[str, list[Row]] = {}
        for row in self.all:
            if "error" not in row and not row["warm_up"]:
                self.good.setdefault(row["case"], []).append(row)

    def median(self, case: str, value: Callable[[Row], float | None] = lambda row: row["seconds"]) -> float | None:
        """The median of a quantity over the repetitions of a case."""
        values = [found for row in self.good.get(case, []) if (found := value(row)) is not None]
        return statistics.median(values) if values else None

    def best(self, pattern: str) -> tuple[str, float] | None:
        """The fastest of the cases whose names match, and its median."""
        found = {case: self.median(case) for case in self.good if fnmatchcase(case, pattern)}
        medians = {case: median for case, median in found.items() if median is not None}
        return min(medians.items(), key=lambda item: item[1]) if medians else None


def host_bytes(row: Row) -> float | None:
    """Anonymous and pinned memory over the state before. A buffer that is both counts twice: this is an upper bound."""
    if "RssAnon" not in row["peaks"]:
        return None
    return float(row["peaks"]["RssAnon"] + (row.get("torch_pinned") or 0) + (row.get("our_pinned") or 0))


def gpu_over(row: Row) -> float | None:
    """What the GPU had to hold beyond the model: by torch's count or by the driver's, whichever is more."""
    if row.get("gpu_allocated", 0) < row.get("bytes", 1):
        return None  # no load to a GPU
    return float(max(row["gpu_allocated"], row["peaks"].get("gpu", 0)) - row["bytes"])


def _peak(name: str) -> Callable[[Row], float | None]:
    return lambda row: row["peaks"].get(name)


# --- what issue 5 asks for


def judge(rows: Rows, group: str) -> list[Judged]:
    """Every line of the issue's table for a group."""
    return list(_judge_gpu(rows) if group == "gpu" else _judge_cpu(rows))


def _judge_gpu(rows: Rows) -> Iterator[Judged]:
    limit = rows.best("limit-*")
    for case in ("ours-plain", "ours-merged"):
        yield _at_most(f"8B to the GPU, {case[5:]}: time over the limit's", rows.median(case), limit, 1.25)
    plain = rows.median("ours-plain")
    yield _at_most("merged load over the plain one", rows.median("ours-merged"), plain, 1.05)
    for case in ("ours-plain", "ours-merged"):
        counted = "" if rows.median(case, lambda row: row["our_pinned"]) is not None else " (registered pages unknown)"
        yield _bytes_at_most(
            f"anonymous and pinned host memory, {case[5:]}{counted}", rows.median(case, host_bytes), 0.5
        )
    for case in ("ours-plain", "ours-merged"):
        yield _bytes_at_most(f"GPU peak over the model, {case[5:]}", rows.median(case, gpu_over), 0.3)
    update, stream, copy = (
        # Rows of before 2026-11-29 have no stream.
        rows.median("update", lambda row, key=key: statistics.median(row[key]) if key in row else None)
        for key in ("update_s", "stream_s", "copy_s")
    )
    yield _at_most("update of the grafted 8B over a plain device copy", update, copy, 1.2)
    yield _at_most("the same from an iterator", stream, copy, 1.2)
    extra = rows.median("update", lambda row: row["extra_bytes"])
    yield Judged(
        "update: bytes extra", "-" if extra is None else f"{extra:.0f}", "0", None if extra is None else not extra
    )
    # A run in which they do not hold has failed, and is no row here.
    graph = rows.median("update", lambda row: row["graph"] or None)
    holds = None if graph is None else True
    yield Judged("update: data_ptr kept, a captured graph goes on", "yes" if holds else "-", "yes", holds)
    ours, theirs = rows.median("save-ours"), rows.median("save-transformers")
    yield _at_least("save: times as fast as Transformers'", theirs, ours, 3)
    yield _at_most("save: time over a plain write's", ours, rows.best("save-write-*"), 1.3)


def _judge_cpu(rows: Rows) -> Iterator[Judged]:
    plain = rows.median("dense-transformers")
    yield _at_most("dense, nothing re-laid-out: time over Transformers'", rows.median("dense-ours"), plain, 1.1)
    copied = rows.median("dense-ours", lambda row: row["peaks"]["RssAnon"] / row["bytes"])
    # Modules and names are anonymous memory too: a hundredth of the model is none of its weights.
    yield _number("the same: anonymous memory over the model", copied, 0.02, "nothing copied (0.02)")
    best = rows.best("merged-copy-*")
    target = None if plain is None or best is None else plain + 1.25 * best[1]
    merged = rows.median("merged-ours")
    work = "merged: seconds, Transformers' plain load and 1.25 plain copies of the merged bytes"
    yield _number(f"{work}{_named(best)}", merged, target, None if target is None else f"at most {target:.3f}")
    size = rows.median(best[0], lambda row: row["bytes"]) if best else None
    anonymous = rows.median("merged-ours", _peak("RssAnon"))
    yield _at_most("the same: anonymous memory over the merged bytes", anonymous, size, 1.02)
    ours = rows.median("moe-ours")
    yield _at_most("MoE, experts stacked: time over a plain copy's", ours, rows.best("moe-copy-*"), 1.3)
    yield _at_least("the same: times as fast as Transformers'", rows.median("moe-transformers"), ours, 2)
    peak = rows.median("moe-ours", lambda row: row["peaks"]["VmRSS"] / row["bytes"])
    yield _number("the same: peak resident memory (mapped pages too) over the model", peak, 1.1, "at most 1.1")
    yield _number("planning, 100,000 tensors: seconds", rows.median("planning"), 1.0, "at most 1.0")
    ours, theirs = rows.median("start-ours"), rows.median("start-transformers")
    more = None if ours is None or theirs is None else ours - theirs
    yield _number("tiny grafted model, second start: seconds over Transformers'", more, 0.3, "at most 0.3")


def _named(found: tuple[str, float] | None) -> str:
    return f" [{found[0]}]" if found else ""


def _at_most(work: str, value: float | None, base: float | tuple[str, float] | None, most: float) -> Judged:
    name, base = (_named(base), base[1]) if isinstance(base, tuple) else ("", base)
    if value is None or not base:
        return Judged(work + name, "-", f"at most {most}", None)
    return Judged(work + name, f"{value / base:.3f}", f"at most {most}", value / base <= most)


def _at_least(work: str, value: float | None, base: float | None, least: float) -> Judged:
    if value is None or not base:
        return Judged(work, "-", f"at least {least}", None)
    return Judged(work, f"{value / base:.2f}", f"at least {least}", value / base >= least)


def _bytes_at_most(work: str, value: float | None, most_gb: float) -> Judged:
    reached = None if value is None else value / GB
    return _number(f"{work}: GB", reached, most_gb, f"at most {most_gb}")


def _number(work: str, value: float | None, most: float | None, target: str | None) -> Judged:
    if value is None or most is None:
        return Judged(work, "-" if value is None else f"{value:.3f}", target or "-", None)
    return Judged(work, f"{value:.3f}", target or "-", value <= most)


# --- as text


def by_run(rows: Iterable[Row], group: str) -> list[str]:
    """A table for each run of the program: what another source or another hour measured is no yardstick."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        if row["group"] == group:
            runs.setdefault(row["run"], []).append(row)
    return [f"{run} on {_machine(found[0]['machine'])}\n\n{render(found, group)}" for run, found in runs.items()]


def _machine(described: Row) -> str:
    where = described["gpu"] or f"{described['cpu']}, {described['cores']} cores"
    return f"{where}, torch {described['torch']}, source {described['source']}"


def render(all_rows: Sequence[Row], group: str) -> str:
    """All cases with their medians, and the judgement."""
    rows = Rows(all_rows)
    head = ["case", "n", "median s", "least", "most", "GB/s", "anon GB", "pinned", "resident", "machine", "GPU over"]
    lines = [_measured(case, found) for case, found in rows.good.items()]
    parts = [aligned([head, *lines])]
    failed = {row["case"]: row["error"] for row in rows.all if "error" in row}
    parts += ["\n".join(f"{case}: {error}" for case, error in failed.items())] if failed else []
    parts += [_sweep(row) for row in rows.good.get("sweep", [])]
    verdicts = {True: "ok", False: "MISSED", None: "not measured"}
    judged = [[each.work, each.reached, each.target, verdicts[each.holds]] for each in judge(rows, group)]
    parts.append(aligned([["work", "reached", "target", ""], *judged]))
    if any(row["small"] for row in rows.all):
        parts.append("Small models: the numbers say nothing.")
    return "\n\n".join(parts)


def _measured(case: str, found: Sequence[Row]) -> list[str]:
    times = [row["seconds"] for row in found]
    median = statistics.median(times)
    rate = found[0]["bytes"] / median / GB if found[0].get("bytes") else None

    def gigabytes(value: Callable[[Row], float | None]) -> str:
        values = [each for row in found if (each := value(row)) is not None]
        return f"{statistics.median(values) / GB:.2f}" if values else "-"

    return [
        case,
        str(len(times)),
        f"{median:.3f}",
        f"{min(times):.3f}",
        f"{max(times):.3f}",
        "-" if rate is None else f"{rate:.1f}",
        gigabytes(_peak("RssAnon")),
        gigabytes(lambda row: (row.get("torch_pinned") or 0) + (row.get("our_pinned") or 0)),
        gigabytes(_peak("VmRSS")),
        gigabytes(_peak("taken")),
        gigabytes(gpu_over),
    ]


def _sweep(row: Row) -> str:
    settings = [[str(each) for each in setting] for setting in row["sweep"][:20]]
    return aligned([["threads", "chunk MB", "depth", "populate", "seconds"], *settings])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, each column as wide as its widest."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
