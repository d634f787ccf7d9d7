"""The rows as tables, and beside them what issue 7 asks for: reached, target, ok or missed.

python -m benchmarks.kernels.table FILE...
python -m benchmarks.kernels.table --markdown FILE...
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

LIMIT = "limit"
"""The variant that only moves the bytes of a work, which is how fast it can be in this measurement; it is no rival."""

Row = dict[str, Any]

HEAD = ("work", "variant", "median us", "p20 - p80", "GB/s", "of copy", "TFLOP/s", "of matrix", "peak GB", "off by")


@dataclass(frozen=True)
class Judged:
    """One line: `holds` is `None` where what it needs was not measured."""

    work: str
    reached: str
    target: str
    holds: bool | None


def runs(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by script and start of its run: what is in one of them was measured side by side."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["row"], row["run"]), []).append(row)
    return found


def render(rows: Sequence[Row], *, markdown: bool = False) -> str:
    """All rows, run by run, and what is asked for."""
    parts = []
    for (row, run), found in runs(rows).items():
        table = [HEAD, *(_cells(each) for each in found)]
        parts += [f"{row}, {run}, on {_said(found[0])}", f"    {found[0]['command']}"]
        parts.append(_markdown(table) if markdown else _aligned(table))
        verdicts = {True: "ok", False: "MISSED", None: "not measured"}
        judged = [(each.work, each.reached, each.target, verdicts[each.holds]) for each in judge(found)]
        if judged:
            table = [("work", "reached", "target", ""), *judged]
            parts.append(_markdown(table) if markdown else _aligned(table))
    if any(row["tiny"] for row in rows):
        parts.append("Tiny sizes: the numbers say nothing.")
    return "\n\n".join(parts)


def _said(row: Row) -> str:
    described = row["machine"]
    where = described["gpu"] or f"{described['cpu']}, {described['cores']} cores"
    packages = ("torch", "triton", "transformers", "liger-kernel", "quack-kernels")
    versions = ", ".join(f"{name} {described[name]}" for name in packages if described.get(name))
    ceilings = ""
    if row.get("copy_bandwidth"):
        copied, multiplied = row["copy_bandwidth"] / 1e12, row["matrix_rate"] / 1e12
        ceilings = f"; it copies {copied:.2f} TB/s and multiplies {multiplied:.0f} TFLOP/s"
    return f"{where}: {versions}, source {described['source']}{ceilings}"


def _cells(row: Row) -> tuple[str, ...]:
    lead = (row["work"], row["variant"])
    if "median_us" not in row:
        why = f"skipped: {row['skipped']}" if "skipped" in row else f"FAILED: {row['error']}"
        return (*lead, why, *[""] * (len(HEAD) - 3))
    share: Callable[[str], str] = lambda name: f"{row[name]:.1%}" if name in row else ""  # noqa: E731
    number: Callable[[str], str] = lambda name: f"{row[name]:.0f}" if name in row else ""  # noqa: E731
    peak = f"{row['peak_bytes'] / 1e9:.2f}" if row.get("peak_bytes") is not None else ""
    off = f"{row['relative_error']:.1e}" if "relative_error" in row else ""
    spread = f"{_us(row['p20_us'])} - {_us(row['p80_us'])}"
    rates = (number("gb_s"), share("copy_share"), number("tflop_s"), share("matrix_share"))
    return (*lead, _us(row["median_us"]), spread, *rates, peak, off)


def _us(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    # A line that says why there is no time may run on.
    widths = [max((len(line[at]) for line in lines if line[-1] or at < 2), default=0) for at in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *others = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *others])


# --- what issue 7 asks for


class Found:
    """The rows of one run, to ask for what they say."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = [row for row in rows if "median_us" in row and "error" not in row]
        self.works = list(dict.fromkeys(row["work"] for row in rows))

    def of(self, work: str, variant: str) -> list[Row]:
        """The rows of a work whose variant's name matches."""
        return [row for row in self.rows if row["work"] == work and fnmatchcase(row["variant"], variant)]

    def ours(self, work: str) -> Row | None:
        """The fastest of ours."""
        return min(self.of(work, "ours*"), key=lambda row: row["median_us"], default=None)

    def rival(self, work: str) -> Row | None:
        """The fastest of the others."""
        others = [row for row in self.of(work, "*") if not row["variant"].startswith(("ours", LIMIT))]
        return min(others, key=lambda row: row["median_us"], default=None)

    def one(self, work: str, variant: str) -> Row | None:
        """The row of one variant."""
        return next(iter(self.of(work, variant)), None)


