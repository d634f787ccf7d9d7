"""Which site's kernel it is that takes a whole model out of its budget, found by halves."""

from dataclasses import asdict, dataclass
from typing import Any

from kernelgraft.errors import GraftError, VerificationError
from kernelgraft.graft import Graft
from kernelgraft.verify._verification import Options, Progress, Verification, undisturbed
from kernelgraft.verify._whole import WholeModel
from kernelgraft.verify.report import Check, Report, plain


@dataclass(frozen=True)
class Step:
    """One try: the whole model with the kernels of the first sites.

    Attributes:
        sites: How many sites ran their kernels; all others ran their originals.
        last: Host path of the last one that did; "" where none did.
        check: The first check that found a fault, or the last one.
    """

    sites: int
    last: str
    check: Check

    def __str__(self) -> str:
        verdict = "passes" if self.check.passed else f"fails ({self.check.case})"
        sites = "the first site" if self.sites == 1 else f"the first {self.sites} sites"
        return f"kernels at {sites}, to {self.last}: {verdict}"


@dataclass(frozen=True)
class Bisection:
    """What a bisection found.

    Attributes:
        site: Host path of the first site with whose kernel the whole model leaves its budget.
        kernels: The names of its kernels.
        check: The check that fails with the kernels of all sites up to this one.
        without: The same with those of the sites before it alone; it passes. `None` for the first site.
        alone: What fails with this site's kernels and no others; it passes where errors of several sites add up.
        steps: Everything that was tried, in order.
    """

    site: str
    kernels: tuple[str, ...]
    check: Check
    without: Check | None
    alone: Check
    steps: tuple[Step, ...]

    def to_json(self) -> dict[str, Any]:
        """What was found as dicts, lists, text and numbers."""
        found: dict[str, Any] = plain(asdict(self))
        return found

    def __str__(self) -> str:
        lines = [
            f"Bisection: {' | '.join(self.kernels)} at {self.site} is the first whose kernel breaks the whole model",
            *(f"  {step}" for step in self.steps),
            f"  {self.check.case}: {self.check.faults[0]}",
        ]
        if self.alone.passed:
            lines.append("  alone this site passes: what it adds to the errors of the sites before it is too much")
        else:
            lines.append("  it does so alone too, with originals everywhere else")
        return "\n".join(lines)


def bisect(
    graft: Graft,
    inputs: Any = None,
    *,
    seed: int = 0,
    report: Report | None = None,
    progress: Progress | None = None,
) -> Bisection | None:
    """Turn kernels on and off by halves until the first one is found that breaks the whole model.

    Sites count in the order in which they run. What is found is the site for which the whole model passes with the
    kernels of all sites before it and fails with its own too, all later ones running their originals. The model and the
    graft are as they were afterwards, whatever happens.

    Args:
        graft: The graft.
        inputs: As for `Graft.verify`.
        seed: What is drawn is drawn with it.
        report: What `Graft.verify` found, with the whole model; made here if it is not given.
        progress: Is told what comes next.

    Returns:
        What was found; `None` if the whole model passes with all kernels.

    Raises:
        VerificationError: The whole model cannot be tried: a kernel writes into weights, which would stay there.
        GraftError: The graft was removed, or the report says nothing of the whole model.
    """
    if not graft.is_applied:
        raise GraftError("The graft was removed, so there is nothing to bisect. Graft the model again.")
    report = report or graft.verify(inputs, every_site=False, seed=seed)
    whole = [check for check in report.checks if check.kind < 0]
    if not whole and report.kinds:
        raise GraftError("The report handed in says nothing of the whole model: verify with whole_model=True.")
    if whole and whole[0].skipped:
        raise VerificationError(
            f"The whole model cannot be tried with kernels, and so not be bisected: {whole[0].skipped}. The sites' "
            f"own failures name the kernel: print(error.report).",
            report,
        )
    if all(check.passed for check in whole):
        return None
    verification = Verification(graft, inputs, Options(False, True, False, None, seed))
    with undisturbed(graft), verification.whole_model() as model:
        return _Search(graft, model, progress or (lambda *_: None)).found()


class _Search:
    def __init__(self, graft: Graft, model: WholeModel, progress: Progress) -> None:
        self.graft, self.model, self.progress = graft, model, progress
        order = model.order_of(each.site.host for each in graft._installed)
        self.sites = sorted(graft._installed, key=lambda each: order[each.site.host])
        self.hosts = [each.site.host for each in self.sites]
        self.steps: list[Step] = []

    def found(self) -> Bisection | None:
        total = len(self.hosts).bit_length() + 2
        tried = {len(self.hosts): self._step(len(self.hosts), total)}
        if tried[len(self.hosts)].passed:
            return None
        right, wrong = 0, len(self.hosts)
        while wrong - right > 1:
            middle = (right + wrong) // 2
            tried[middle] = self._step(middle, total)
            right, wrong = (middle, wrong) if tried[middle].passed else (right, middle)
        site = self.sites[wrong - 1]
        self.progress(f"{site.site.host} alone", len(self.steps), total)
        alone = tried[1] if wrong == 1 else self._check({site.site.host})
        kernels = dict.fromkeys(kernel.name for kernel in site.kernels)
        return Bisection(site.site.host, tuple(kernels), tried[wrong], tried.get(right), alone, tuple(self.steps))

    def _step(self, count: int, total: int) -> Check:
        self.progress(f"kernels at the first {count} of {len(self.hosts)} sites", len(self.steps), total)
        check = self._check(set(self.hosts[:count]))
        self.steps.append(Step(count, self.hosts[count - 1], check))
        return check

    def _check(self, on: set[str]) -> Check:
        """The first check that fails with the kernels of these sites, or the last one that passes."""
        with self.graft.reference([host for host in self.hosts if host not in on]):
            check = None
            for check in self.model.checks():
                if not check.passed:
                    break
        assert check is not None
        return check
