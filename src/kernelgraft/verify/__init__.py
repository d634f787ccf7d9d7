"""Whether a grafted model answers as the original does, and trains as it does: `Graft.verify`.

For each kind of site the kernel and the original run on the same activations of the model, in the dtype in use, and
both are measured against the original in float64. The verdict is the quotient of the two errors (`_tolerance.py`).
What runs is a replica of the site, so nothing of it is in the model afterwards.
"""

from collections.abc import Sequence
from typing import Any

import torch

from kernelgraft.errors import GraftError
from kernelgraft.graft import Graft
from kernelgraft.verify._bisect import Bisection, Step, bisect
from kernelgraft.verify._repro import Repro, read_repro
from kernelgraft.verify._repro_writing import check_folder, write_repro
from kernelgraft.verify._verification import Options, Progress, Verification
from kernelgraft.verify.report import Check, Failure, Figure, KindReport, Report

__all__ = [
    "Bisection",
    "Check",
    "Failure",
    "Figure",
    "KindReport",
    "Report",
    "Repro",
    "Step",
    "bisect",
    "check_folder",
    "read_repro",
    "verify",
    "write_repro",
]


def verify(
    graft: Graft,
    inputs: Any = None,
    *,
    every_site: bool = True,
    whole_model: bool = True,
    gradients: bool = True,
    dtypes: Sequence[torch.dtype] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """As `Graft.verify`; `progress` is told what comes next, how much is done, and how much there is."""
    if not graft.is_applied:
        raise GraftError("The graft was removed, so there is nothing to verify. Graft the model again.")
    return Verification(graft, inputs, Options(every_site, whole_model, gradients, dtypes, seed), progress).report()


def verify_or_remove(graft: Graft, inputs: Any = None) -> None:
    """Verify one site of each kind, and take the graft out again if a kernel fails.

    Raises:
        VerificationError: A kernel fails, or nothing could be tried. The model is as it was.
    """
    try:
        verify(graft, inputs, every_site=False, whole_model=False).raise_for_failures()
    except BaseException as error:
        try:
            graft.remove()
        except GraftError as why:
            error.add_note(f"The graft is still in the model: {why}")
        raise