def judge(rows: Sequence[Row]) -> list[Judged]:
    """Every line of the issue's table that a run has a part in; thresholds have none."""
    found, of_row = Found(rows), _JUDGES.get(rows[0]["row"])
    return [] if of_row is None else [each for work in found.works for each in of_row(found, work)]


def _rms_norm(found: Found, work: str) -> Iterator[Judged]:
    yield _share(found, work, 0.9) if work.startswith("8192x4096") else _against_rivals(found, work)


def _rms_norm_mlp(found: Found, work: str) -> Iterator[Judged]:
    ours = found.ours(work)
    if work.startswith("8192 tokens"):
        yield _against_rivals(found, work)
    elif "H 1024" in work:
        reached = None if ours is None else ours["median_us"]
        yield _number(f"{work}: us", reached, 8, at_most=True)
    else:
        yield _share(found, work, 0.95 if work.startswith("1 tokens") else 0.9)


def _decoder_layer(found: Found, work: str) -> Iterator[Judged]:
    if work.startswith("decode"):
        yield _share(found, work, 0.85 if "8b" in work else 0.45)
    else:
        yield _ratio(f"{work}: time over torch.compile's", found.ours(work), found.one(work, "compile"), 1.0)


def _training_step(found: Found, work: str) -> Iterator[Judged]:
    ours = found.ours(work)
    yield _ratio(f"{work}: time over eager's", ours, found.one(work, "eager"), 0.75)
    eager = found.one(work, "eager")
    if ours is not None and eager is not None and ours.get("device_us") and eager.get("device_us"):
        reached = ours["device_us"] / eager["device_us"]
        yield _number(f"{work}: the device's time over eager's", reached, 0.75, at_most=True)
    # The peak is over what there was before, and the model was there.
    known = ours is not None and ours["peak_bytes"] is not None
    reached = (ours["peak_bytes"] + ours["model_bytes"]) / 1e9 if known and ours is not None else None
    yield _number(f"{work}: GB", reached, 12, at_most=True)


def _generate(found: Found, work: str) -> Iterator[Judged]:
    ours, eager = found.ours(work), found.one(work, "eager")
    reached = None if ours is None or eager is None else eager["median_us"] / ours["median_us"]
    yield _number(f"{work}: times as fast as eager", reached, 3, at_most=False)


def _compiled_decode(found: Found, work: str) -> Iterator[Judged]:
    bound = 0.75 if "8b" in work else 0.6
    yield _ratio(f"{work}: time over that without the graft", found.ours(work), found.one(work, "eager"), bound)


def _first_step(found: Found, work: str) -> Iterator[Judged]:
    for variant in ("ours", "ours, after eager"):
        row = found.one(work, variant)
        reached = None if row is None else row["ratio"]
        yield _number(f"{work}, {variant}: over the steady step, nothing tuned", reached, 1.5, at_most=True)


_JUDGES: dict[str, Callable[[Found, str], Iterator[Judged]]] = {
    "rms_norm": _rms_norm,
    "rms_norm_mlp": _rms_norm_mlp,
    "decoder_layer": _decoder_layer,
    "training_step": _training_step,
    "generate": _generate,
    "compiled_decode": _compiled_decode,
    "first_step": _first_step,
}


def _number(work: str, reached: float | None, bound: float, *, at_most: bool) -> Judged:
    target = f"at {'most' if at_most else 'least'} {bound:g}"
    if reached is None:
        return Judged(work, "-", target, None)
    return Judged(work, f"{reached:.3g}", target, reached <= bound if at_most else reached >= bound)


def _share(found: Found, work: str, bound: float) -> Judged:
    ours = found.ours(work)
    if ours is None:
        return Judged(f"{work}: share of copy bandwidth", "-", f"at least {bound:.0%}", None)
    share = ours["copy_share"]
    return Judged(f"{work}: share of copy bandwidth", f"{share:.1%}", f"at least {bound:.0%}", share >= bound)


def _against_rivals(found: Found, work: str) -> Judged:
    rival = found.rival(work)
    name = "" if rival is None else f", {rival['variant']}"
    return _ratio(f"{work}: time over the best rival's{name}", found.ours(work), rival, 1.0)


def _ratio(work: str, ours: Row | None, other: Row | None, bound: float) -> Judged:
    reached = None if ours is None or other is None else ours["median_us"] / other["median_us"]
    return _number(work, reached, bound, at_most=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--markdown", action="store_true", help="as the docs have it")
    asked = parser.parse_args(arguments)
    rows = [json.loads(line) for file in asked.files for line in file.read_text().splitlines()]
    print(render(rows, markdown=asked.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
