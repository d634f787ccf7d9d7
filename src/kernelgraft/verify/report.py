"""What a verification found: plain data, there and back as JSON, and a page that a person reads."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kernelgraft.errors import VerificationError
from kernelgraft.matching import collapse_paths
from kernelgraft.verify._tolerance import Distance

WHOLE_MODEL = "the whole model"
"""What stands for a site in a check of the whole model."""

_SHOWN = 12
_SHOWN_OF_CHECK = 3
_SHOWN_IN_SUMMARY = 4
HEAD = "the kernel's error over the original's"


@dataclass(frozen=True)
class Figure:
    """One tensor: the kernel's distance from the truth over the original's own.

    Attributes:
        tensor: What it is: "output", "gradient of mlp.gate_proj.weight", "logits".
        largest: The largest quotient of a row (a row is the last dim).
        limit: What that may be.
        median: The quotient at the median row.
        median_limit: What that may be.
        kernel: The kernel's error in the row of `largest`, over the size of that row.
        original: The original's error there.
        row: The index of that row.
    """

    tensor: str
    largest: float
    limit: float
    median: float
    median_limit: float
    kernel: float
    original: float
    row: tuple[int, ...] = ()

    @classmethod
    def of(cls, tensor: str, measured: Distance, has_rows: bool) -> "Figure":
        """The figure of a tensor for which `measured` was found."""
        row = measured.row if has_rows else ()
        return cls(
            tensor,
            measured.largest,
            measured.limit,
            measured.median,
            measured.median_limit,
            measured.kernel,
            measured.original,
            row,
        )

    @property
    def passed(self) -> bool:
        """Whether the kernel is as close to the truth as a right one is."""
        return self.largest <= self.limit and self.median <= self.median_limit

    @property
    def is_gradient(self) -> bool:
        """Whether the tensor is a gradient."""
        return self.tensor.startswith("gradient of ")

    @property
    def share(self) -> float:
        """How much of what it may be the error is, of the worst and of the median row the worse; NaN is infinite."""
        return max(_over(self.largest, self.limit), _over(self.median, self.median_limit))

    def __str__(self) -> str:
        at = f" in row {list(self.row)}" if self.row else ""
        return (
            f"{self.tensor}: the kernel's error is {short(self.largest)} times the original's{at} (at most "
            f"{short(self.limit)}), {short(self.median)} times at the median (at most {short(self.median_limit)}); "
            f"the kernel is off by {_share(self.kernel)} there, the original by {_share(self.original)}"
        )


@dataclass(frozen=True)
class Check:
    """One input tried at one site, or one check of the whole model.

    Attributes:
        kind: Index of the kind in `Report.kinds`; -1 for the whole model.
        site: Path of the module at which the kernel stands.
        case: What was tried: "activations of the model", "one token".
        mode: "eval" or "train".
        dtype: The dtype in which it ran.
        input: The tensors of the call by name, dtype and shape.
        faults: What is wrong, each with its figures; empty if nothing is.
        figures: The distances of all tensors that were compared.
        skipped: Why this was not tried, or "".
        note: What else was seen: how many tokens were the same, how often kernels ran.
    """

    kind: int
    site: str
    case: str
    mode: str
    dtype: str
    input: str
    faults: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    skipped: str = ""
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong; a check that was skipped found nothing."""
        return not self.faults


@dataclass(frozen=True)
class Failure:
    """One fault: where, with which input, and what."""

    kernel: str
    site: str
    case: str
    input: str
    fault: str

    def __str__(self) -> str:
        given = f" ({self.input})" if self.input else ""
        return f"{self.kernel} at {self.site}, {self.case}{given}: {self.fault}"


