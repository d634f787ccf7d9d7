"""What a verification found as a person reads it: all of it, or a line for each kind of site."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kernelgraft.matching import collapse_paths

if TYPE_CHECKING:
    from kernelgraft.verify.report import Check, Figure, KindReport, Report

HEAD = "the kernel's error over the original's"
_SHOWN = 12
_SHOWN_OF_CHECK = 3
_SHOWN_IN_SUMMARY = 4


def _headline(report: Report) -> str:
    verdict = "passed" if report.passed else "FAILED"
    tried = [check for check in report.checks if not check.skipped]
    return (
        f"Verification of {report.model} on {report.device}: {verdict}, {len(tried)} checks in {report.seconds:.0f} s "
        f"({report.inputs} inputs, seed {report.seed}, {', '.join(f'{k} {v}' for k, v in report.versions.items())})"
    )


def page(report: Report) -> Iterable[str]:
    yield _headline(report)
    for index, kind in enumerate(report.kinds):
        yield ""
        yield from _kind_lines(kind, [check for check in report.checks if check.kind == index])
    whole = [check for check in report.checks if check.kind < 0]
    if whole:
        yield ""
        yield "The whole model"
        yield from _table(whole)
    yield from _failures(report, [check for check in report.checks if check.faults][:_SHOWN], _SHOWN_OF_CHECK)


def _failures(report: Report, shown: Sequence[Check], shown_of_check: int) -> Iterable[str]:
    """The faults of some checks, and how many others there are."""
    wrong = [check for check in report.checks if check.faults]
    if wrong:
        yield ""
        yield f"Failures: {sum(len(check.faults) for check in wrong)}"
        for check in shown:
            given = f" ({check.input})" if check.input else ""
            yield f"  {report.kernel_of(check)} at {check.site}, {case_of(check)}{given}"
            yield from (f"    {fault}" for fault in check.faults[:shown_of_check])
            if len(check.faults) > shown_of_check:
                yield f"    and {len(check.faults) - shown_of_check} more"
        if len(wrong) > len(shown):
            yield f"  and {len(wrong) - len(shown)} more inputs: see report.failures, or verify --full"


def summary(report: Report) -> Iterable[str]:
    """One line for each kind of site, then what failed."""
    yield _headline(report)
    yield ""
    rows: list[tuple[str, ...]] = [_SUMMARY_HEAD]
    for index, kind in enumerate(report.kinds):
        checks = [check for check in report.checks if check.kind == index]
        rows.append((kind.title, str(len(kind.sites)), *_verdict(checks, _alone(kind))))
    whole = [check for check in report.checks if check.kind < 0]
    if whole:
        rows.append((whole[0].site, "", *_verdict(whole, "")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield ""
    yield "  outputs, gradients: the kernel's largest error over the original's, and what a right kernel stays below"
    yield "  row alone: whether a row alone has the bits that it has in a batch"
    for kind in report.kinds:
        said = [] if kind.gradients == "checked" else [f"gradients {kind.gradients}"]
        yield from (f"  note: {kind.title}: {note}" for note in (*said, *kind.notes))
    for check in whole:
        yield from [f"  note: {check.site}, {check.case}: {note}" for note in (check.note, check.skipped) if note]
    wrong = [check for check in report.checks if check.faults]
    each = list({(check.kind, check.site): check for check in reversed(wrong)}.values())[::-1]
    yield from _failures(report, each[:_SHOWN_IN_SUMMARY], 1)


_SUMMARY_HEAD = ("", "sites", "tried", "outputs", "gradients", "row alone", "verdict")


def _verdict(checks: Sequence[Check], alone: str) -> tuple[str, ...]:
    tried = [check for check in checks if not check.skipped]
    verdict = "FAILED" if any(check.faults for check in checks) else "passed" if tried else "not tried"
    worst = [_nearest([f for f in _all(tried) if f.is_gradient is wanted]) for wanted in (False, True)]
    return str(len(tried)), *worst, alone, verdict


def _all(checks: Sequence[Check]) -> list[Figure]:
    return [figure for check in checks for figure in check.figures]


def _nearest(figures: Sequence[Figure]) -> str:
    """The figure that is nearest to its limit, or farthest past it."""
    worst = max(figures, key=lambda figure: figure.share, default=None)
    return "-" if worst is None else f"{short(worst.nearest[0])} of {short(worst.nearest[1])}"


def _alone(kind: KindReport) -> str:
    words = {None: "-", True: "same bits", False: "other bits"}
    theirs = kind.original_batch_invariant
    also = f" (original: {words[theirs]})" if theirs not in (None, kind.batch_invariant) else ""
    return f"{words[kind.batch_invariant]}{also}"


def _kind_lines(kind: KindReport, checks: Sequence[Check]) -> Iterable[str]:
    yield f"{kind.title}, {len(kind.sites)} site{'s' * (len(kind.sites) != 1)}"
    yield f"  at         {collapse_paths(kind.sites)}"
    yield f"  ran        kernels {kind.kernel_calls} times, originals {kind.original_calls} times in their place"
    yield f"  gradients  {kind.gradients}"
    if kind.batch_invariant is not None:
        same = "the same" if kind.batch_invariant else "other"
        theirs = "the same" if kind.original_batch_invariant else "other"
        yield f"  batch      a row alone gives {same} bits as in a batch; of the original {theirs}"
    if kind.deterministic is not None:
        yield f"  repeated   a call gives {'the same bits' if kind.deterministic else 'other bits'} a second time"
    for note in kind.notes:
        yield f"  note       {note}"
    yield from _table(checks)


def _table(checks: Sequence[Check]) -> Iterable[str]:
    """One line for each case, those of equal sites together, with the worst quotients."""
    rows = by_case(checks)
    if rows:
        width = max(len(HEAD), *map(len, rows))
        yield f"  {HEAD:<{width}}  {'outputs':>15}  {'gradients':>15}   (largest, median)"
        for case, group in rows.items():
            outputs = [f for check in group for f in check.figures if not f.is_gradient]
            gradients = [f for check in group for f in check.figures if f.is_gradient]
            wrong = sum(not check.passed for check in group)
            said = f"  {'WRONG' if len(group) == 1 else f'WRONG at {wrong} of {len(group)} sites'}" if wrong else ""
            note = "".join(f"  {check.note}" for check in group if check.note)
            yield f"  {case:<{width}}  {_worst(outputs):>15}  {_worst(gradients):>15}{said}{note}"
    for reason, cases in skipped_cases(checks).items():
        yield f"  not tried: {', '.join(cases)}: {reason}"


def by_case(checks: Sequence[Check]) -> dict[str, list[Check]]:
    """What was tried, by its case: at several sites, maybe."""
    found: dict[str, list[Check]] = {}
    for check in checks:
        if not check.skipped:
            found.setdefault(case_of(check), []).append(check)
    return found


def skipped_cases(checks: Sequence[Check]) -> dict[str, list[str]]:
    """What was not tried, by the reason."""
    found: dict[str, list[str]] = {}
    for check in checks:
        if check.skipped and case_of(check) not in found.setdefault(check.skipped, []):
            found[check.skipped].append(case_of(check))
    return found


def case_of(check: Check) -> str:
    """A case as a report names it: with its mode and dtype."""
    return f"{check.case}{', in training' if check.mode == 'train' else ''}{f', {check.dtype}' if check.dtype else ''}"


def _worst(figures: Sequence[Figure]) -> str:
    if not figures:
        return "-"
    return f"{short(max(f.largest for f in figures))}, {short(max(f.median for f in figures))}"


def short(number: float) -> str:
    """A figure in two digits or so."""
    return (
        f"{number:.2g}"
        if number < 100 or not math.isfinite(number)
        else f"{number:.0f}"
        if number < 1e6
        else f"{number:.0e}"
    )


def percent(number: float) -> str:
    return f"{100 * number:.2g}%"
