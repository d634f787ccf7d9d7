"""A plan: all the sites of one model, with every parameter's origin. Plain data, made before anything changes.

`print(plan)` is a page to read, `plan.to_json()` a document to keep; `planner.py` makes plans and proves them.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kernelgraft.conversion.program import Program
from kernelgraft.matching import NearMiss, collapse_paths


@dataclass(frozen=True)
class KernelUse:
    """A kernel, and one mode in which it runs at a site."""

    name: str
    reference: str
    digest: str
    training: bool
    compiling: bool


@dataclass(frozen=True)
class KindPlan:
    """What all sites of one kind share: same kernels, same classes, same shapes.

    Attributes:
        target: The config's entry, as text.
        classes: Class names of the members.
        layout: Name of the layout's class; "" if the kernel runs on the original's own parameters.
        kernels: The kernels by mode.
        program: Where every packed parameter comes from; names of originals are `<member's index>.<name>`.
        dropped: Originals that the layout does not use, which stay in the skeleton.
        irreversible: `(original, why)` for those that cannot be had back from the packed parameters.
        checked: What was found about the soundness of the fusion.
    """

    target: str
    classes: tuple[str, ...]
    layout: str
    kernels: tuple[KernelUse, ...]
    program: Program | None
    dropped: tuple[str, ...] = ()
    irreversible: tuple[tuple[str, str], ...] = ()
    checked: str = ""


@dataclass(frozen=True)
class SitePlan:
    """One place where one kernel goes: the host's path, the paths it takes over, and the index of its kind."""

    host: str
    paths: tuple[str, ...]
    kind: int


@dataclass(frozen=True)
class FunctionPlan:
    """A function kernel bound to the modules at `paths`, in the place of the function called `replaces`."""

    target: str
    replaces: str
    paths: tuple[str, ...]
    kernels: tuple[KernelUse, ...]


