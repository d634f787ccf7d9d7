"""Plans single sites, and proves each complete on names and shapes alone.

A model has many sites of few kinds. Every check looks at every site; what sites of a kind share is worked out once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from kernelgraft.binding import ClassKey, Modes, bound_class, conflicting_names
from kernelgraft.blueprint import PreparedSite, Subject
from kernelgraft.choosing import Chooser, Chosen
from kernelgraft.claims import Wanted
from kernelgraft.config import Entry
from kernelgraft.contents import Contents, joined
from kernelgraft.conversion.program import Program
from kernelgraft.conversion.rules import Rules, read_rules
from kernelgraft.errors import KernelError, KernelGraftError, PlanError
from kernelgraft.kernel import Kernel, require_layout
from kernelgraft.layouts import Made, make_layout
from kernelgraft.origins import argument_names, full_name, names_places, originals_of, trace_program
from kernelgraft.plan import KernelUse, KindPlan, SitePlan
from kernelgraft.recording import Signatures
from kernelgraft.refusals import (
    Recorder,
    check_hooks,
    check_members,
    check_one_device,
    check_recorded_outputs,
    check_shared,
    check_sources_agree,
    recorders_of,
    tie_groups,
)
from kernelgraft.signature import check_attributes, read_attributes


@dataclass
class Kind:
    """Sites with the same kernels, classes and shapes: the index in the plan, what it says, and the layout's rules."""

    index: int
    plan: KindPlan
    rules: Rules | None