@dataclass(frozen=True)
class KindReport:
    """One kind of site: same kernels, same classes, same shapes.

    Attributes:
        title: The kernels and the classes that they stand for.
        kernels: Names of the kernels.
        sites: All its host paths.
        tried: Those at which something was tried.
        kernel_calls: How often kernels ran while they were tried.
        original_calls: How often an original's forward was entered meanwhile; it must be 0.
        gradients: "checked", or why not.
        batch_invariant: Whether a row alone gives the bits that it gives in a batch; `None` if that was not measured.
        original_batch_invariant: The same of the original.
        deterministic: Whether two calls gave the same bits; `None` if that was not measured.
        notes: What else a reader should know.
    """

    title: str
    kernels: tuple[str, ...]
    sites: tuple[str, ...]
    tried: tuple[str, ...] = ()
    kernel_calls: int = 0
    original_calls: int = 0
    gradients: str = ""
    batch_invariant: bool | None = None
    original_batch_invariant: bool | None = None
    deterministic: bool | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """The outcome of `Graft.verify`.

    Attributes:
        model: Name of the model's class.
        device: Where it is.
        inputs: What the activations come from: "given" or "drawn".
        seed: What everything was drawn with.
        versions: Of what computed this.
        seconds: How long it took.
        kinds: The kinds of sites.
        checks: Everything that was tried.
    """

    model: str
    device: str
    inputs: str
    seed: int
    versions: dict[str, str]
    seconds: float
    kinds: tuple[KindReport, ...]
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every kind of site was verified and nothing is wrong."""
        return not self.failures

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Every fault, with the site, the input and the figures."""
        return tuple(
            Failure(self.kernel_of(check), check.site, case_of(check), check.input, fault)
            for check in self.checks
            for fault in check.faults
        )

    def kernel_of(self, check: Check) -> str:
        """The names of the kernels that a check is about."""
        return "|".join(self.kinds[check.kind].kernels) if check.kind >= 0 else "kernels"

    def raise_for_failures(self) -> None:
        """Raise if something is wrong.

        Raises:
            VerificationError: With the first faults; `report` on it is this report.
        """
        failures = self.failures
        if not failures:
            return
        lines = [str(failure) for failure in failures[:5]]
        if len(failures) > 5:
            lines.append(f"and {len(failures) - 5} more: print(error.report)")
        raise VerificationError(
            f"{self.model} with kernels does not answer as it does without:\n  " + "\n  ".join(lines), self
        )

    def to_json(self) -> dict[str, Any]:
        """The report as dicts, lists, text and numbers; a number that is not finite is text ("inf", "nan")."""
        found: dict[str, Any] = plain(dataclasses.asdict(self))
        return {
            **found,
            "passed": self.passed,
            "failures": plain([dataclasses.asdict(each) for each in self.failures]),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Report":
        """The report that `to_json` wrote."""
        kinds = tuple(_made(KindReport, kind) for kind in data["kinds"])
        checks = tuple(
            _made(Check, {**check, "figures": tuple(_made(Figure, figure) for figure in check["figures"])})
            for check in data["checks"]
        )
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{**{name: data[name] for name in names}, "kinds": kinds, "checks": checks})

    def summary(self) -> str:
        """What was found in a line for each kind of site, and the failures; `str()` has every case."""
        return "\n".join(_summary(self))

    def __str__(self) -> str:
        return "\n".join(_page(self))


def plain(value: Any) -> Any:
    """As JSON has it: lists for tuples, and text for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _made(cls: Any, data: dict[str, Any]) -> Any:
    """A dataclass from what JSON made of it: tuples from lists, floats from the text of those that are not finite."""
    made = {}
    for each in dataclasses.fields(cls):
        value = data[each.name]
        if isinstance(value, list):
            value = tuple(value)
        made[each.name] = float(value) if each.type is float else value
    return cls(**made)


# --- the page


def _headline(report: Report) -> str:
    verdict = "passed" if report.passed else "FAILED"
    tried = [check for check in report.checks if not check.skipped]
    return (
        f"Verification of {report.model} on {report.device}: {verdict}, {len(tried)} checks in {report.seconds:.0f} s "
        f"({report.inputs} inputs, seed {report.seed}, {', '.join(f'{k} {v}' for k, v in report.versions.items())})"
    )


def _page(report: Report) -> Iterable[str]:
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


def _summary(report: Report) -> Iterable[str]:
    """One line for each kind of site, then what failed."""
    yield _headline(report)
    yield ""
    rows: list[tuple[str, ...]] = [_SUMMARY_HEAD]
    for index, kind in enumerate(report.kinds):
        checks = [check for check in report.checks if check.kind == index]
        rows.append((kind.title, str(len(kind.sites)), *_verdict(checks, _alone(kind))))
    whole = [check for check in report.checks if check.kind < 0]
    if whole:
        rows.append((WHOLE_MODEL, "", *_verdict(whole, "")))
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
        yield from [f"  note: {WHOLE_MODEL}, {check.case}: {note}" for note in (check.note, check.skipped) if note]
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
    if worst is None:
        return "-"
    in_a_row = _over(worst.largest, worst.limit) >= _over(worst.median, worst.median_limit)
    quotient, limit = (worst.largest, worst.limit) if in_a_row else (worst.median, worst.median_limit)
    return f"{short(quotient)} of {short(limit)}"


def _over(value: float, limit: float) -> float:
    if limit > 0 and not math.isnan(value):
        return value / limit
    return math.inf if value > 0 or math.isnan(value) else 0.0


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
    rows: dict[tuple[str, str], list[Check]] = {}
    for check in checks:
        if not check.skipped:
            rows.setdefault((case_of(check), ""), []).append(check)
    if rows:
        width = max(len(HEAD), *(len(case) for case, _ in rows))
        yield f"  {HEAD:<{width}}  {'outputs':>15}  {'gradients':>15}   (largest, median)"
        for (case, _), group in rows.items():
            outputs = [f for check in group for f in check.figures if not f.is_gradient]
            gradients = [f for check in group for f in check.figures if f.is_gradient]
            wrong = sum(not check.passed for check in group)
            said = f"  {'WRONG' if len(group) == 1 else f'WRONG at {wrong} of {len(group)} sites'}" if wrong else ""
            note = "".join(f"  {check.note}" for check in group if check.note)
            yield f"  {case:<{width}}  {_worst(outputs):>15}  {_worst(gradients):>15}{said}{note}"
    for reason, cases in skipped_cases(checks).items():
        yield f"  not tried: {', '.join(cases)}: {reason}"


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


def _share(number: float) -> str:
    return f"{100 * number:.2g}%"