@dataclass(frozen=True)
class Rejected:
    """An entry, or a place, that was left as it is, and why."""

    target: str
    place: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """All that a graft will do to one model.

    Attributes:
        model: Name of the model's class.
        device: Device type for which the kernels were chosen.
        sites: The sites, in the model's order.
        kinds: What sites share, referred to by index.
        functions: Function kernels.
        rejected: What was asked for or offered and is left as it is.
        near_misses: Modules whose name suggests a kernel and that were not taken.
    """

    model: str
    device: str
    sites: tuple[SitePlan, ...]
    kinds: tuple[KindPlan, ...]
    functions: tuple[FunctionPlan, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The plan as dicts, lists, text and numbers, for `json.dump`."""
        found: dict[str, Any] = _plain(dataclasses.replace(self, kinds=()))
        found["kinds"] = [
            {**_plain(dataclasses.replace(kind, program=None)), "program": kind.program and kind.program.to_json()}
            for kind in self.kinds
        ]
        return found

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Plan":
        """The plan that `to_json` wrote."""
        return cls(
            model=data["model"],
            device=data["device"],
            sites=tuple(SitePlan(s["host"], tuple(s["paths"]), s["kind"]) for s in data["sites"]),
            kinds=tuple(_kind_from(kind) for kind in data["kinds"]),
            functions=tuple(
                FunctionPlan(f["target"], f["replaces"], tuple(f["paths"]), _uses(f["kernels"]))
                for f in data["functions"]
            ),
            rejected=tuple(Rejected(**r) for r in data["rejected"]),
            near_misses=tuple(NearMiss(**n) for n in data["near_misses"]),
        )

    def __str__(self) -> str:
        return "\n".join(_page(self))

    def summary(self) -> str:
        """One line: how many sites each kernel has, and how many near misses there are."""
        counts: dict[str, int] = {}
        for site in self.sites:
            name = "|".join(dict.fromkeys(use.name for use in self.kinds[site.kind].kernels))
            counts[name] = counts.get(name, 0) + 1
        for function in self.functions:
            name = "|".join(dict.fromkeys(use.name for use in function.kernels))
            counts[name] = counts.get(name, 0) + len(function.paths)
        found = ", ".join(f"{name} at {count} site{'s' * (count != 1)}" for name, count in counts.items())
        misses = len(self.near_misses)
        return f"{self.model}: {found or 'nothing grafted'}; {misses} near miss{'es' * (misses != 1)}"


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value, dict_factory=lambda items: {key: _listed(item) for key, item in items})


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple | list) else value


def _uses(data: Iterable[dict[str, Any]]) -> tuple[KernelUse, ...]:
    return tuple(KernelUse(**use) for use in data)


def _kind_from(data: dict[str, Any]) -> KindPlan:
    return KindPlan(
        target=data["target"],
        classes=tuple(data["classes"]),
        layout=data["layout"],
        kernels=_uses(data["kernels"]),
        program=Program.from_json(data["program"]) if data["program"] else None,
        dropped=tuple(data["dropped"]),
        irreversible=tuple((name, why) for name, why in data["irreversible"]),
        checked=data["checked"],
    )


# --- the page


def _page(plan: Plan) -> Iterable[str]:
    yield f"Plan for {plan.model} on {plan.device}: {len(plan.sites)} sites"
    for index, kind in enumerate(plan.kinds):
        yield ""
        yield from _kind_lines(kind, [site for site in plan.sites if site.kind == index])
    for function in plan.functions:
        yield ""
        yield f"{_kernel_names(function.kernels)} in the place of {function.replaces}()"
        yield f"  from {_references(function.kernels)}"
        yield f"  called by {collapse_paths(function.paths)}"
    yield from _section("Left as it is", [f"{r.target}: {_at(r.place)}{r.reason}" for r in plan.rejected])
    yield from _section("Near misses", _miss_lines(plan.near_misses))


def _kind_lines(kind: KindPlan, sites: Sequence[SitePlan]) -> Iterable[str]:
    yield f"{_kernel_names(kind.kernels)} for {' + '.join(kind.classes)}, {len(sites)} sites"
    yield f"  from    {_references(kind.kernels)}"
    modes = _modes(kind.kernels)
    if modes:
        yield f"  runs in {modes}"
    for member in range(len(kind.classes)):
        lead = "  at      " if member == 0 else "          "
        path = collapse_paths([site.paths[member] for site in sites])
        host = " (the kernel stands here)" if sites[0].paths[member] == sites[0].host and len(kind.classes) > 1 else ""
        yield f"{lead}{path}{host}"
    if kind.checked:
        yield f"  chain   {kind.checked}"
    if kind.program is not None:
        yield from _parameter_lines(kind, kind.program, [path.rpartition(".")[2] for path in sites[0].paths])


def _parameter_lines(kind: KindPlan, program: Program, last: Sequence[str]) -> Iterable[str]:
    width = max((len(name) for name in program.targets), default=0)
    for index, (name, shape) in enumerate(program.targets.items()):
        lead = "  packs   " if index == 0 else "          "
        text = _spell_members(program.describe(name), last)
        yield f"{lead}{name:<{width}} {tuple(shape)!s:<14} = {text}"
    if kind.dropped:
        yield f"  drops   {', '.join(_spell_members(name, last) for name in kind.dropped)}"
    for name, why in kind.irreversible:
        yield f"  NO WAY BACK for {_spell_members(name, last)}: {why}"


def _spell_members(text: str, last: Sequence[str]) -> str:
    """Names of originals (`1.gate_proj.weight`) with the member's own name for its index; a lone member needs none."""
    names = [f"{name}." for name in last] if len(last) > 1 else [""]
    return re.sub(r"(?<![\w.])(\d+)\.(?=[A-Za-z_])", lambda match: names[int(match[1])], text)


def _kernel_names(uses: Sequence[KernelUse]) -> str:
    return " | ".join(dict.fromkeys(use.name for use in uses))


def _references(uses: Sequence[KernelUse]) -> str:
    return " | ".join(dict.fromkeys(use.reference or f"the class {use.name}" for use in uses))


def _modes(uses: Sequence[KernelUse]) -> str:
    """Which modes have a kernel, unless one kernel has them all."""
    if len(uses) == 4 and len({use.name for use in uses}) == 1:
        return ""
    spelt = {
        (use.training, use.compiling): f"{'training' if use.training else 'inference'}"
        f"{' under torch.compile' if use.compiling else ''} ({use.name})"
        for use in uses
    }
    return ", ".join(spelt[mode] for mode in sorted(spelt))


def _at(place: str) -> str:
    return f"{place}: " if place else ""


def _section(title: str, lines: Sequence[str]) -> Iterable[str]:
    if lines:
        yield ""
        yield f"{title}:"
        yield from (f"  {line}" for line in lines)


def _miss_lines(misses: Sequence[NearMiss]) -> list[str]:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for miss in misses:
        groups.setdefault((miss.class_name, miss.wanted, miss.reason), []).append(miss.path)
    return [
        f"{collapse_paths(paths)} ({class_name}) for {wanted}: {reason}"
        for (class_name, wanted, reason), paths in groups.items()
    ]