class SitePlanner:
    """Plans the sites of one model.

    Attributes:
        kinds: The kinds of the sites so far, by all that makes them differ.
    """

    def __init__(self, subject: Subject, contents: Contents, device: torch.device, chooser: Chooser) -> None:
        self.kinds: dict[Any, Kind] = {}
        self._subject, self._device, self._chooser = subject, device, chooser
        self._modules = dict(contents.modules)
        self._users = _users(contents)
        self._ties = tie_groups(subject.tied)
        self._signatures = Signatures()
        self._rules: dict[tuple[type[nn.Module], int], tuple[Rules, bool]] = {}
        self._keys: dict[Any, tuple[ClassKey, ...]] = {}
        self._reads: dict[Kernel, list[str]] = {}

    def prepare(self, want: Wanted) -> PreparedSite | None:
        """Plan one site; `None` if its place is left as it is, which is noted.

        Raises:
            KernelGraftError: The user asked for it, and it cannot be made.
        """
        place = " + ".join(want.claim.paths)
        try:
            return self._site(want, place)
        except KernelGraftError as error:
            if not want.inherited:
                raise
            self._chooser.leave(want.entry, place, str(error))
        except Exception as error:
            # A default table leads to code and to servers that the user did not name: what it cannot give is listed.
            if not want.inherited:
                raise
            self._chooser.leave(want.entry, place, f"{type(error).__name__}: {error}")
        return None

    def _site(self, want: Wanted, place: str) -> PreparedSite | None:
        paths, entry = want.claim.paths, want.entry
        members = [Contents(self._modules[path]) for path in paths]
        self._check_not_shared(paths)
        check_members(paths, members, live=self._subject.live)
        devices = self._devices_of(paths, members)
        check_one_device(paths[0], devices)
        device = next(iter(devices.values()), self._device)
        chosen = self._chooser.chosen(entry, device, place, inherited=want.inherited)
        if chosen is None:
            return None
        layout = _one_layout(entry, chosen.modes, fused=want.claim.is_fusion)
        if layout is None:
            return self._rebound(want, members[0].module, chosen)
        check_hooks(paths, members)
        host = _host_index(layout, paths)
        arguments = None if want.claim.is_fusion else self._subject.arguments(paths[0])
        made = make_layout(layout, members, arguments, self._signatures)
        kind = self._kind(entry, chosen, made, paths, members, host)
        assert kind.plan.program is not None
        self._check_tensors(paths, members, kind.plan.program, devices)
        keys = self._class_keys(layout, chosen, made.layout, members, host)
        self._check_attributes(chosen, made.layout, members[host].module, paths[host])
        self._check_recorded(paths, members, host)
        site = SitePlan(paths[host], paths, kind.index)
        return PreparedSite(site, kind.plan, chosen.asked, chosen.runs, keys, made, kind.rules)

    def _rebound(self, want: Wanted, member: nn.Module, chosen: Chosen) -> PreparedSite:
        """A stateless kernel: it runs on the original's own parameters."""
        path, original = want.claim.paths[0], type(member)
        if (original, chosen.number) not in self._keys:
            key = ClassKey("rebound", original, None, chosen.modes)
            bound_class(key)
            self._keys[original, chosen.number] = (key,)
        self._check_attributes(chosen, member, member, path)
        identity = (want.entry.target, chosen.number, original)
        if identity not in self.kinds:
            plan = KindPlan(want.entry.label, (original.__name__,), "", uses_of(chosen.modes), None)
            self.kinds[identity] = Kind(len(self.kinds), plan, None)
        kind, keys = self.kinds[identity], self._keys[original, chosen.number]
        return PreparedSite(SitePlan(path, (path,), kind.index), kind.plan, chosen.asked, chosen.runs, keys, None, None)

    def _check_not_shared(self, paths: Sequence[str]) -> None:
        for path in paths:
            names = self._users[id(self._modules[path])]
            if len(names) > 1:
                raise PlanError(
                    f"{path!r} is one module that stands at several paths ({', '.join(names)}), so it cannot be "
                    f"replaced at one of them. Leave it out of the config."
                )

    def _devices_of(self, paths: Sequence[str], members: Sequence[Contents]) -> dict[str, torch.device]:
        """Where each parameter is, or will be, by its names in the model."""
        return {
            (full := f"{path}.{name}"): self._subject.device(full, tensor)
            for path, member in zip(paths, members, strict=True)
            for name, tensor in member.all_parameters.items()
        }

    def _kind(
        self, entry: Entry, chosen: Chosen, made: Made, paths: Sequence[str], members: Sequence[Contents], host: int
    ) -> Kind:
        """The kind of a site; its rules are run once, for the first site of the kind."""
        layout = type(made.layout)
        rules, differs_by_place = self._rules_of(layout, len(members))
        identity = (
            entry.target,
            chosen.number,
            tuple([type(member.module) for member in members]),
            tuple([member.shapes for member in members]),
            made.contents.shapes,
            paths[host] if differs_by_place else None,
        )
        if identity not in self.kinds:
            model, prefix = self._subject.model, self._subject.prefix
            program, dropped = trace_program(rules, made, paths, members, host, model, prefix)
            made.values()  # what cannot be computed is refused here, and not when the graft is made
            plan = KindPlan(
                target=entry.label,
                classes=tuple(type(member.module).__name__ for member in members),
                layout=layout.__name__,
                kernels=uses_of(chosen.modes),
                program=program,
                dropped=dropped,
                irreversible=tuple((name, program.why(name)) for name in program.irreversible),
            )
            self.kinds[identity] = Kind(len(self.kinds), plan, rules)
        return self.kinds[identity]

    def _rules_of(self, layout: type[nn.Module], count: int) -> tuple[Rules, bool]:
        """A layout's rules, and whether they say different things at different places."""
        if (layout, count) not in self._rules:
            rules = read_rules(layout, argument_names(layout, count) if count > 1 else ())
            self._rules[layout, count] = rules, names_places(layout)
        return self._rules[layout, count]

    def _check_tensors(
        self,
        paths: Sequence[str],
        members: Sequence[Contents],
        program: Program,
        devices: Mapping[str, torch.device],
    ) -> None:
        originals = originals_of(members)
        full = {name: full_name(name, paths) for name in originals}
        for target, names in program.feeds.items():
            if len(names) > 1:
                sources = {full[name]: originals[name] for name in names}
                dtypes = {name: self._subject.dtype_of(name) or tensor.dtype for name, tensor in sources.items()}
                where = {name: devices.get(name) or self._subject.device(name, each) for name, each in sources.items()}
                check_sources_agree(paths[0], target, sources, dtypes, where)
        moved = {full[name]: originals[name] for name in program.moved}
        check_shared(paths[0], moved, self._users, self._ties)

    def _class_keys(
        self, declared: type[nn.Module], chosen: Chosen, layout: nn.Module, members: Sequence[Contents], host: int
    ) -> tuple[ClassKey, ...]:
        """The classes of a site's slots, made for the first site that has them."""
        originals = tuple([type(member.module) for member in members])
        # All of the layout that decides which names its class must answer.
        names = tuple(layout._parameters), tuple(layout._buffers), tuple(layout._modules), tuple(vars(layout))
        identity = (declared, chosen.number, originals, host, names)
        if identity not in self._keys:
            answers = conflicting_names(layout, originals[host])
            keys = tuple(
                ClassKey("host", original, declared, chosen.modes, (), answers)
                if index == host
                else ClassKey("absorbed", original, None)
                for index, original in enumerate(originals)
            )
            for key in keys:
                bound_class(key)
            self._keys[identity] = keys
        return self._keys[identity]

    def _check_attributes(self, chosen: Chosen, layout: nn.Module, original: nn.Module, path: str) -> None:
        for kernel in chosen.kernels:
            if kernel not in self._reads:
                assert kernel.forward_class is not None
                self._reads[kernel] = read_attributes(kernel.forward_class)
            holders = (layout, original, kernel.forward_class)
            if not all(any(hasattr(holder, name) for holder in holders) for name in self._reads[kernel]):
                check_attributes([kernel], layout, original, path)

    def _check_recorded(self, paths: Sequence[str], members: Sequence[Contents], host: int) -> None:
        if self._recorders:
            absorbed = {
                joined(path, name): module
                for index, (path, member) in enumerate(zip(paths, members, strict=True))
                for name, module in member.modules
                if index != host or module is not member.module
            }
            check_recorded_outputs(self._recorders, absorbed, paths[host])

    @cached_property
    def _recorders(self) -> list[Recorder]:
        return recorders_of(self._modules.values())


