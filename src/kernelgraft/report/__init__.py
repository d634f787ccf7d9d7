"""One HTML file about a graft: where kernels stand, parameters, errors, speed, and what all that ran on.

The file opens from disk, loads nothing and runs no script. It is made of plain data: a plan, a model's tree, and the
reports of `Graft.verify` and `Graft.benchmark`, each of which may come from a JSON file of another machine.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from kernelgraft.benchmark.report import Report as Benchmark
from kernelgraft.environment import environment as _environment
from kernelgraft.errors import ReportError
from kernelgraft.plan import Plan
from kernelgraft.report._page import page_of
from kernelgraft.report.saved import read_benchmark, read_verification
from kernelgraft.report.tree import ModelTree, Node, tree_of
from kernelgraft.verify.report import WHOLE_MODEL
from kernelgraft.verify.report import Report as Verification

__all__ = ["ModelTree", "Node", "page", "read_benchmark", "read_verification", "tree_of", "write"]


def write(
    path: str | os.PathLike[str],
    plan: Plan,
    model: nn.Module | ModelTree,
    *,
    verification: Verification | None = None,
    benchmark: Benchmark | None = None,
    environment: Mapping[str, Any] | None = None,
) -> Path:
    """Write a report; as `page`, into a file.

    Args:
        path: The file; the folder that it is in is made if there is none.
        plan: As in `page`.
        model: As in `page`.
        verification: As in `page`.
        benchmark: As in `page`.
        environment: As in `page`.

    Returns:
        The path of the file.

    Raises:
        ReportError: As `page`, or the file cannot be written.
    """
    text = page(plan, model, verification=verification, benchmark=benchmark, environment=environment)
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A name that is no text (half of a surrogate pair in a path) is shown by its number.
        target.write_bytes(text.encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise ReportError(f"The report cannot be written to {target}: {error.strerror}. Name another file.") from error
    return target


def page(
    plan: Plan,
    model: nn.Module | ModelTree,
    *,
    verification: Verification | None = None,
    benchmark: Benchmark | None = None,
    environment: Mapping[str, Any] | None = None,
) -> str:
    """A report as one HTML document. The same arguments give the same text.

    Args:
        plan: What the graft does: `graft.plan`, or `kernelgraft.plan(...)`.
        model: The model, grafted or not, on any device, or its tree.
        verification: What `graft.verify()` found.
        benchmark: What `graft.benchmark()` found.
        environment: Names and values of what it ran on; that of this process if left out.

    Raises:
        ReportError: A verification or a benchmark is of another graft.
    """
    _require_same_graft(plan, verification, benchmark)
    tree = model if isinstance(model, ModelTree) else tree_of(model)
    return page_of(plan, tree, verification, benchmark, _environment() if environment is None else environment)


def _require_same_graft(plan: Plan, verification: Verification | None, benchmark: Benchmark | None) -> None:
    planned = {site.host: {use.name for use in plan.kinds[site.kind].kernels} for site in plan.sites}
    for function in plan.functions:
        for path in function.paths:
            planned.setdefault(path, set()).update(use.name for use in function.kernels)
    if verification is not None:
        sites = {site: set(kind.kernels) for kind in verification.kinds for site in kind.sites}
        _require_same("verification", plan, verification.model, planned, sites, missing=sorted(planned.keys() - sites))
    if benchmark is not None:
        # A title begins with the kernels: "A | B for RMSNorm", "A in the place of f() in Attention".
        rows = [row for row in benchmark.rows if row.kind != WHOLE_MODEL]
        sites = {row.site: set(re.split(" for | in the place of ", row.kind)[0].split(" | ")) for row in rows}
        _require_same("benchmark", plan, benchmark.model, planned, sites, missing=[])


def _require_same(
    what: str, plan: Plan, model: str, planned: dict[str, set[str]], sites: dict[str, set[str]], *, missing: list[str]
) -> None:
    other = [
        f"at {site} it has {', '.join(sorted(names))} and the plan {', '.join(sorted(planned.get(site, ()))) or 'none'}"
        for site, names in sites.items()
        if not names <= planned.get(site, set())
    ]
    other += [f"it has nothing at {site}" for site in missing]
    if model != plan.model:
        other.insert(0, f"it is of {model}")
    if other:
        raise ReportError(
            f"The {what} is of another graft than the plan of {plan.model} with {len(planned)} sites: {other[0]}. Hand "
            f"in one that was made with the same model and the same kernels, or leave it out."
        )
