"""What a check of a kernel repository found: plain data, and text for people."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        rule: What was looked at, in a word or two: "layers", "signature".
        what: What is wrong, with the names and values that were found.
        where: The file and line, or the module in the model.
        fix: What to write instead.
        severity: "error" if the kernel will not work, or not as it says; "warning" if it may be meant.
    """

    rule: str
    what: str
    where: str
    fix: str
    severity: Severity = "error"

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.what} [{self.rule}]\n  fix: {self.fix}"


@dataclass(frozen=True)
class CheckReport:
    """All that a check found.

    Attributes:
        folder: The repository.
        kernels: The kernels in its `layers`.
        findings: What is wrong, errors first.
        not_checked: What could not be looked at, and why.
    """

    folder: str
    kernels: tuple[str, ...]
    findings: tuple[Finding, ...]
    not_checked: tuple[str, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that are errors."""
        return tuple(each for each in self.findings if each.severity == "error")

    @property
    def passed(self) -> bool:
        """Whether there is no error; warnings do not count."""
        return not self.errors

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"passed": self.passed, **asdict(self)}

    def __str__(self) -> str:
        warnings = len(self.findings) - len(self.errors)
        kernels = ", ".join(self.kernels) or "no kernel"
        counted = f"{_number(len(self.errors), 'error')}, {_number(warnings, 'warning')}"
        lines = [f"{self.folder} ({kernels}): {counted}"]
        lines += [str(each) for each in self.findings]
        lines += [f"not checked: {each}" for each in self.not_checked]
        return "\n".join(lines)


def _number(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"
