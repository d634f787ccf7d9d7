"""The part of the page about the model: its tree with the places of kernels, what is left, and parameters."""

import math
from collections.abc import Iterable, Sequence

from kernelgraft.conversion.program import Program
from kernelgraft.matching import collapse_paths
from kernelgraft.plan import KindPlan, Plan, SitePlan, _spell_members
from kernelgraft.report._html import Html, joined, tag
from kernelgraft.report.marks import ABSORBED, HOST, Branch, branch_of, kernel_names, marks_of
from kernelgraft.report.tree import ModelTree

NO_BREAK = "\N{NO-BREAK SPACE}"
TIMES = "\N{MULTIPLICATION SIGN}"


def tree_section(plan: Plan, tree: ModelTree) -> Html:
    """The model's modules with what the plan says of them."""
    root = branch_of(tree.root, marks_of(plan))
    keys = [
        tag("span", tag("span", "Kernel", class_="badge host"), " stands here"),
        tag("span", tag("span", "in Kernel", class_="badge absorbed"), " taken over by one"),
    ]
    return joined(tag("p", *keys, class_="legend"), tag("ul", _item(root, inside=False), class_="tree"))


def left_section(plan: Plan) -> Html:
    """Entries that were left out, near misses, and what has no way back."""
    left = [(each.target, each.place, each.reason) for each in plan.rejected]
    groups: dict[tuple[str, str, str], list[str]] = {}
    for miss in plan.near_misses:
        groups.setdefault((miss.class_name, miss.wanted, miss.reason), []).append(miss.path)
    misses = [
        (f"{class_name} for {wanted}", collapse_paths(paths), reason)
        for (class_name, wanted, reason), paths in groups.items()
    ]
    return joined(
        tag("h3", "Near misses"),
        _listed(misses) if misses else tag("p", "None: what looks like a place of these kernels has one."),
        *([tag("h3", "Asked for and left as it is"), _listed(left)] if left else []),
    )


def parameters_section(plan: Plan, tree: ModelTree) -> Html:
    """What each kind of site makes of the original's parameters."""
    kinds = [
        (kind, [site for site in plan.sites if site.kind == index], kind.program)
        for index, kind in enumerate(plan.kinds)
    ]
    packed = [(kind, sites, program) for kind, sites, program in kinds if program is not None]
    after = tree.num_tensors + sum(
        len(sites) * (len(program.targets) - len(program.sources)) for _, sites, program in packed
    )
    counts = tag(
        "p",
        f"The untouched model has {tree.num_elements:,} parameters in {_tensors(tree.num_tensors)}, the grafted one "
        f"has them in {after:,}. ",
        "state_dict() and checkpoints keep the names and shapes of before."
        if packed
        else "The kernels run on the original's own parameters.",
    )
    return joined(counts, *(_kind(kind, sites, program) for kind, sites, program in packed))


def shape_text(shape: Sequence[int]) -> str:
    """A shape for people: `3072 x 576`."""
    return f"{NO_BREAK}{TIMES}{NO_BREAK}".join(map(str, shape)) or "scalar"


def _item(branch: Branch, inside: bool) -> Html:
    """One module; `inside` one that a kernel has taken over it is shown as what is not run."""
    row = joined(
        tag("span", branch.label, class_="name") if branch.label else "",
        " ",
        tag("span", branch.class_name, class_="class"),
        *(joined(" ", tag("span", mark.label, class_=f"badge {mark.role}", title=mark.title)) for mark in branch.marks),
        *(
            joined(" ", tag("span", f"{name}{NO_BREAK}{shape_text(shape)}", class_="parameter"))
            for name, shape in branch.parameters
        ),
    )
    faded = "inside" if inside else None
    if not branch.children:
        return tag("li", tag("div", row, class_="leaf"), class_=faded)
    within = inside or any(mark.role in (HOST, ABSORBED) for mark in branch.marks)
    children = tag("ul", *(_item(child, within) for child in branch.children))
    opened = any(child.has_marks for child in branch.children) or not branch.label
    return tag("li", tag("details", tag("summary", row), children, open=opened), class_=faded)


def _listed(rows: Iterable[tuple[str, str, str]]) -> Html:
    return tag(
        "ul",
        *(
            tag("li", tag("strong", what), joined(" at ", tag("code", place)) if place else "", ": ", reason)
            for what, place, reason in rows
        ),
    )


def _kind(kind: KindPlan, sites: Sequence[SitePlan], program: Program) -> Html:
    members = [path.rpartition(".")[2] for path in sites[0].paths]
    paths = joined(
        *(
            tag("div", tag("code", collapse_paths([site.paths[member] for site in sites])))
            for member in range(len(kind.classes))
        )
    )
    rows = [
        tag(
            "tr",
            tag("td", tag("code", name)),
            tag("td", shape_text(shape), class_="shape"),
            tag("td", tag("code", _spell_members(program.describe(name), members))),
            tag("td", *(tag("div", line) for line in _sources(program, name, members)), class_="shape"),
        )
        for name, shape in program.targets.items()
    ]
    head = tag("tr", *(tag("th", text) for text in ("after: packed", "shape", "is made of", "before: in the original")))
    elements = sum(math.prod(shape) for shape in program.targets.values())
    lost = [
        tag("p", tag("strong", "No way back"), f" for {_spell_members(name, members)}: {why}", class_="wrong")
        for name, why in kind.irreversible
    ]
    return joined(
        tag("h3", kernel_names(kind.kernels), " for ", " + ".join(kind.classes)),
        tag("div", paths, class_="paths"),
        tag("p", f"{_sites(len(sites))}, {elements:,} parameters each", _checked(kind)),
        tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="scroll"),
        tag("p", f"Dropped: {', '.join(_spell_members(name, members) for name in kind.dropped)}")
        if kind.dropped
        else "",
        *lost,
    )


def _checked(kind: KindPlan) -> str:
    return f"; {kind.checked}" if kind.checked else ""


def _sources(program: Program, name: str, members: Sequence[str]) -> list[str]:
    sources = program.computed[name] if name in program.computed else program.feeds[name]
    return [f"{_spell_members(source, members)} {shape_text(program.sources[source])}" for source in sources]


def _sites(count: int) -> str:
    return f"{count} site{'s' * (count != 1)}"


def _tensors(count: int) -> str:
    return f"{count:,} tensor{'s' * (count != 1)}"
