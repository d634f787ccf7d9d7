"""What a verification found: plain data, there and back as JSON, and a page that a person reads."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from kernelgraft.errors import VerificationError
from kernelgraft.verify._text import case_of, page, percent, short, summary
from kernelgraft.verify._tolerance import Distance

WHOLE_MODEL = "the whole model"
"""What stands for a site in a check of the whole model."""


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
        return _over(*self.nearest)

    @property
    def nearest(self) -> tuple[float, float]:
        """Of the worst and of the median row what is nearer to what it may be, or farther past it; and that."""
        return max(((self.largest, self.limit), (self.median, self.median_limit)), key=lambda pair: _over(*pair))

    def __str__(self) -> str:
        at = f" in row {list(self.row)}" if self.row else ""
        return (
            f"{self.tensor}: the kernel's error is {short(self.largest)} times the original's{at} (at most "
            f"{short(self.limit)}), {short(self.median)} times at the median (at most {short(self.median_limit)}); "
            f"the kernel is off by {percent(self.kernel)} there, the original by {percent(self.original)}"
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
        return "\n".join(summary(self))

    def __str__(self) -> str:
        return "\n".join(page(self))


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


def _over(value: float, limit: float) -> float:
    if limit > 0 and not math.isnan(value):
        return value / limit
    return math.inf if value > 0 or math.isnan(value) else 0.0
