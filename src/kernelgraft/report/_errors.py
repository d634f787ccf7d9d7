"""The part of the page about equality: errors per site, over what they may be."""

import math
from collections.abc import Iterable, Sequence

from kernelgraft.matching import collapse_paths
from kernelgraft.report._charts import Dots, dots, legend_of_dots
from kernelgraft.report._html import Html, joined, tag
from kernelgraft.verify._text import by_case, case_of, short, skipped_cases
from kernelgraft.verify.report import Check, Figure, KindReport, Report

_SHOWN = 8
"""Sites of a kind that are seen at once, those with the largest errors first."""


def verification_section(report: Report) -> Html:
    """What was tried, what is wrong, and how far each site is from the truth."""
    tried = [check for check in report.checks if not check.skipped]
    verdict = (
        tag("strong", "\N{CHECK MARK} Passed", class_="right")
        if report.passed
        else tag("strong", "\N{BALLOT X} Failed", class_="wrong")
    )
    facts = (
        f": {len(tried)} checks on {report.device} in {report.seconds:.0f} s, {report.inputs} inputs, "
        f"seed {report.seed}"
    )
    kinds = [
        _kind(kind, [check for check in report.checks if check.kind == index])
        for index, kind in enumerate(report.kinds)
    ]
    whole = [check for check in report.checks if check.kind < 0]
    return joined(
        tag("p", verdict, facts, class_="verdict"),
        tag("p", ", ".join(f"{name} {version}" for name, version in report.versions.items()), class_="versions"),
        _failures(report),
        legend_of_dots(),
        *kinds,
        joined(tag("h3", "The whole model"), _table(whole)) if whole else "",
    )


def _failures(report: Report) -> Html:
    """Every fault under the site and the input that show it."""
    wrong = [check for check in report.checks if check.faults]
    if not wrong:
        return joined()
    items = [
        tag(
            "li",
            tag("strong", report.kernel_of(check)),
            " at ",
            tag("code", check.site),
            f", {case_of(check)}",
            joined(" (", tag("code", check.input), ")") if check.input else "",
            tag("ul", *(tag("li", fault) for fault in check.faults)),
        )
        for check in wrong
    ]
    first, others = items[:_SHOWN], items[_SHOWN:]
    more = tag("details", tag("summary", f"{len(others)} more"), tag("ul", *others)) if others else ""
    return tag("div", tag("h3", "What is wrong"), tag("ul", *first), more, class_="failures")


def _kind(kind: KindReport, checks: Sequence[Check]) -> Html:
    rows = [_site(path, [check for check in checks if check.site == path]) for path in kind.tried or kind.sites]
    ordered = [row for _, row in sorted(rows, key=lambda pair: -pair[0])]
    first, others = ordered[:_SHOWN], ordered[_SHOWN:]
    more = (
        tag("details", tag("summary", f"{len(others)} more sites, with smaller errors"), dots(others)) if others else ""
    )
    wrong = any(check.faults for check in checks)
    table = tag("details", tag("summary", "Every input that was tried"), _table(checks), open=wrong)
    return joined(
        tag("h3", kind.title),
        tag("div", tag("code", collapse_paths(kind.sites)), class_="paths"),
        tag("ul", *(tag("li", fact) for fact in _facts(kind)), class_="facts"),
        dots(first),
        more,
        table,
    )


def _facts(kind: KindReport) -> Iterable[str]:
    yield f"kernels ran {kind.kernel_calls} times, originals {kind.original_calls} times in their place"
    yield f"gradients: {kind.gradients}"
    if kind.batch_invariant is not None:
        theirs = "the same" if kind.original_batch_invariant else "other"
        same = "the same" if kind.batch_invariant else "other"
        yield f"a row alone gives {same} bits as in a batch; of the original {theirs}"
    if kind.deterministic is not None:
        yield f"a call gives {'the same' if kind.deterministic else 'other'} bits a second time"
    yield from kind.notes


def _site(path: str, checks: Sequence[Check]) -> tuple[float, Dots]:
    """A site's row, and what it is sorted by: its worst error, and a fault before any."""
    tried = [check for check in checks if not check.skipped]
    figures = [figure for check in tried for figure in check.figures]
    output, gradient = (
        _worst_share([figure for figure in figures if figure.is_gradient is wanted]) for wanted in (False, True)
    )
    shares = [share for share in (output, gradient) if share is not None]
    wrong = any(check.faults for check in tried)
    said = _of_the_limit(max(shares)) if shares else "nothing was compared"
    figures_text = joined(
        said,
        joined(" ", tag("span", "\N{BALLOT X} wrong", class_="wrong")) if wrong else "",
    )
    count = f" {len(tried)} inputs" if len(tried) != 1 else " 1 input"
    label = joined(tag("code", path), tag("span", count, class_="count"))
    return math.inf if wrong else max(shares, default=0.0), Dots(label, figures_text, output, gradient)


def _table(checks: Sequence[Check]) -> Html:
    """One row for each input, those of all sites together with the worst figures."""
    groups = by_case(checks)
    head = tag("tr", *(tag("th", text) for text in ("input", "outputs", "gradients", "found")))
    rows = [_row(case, group) for case, group in groups.items()]
    skipped = [
        tag("p", f"Not tried: {', '.join(cases)}: {reason}", class_="note")
        for reason, cases in skipped_cases(checks).items()
    ]
    caption = tag(
        "p",
        "The kernel's error over the original's own, and what it may be: in the worst row of the worst tensor.",
        class_="note",
    )
    table = tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="scroll")
    return joined(*([caption, table] if rows else []), *skipped)


def _row(case: str, checks: Sequence[Check]) -> Html:
    figures = [figure for check in checks for figure in check.figures]
    wrong = sum(not check.passed for check in checks)
    found = tag(
        "span",
        f"\N{BALLOT X} wrong at {wrong} of {len(checks)}" if wrong else "\N{CHECK MARK}",
        class_="wrong" if wrong else "right",
    )
    notes = dict.fromkeys(check.note for check in checks if check.note)
    return tag(
        "tr",
        tag("td", case),
        tag("td", _quotient([figure for figure in figures if not figure.is_gradient]), class_="number"),
        tag("td", _quotient([figure for figure in figures if figure.is_gradient]), class_="number"),
        tag("td", found, *(f" {note}" for note in notes)),
    )


def _quotient(figures: Sequence[Figure]) -> str:
    if not figures:
        return "-"
    worst = max(figures, key=lambda figure: figure.share)
    return f"{short(worst.largest)} of {short(worst.limit)}"


def _worst_share(figures: Sequence[Figure]) -> float | None:
    return max((figure.share for figure in figures), default=None)


def _of_the_limit(share: float) -> str:
    return f"{100 * share:.2g}% of the limit" if share < 0.995 else f"{short(share)} times the limit"
