"""What a plan says of each path of a model, and the model's tree with that, equal siblings written once."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kernelgraft.matching import collapse_paths
from kernelgraft.plan import KernelUse, Plan
from kernelgraft.report.tree import Node

HOST, ABSORBED, FUNCTION, MISS, LEFT = "host", "absorbed", "function", "miss", "left"
"""A kernel stands here; a kernel that stands elsewhere took this over; a function kernel is called here; a near miss;
an entry was left out here."""


@dataclass(frozen=True)
class Mark:
    """One thing to say of a path: which of the above, in a word or two, and at length."""

    role: str
    label: str
    title: str


@dataclass(frozen=True)
class Branch:
    """A module, or several equal siblings, with the marks that they all carry.

    Attributes:
        label: Its name, or the names: `{0..29}`.
        class_name: Name of the class.
        parameters: Names and shapes of its own parameters.
        marks: What the plan says of it.
        children: What is in it.
        has_marks: Whether it, or anything in it, has a mark.
    """

    label: str
    class_name: str
    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    marks: tuple[Mark, ...]
    children: tuple["Branch", ...]
    has_marks: bool


def marks_of(plan: Plan) -> dict[str, tuple[Mark, ...]]:
    """Everything that a plan says of a path, by path."""
    found: dict[str, list[Mark]] = {}
    for site in plan.sites:
        kernels = kernel_names(plan.kinds[site.kind].kernels)
        for path in site.paths:
            # Said without the number of the layer, so that equal layers stay equal.
            host = site.host.rpartition(".")[2]
            mark = (
                Mark(HOST, kernels, f"{kernels} stands here")
                if path == site.host
                else Mark(ABSORBED, f"in {kernels}", f"taken over by {kernels}, which stands at {host}")
            )
            found.setdefault(path, []).append(mark)
    for function in plan.functions:
        kernels = kernel_names(function.kernels)
        label = f"{function.replaces}() is {kernels}"
        for path in function.paths:
            found.setdefault(path, []).append(Mark(FUNCTION, label, f"{kernels} in the place of {function.replaces}()"))
    for miss in plan.near_misses:
        mark = Mark(MISS, "near miss", f"not taken for {miss.wanted}: {miss.reason}")
        found.setdefault(miss.path, []).append(mark)
    for rejected in plan.rejected:
        for path in rejected.place.split(" + ") if rejected.place else ():
            mark = Mark(LEFT, "left as it is", f"{rejected.target}: {rejected.reason}")
            found.setdefault(path, []).append(mark)
    return {path: tuple(marks) for path, marks in found.items()}


def branch_of(node: Node, marks: Mapping[str, tuple[Mark, ...]]) -> Branch:
    """A model's tree with its marks."""
    return _branch(node, "", marks)


def kernel_names(uses: Iterable[KernelUse]) -> str:
    """The kernels of all modes, each once."""
    return " | ".join(dict.fromkeys(use.name for use in uses))


def _branch(node: Node, path: str, marks: Mapping[str, tuple[Mark, ...]]) -> Branch:
    children = _merged(_branch(child, f"{path}.{child.name}" if path else child.name, marks) for child in node.children)
    own = marks.get(path, ())
    has_marks = bool(own) or any(child.has_marks for child in children)
    return Branch(node.name, node.class_name, node.parameters, own, children, has_marks)


def _merged(branches: Iterable[Branch]) -> tuple[Branch, ...]:
    """Siblings with numbers for names that are equal in all else become one."""
    groups: dict[object, list[Branch]] = {}
    for branch in branches:
        same = (
            (branch.class_name, branch.parameters, branch.marks, branch.children)
            if branch.label.isdecimal()
            else branch.label
        )
        groups.setdefault(same, []).append(branch)
    return tuple(
        Branch(
            collapse_paths([branch.label for branch in group]),
            group[0].class_name,
            group[0].parameters,
            group[0].marks,
            group[0].children,
            group[0].has_marks,
        )
        for group in groups.values()
    )