def _one_layout(entry: Entry, modes: Modes, *, fused: bool) -> type[nn.Module] | None:
    layouts = dict.fromkeys(require_layout(kernel) if fused else kernel.layout for _, _, kernel in modes)
    if any(kernel.forward_class is None for _, _, kernel in modes):
        raise KernelError(f"{entry.label} names modules, and its kernel is a function. Give a kernel class.")
    if len(layouts) > 1:
        names = ", ".join(layout.__name__ if layout else "no layout" for layout in layouts)
        raise PlanError(
            f"{entry.label}: the kernels for different modes have different layouts ({names}), and a parameter can be "
            f"packed in one way only. Give them the same layout class."
        )
    return next(iter(layouts))


def _host_index(layout: type[nn.Module], paths: Sequence[str]) -> int:
    host = getattr(layout, "host", None)
    if host is None or not isinstance(host, str) or len(paths) == 1:
        return 0
    last = [path.rpartition(".")[2] for path in paths]
    if host not in last:
        raise PlanError(f"{layout.__name__}.host is {host!r}, and the fusion's modules are {', '.join(last)}.")
    return last.index(host)


def uses_of(modes: Modes) -> tuple[KernelUse, ...]:
    """The kernels by mode as a plan lists them."""
    return tuple(
        KernelUse(kernel.name, kernel.reference, kernel.digest or "", training, compiling)
        for training, compiling, kernel in modes
    )


def _users(contents: Contents) -> dict[int, list[str]]:
    """All names of each module and each parameter, by identity."""
    users: dict[int, list[str]] = {}
    for name, each in (*contents.all_modules, *contents.all_parameters.items()):
        users.setdefault(id(each), []).append(name)
    return users
