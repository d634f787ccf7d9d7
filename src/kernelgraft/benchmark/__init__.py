"""How fast a grafted model is beside the original, and how much memory it takes: `Graft.benchmark`.

Original and kernel run in turn in one process, on the same activations, each with the overhead that it has in a model.
What verification has not passed is not timed.
"""

from collections.abc import Sequence
from typing import Any

from kernelgraft.benchmark._benchmark import Benchmark, Options
from kernelgraft.benchmark._clock import COPIED
from kernelgraft.benchmark.report import Machine, Report, Row, Timing
from kernelgraft.errors import GraftError, VerificationError
from kernelgraft.graft import Graft
from kernelgraft.soundness._inputs import _device
from kernelgraft.verify import Report as Verified
from kernelgraft.verify import verify
from kernelgraft.verify._kinds import kinds_of
from kernelgraft.verify._verification import Progress, _device_name
from kernelgraft.verify.report import WHOLE_MODEL

__all__ = ["WHOLE_MODEL", "Machine", "Report", "Row", "Timing", "benchmark"]


def benchmark(
    graft: Graft,
    inputs: Any = None,
    *,
    tokens: Sequence[int] = (1, 32, 512),
    whole_model: bool = True,
    repeats: int = 20,
    seed: int = 0,
    verified: Verified | None = None,
    progress: Progress | None = None,
) -> Report:
    """As `Graft.benchmark`; `progress` is told what comes next, how much is done, and about how much there is."""
    if not graft._installed:
        gone = "was removed" if not graft.is_applied else "put no kernel into the model"
        raise GraftError(f"The graft {gone}, so there is nothing to time.")
    if repeats < 1 or not tokens or min(tokens) < 1:
        raise GraftError(
            f"A benchmark needs at least one run and numbers of tokens from 1 on: repeats={repeats}, tokens={tokens}."
        )
    device = _device(graft.model)
    if device.type not in COPIED:
        raise GraftError(f"A benchmark runs on CUDA and on the CPU; this model is on {device}. Move it there first.")
    handed_in = verified is not None
    if verified is None:
        verified = verify(graft, inputs, whole_model=whole_model, seed=seed)
    else:
        _require_same(graft, verified)
    _require_passed(verified)
    options = Options(tuple(dict.fromkeys(tokens)), whole_model, repeats, seed, look_again=handed_in)
    return Benchmark(graft, inputs, verified, options, progress).report()


def _require_same(graft: Graft, verified: Verified) -> None:
    """Refuse a verification of another graft."""
    here = {"model": type(graft.model).__name__, "device": _device_name(_device(graft.model))}
    told = {"model": verified.model, "device": verified.device}
    sites = [(kind.title, tuple(each.site.host for each in kind.sites)) for kind in kinds_of(graft)]
    told_sites = [(kind.title, tuple(kind.sites)) for kind in verified.kinds]
    if here != told or sites != told_sites:
        raise VerificationError(
            f"The report handed in as verified is not of this graft: it is of {_said(told, told_sites)}; this graft "
            f"is {_said(here, sites)}. Leave it out, or hand in what graft.verify() of this graft gives.",
            verified,
        )


def _said(of: dict[str, str], sites: Sequence[tuple[str, tuple[str, ...]]]) -> str:
    kinds = ", ".join(f"{kind} at {len(hosts)} site{'s' * (len(hosts) != 1)}" for kind, hosts in sites)
    return f"{of['model']} on {of['device']} with {kinds}"


def _require_passed(verified: Verified) -> None:
    wrong: dict[int, str] = {}
    for check in verified.checks:
        if check.faults:
            title = verified.kinds[check.kind].title if check.kind >= 0 else WHOLE_MODEL
            wrong.setdefault(check.kind, f"{title} ({check.site}, {check.case}: {check.faults[0]})")
    if wrong:
        listed = "\n  ".join(wrong.values())
        raise VerificationError(
            f"{verified.model} is not timed, since verification has not passed:\n  {listed}\n"
            f"print(error.report) shows all of it.",
            verified,
        )
