"""Makes plans, and proves them complete on names and shapes alone, before a byte is read.

The outcome is a `Blueprint`: the `Plan`, which is data, and what a graft needs beside it (layouts on the meta device,
classes to bind), which is not. Nothing of the model has changed when it is there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from kernelgraft.binding import ClassKey, Modes, bound_class, conflicting_names
from kernelgraft.blueprint import Blueprint, PreparedFunction, PreparedSite, Subject
from kernelgraft.choosing import Asked, Runs, choose_modes, runs_of
from kernelgraft.config import Entry, KernelConfig, device_type
from kernelgraft.conversion.rules import Rules, read_rules
from kernelgraft.errors import KernelError, KernelGraftError, PlanError
from kernelgraft.functions import called_functions, check_function, find_functions
from kernelgraft.kernel import Kernel, load_kernel, require_layout
from kernelgraft.layouts import Made, make_layout
from kernelgraft.matching import (
    Claim,
    NearMiss,
    ancestors,
    check_overlaps,
    collapse_paths,
    find_fusions,
    find_modules,
    near_misses,
    no_module_message,
)
from kernelgraft.origins import argument_names, full_name, names_places, originals_of, shapes_of, trace_program
from kernelgraft.plan import FunctionPlan, KernelUse, KindPlan, Plan, Rejected, SitePlan
from kernelgraft.refusals import (
    check_hooks,
    check_members,
    check_one_device,
    check_recorded_outputs,
    check_shared,
    check_sources_agree,
)
from kernelgraft.signature import check_attributes, spell_call
from kernelgraft.soundness import FusionSite, calls_of, check_soundness


@dataclass(frozen=True)
class _Wanted:
    """A claim together with the entry that makes it; `inherited` entries may fail without an error."""

    claim: Claim
    entry: Entry
    inherited: bool


def make_blueprint(
    subject: Subject, config: KernelConfig, inherited: Sequence[Entry] = (), rejected: Sequence[Rejected] = ()
) -> Blueprint:
    """Plan a graft.

    Args:
        subject: The model.
        config: What the user asked for.
        inherited: Entries of a default table, for what the config does not name; what does not fit of them is left
            out and listed.
        rejected: What is known already not to be there, for the list.

    Raises:
        PlanError: Something that the config asks for cannot be done; nothing has changed.
        KernelError: A kernel cannot be loaded.
    """
    return _Planner(subject, config, inherited, rejected).blueprint()


class _Planner:
    def __init__(
        self, subject: Subject, config: KernelConfig, inherited: Sequence[Entry], rejected: Sequence[Rejected]
    ) -> None:
        self.subject = subject
        self.config = config
        named = {entry.target for entry in config.entries}
        self.entries = [(entry, False) for entry in config.entries]
        self.entries += [(entry, True) for entry in inherited if entry.target not in named]
        self.modules = dict(subject.model.named_modules())
        self.device = _device_of(subject)
        self.rejected = list(rejected)
        self.kernels: dict[int, Kernel | Exception] = {}
        self.kinds: dict[Any, tuple[int, KindPlan, Rules | None]] = {}
        self.users = _users(subject.model)

    def blueprint(self) -> Blueprint:
        wanted = self._wanted()
        prepared = [site for want in wanted if (site := self._prepare(want)) is not None]
        prepared = self._check_chains(prepared)
        self._ask_kernels(prepared)
        functions, function_plans = self._functions({path for site in prepared for path in site.site.paths})
        order = {path: index for index, path in enumerate(self.modules)}
        prepared.sort(key=lambda site: order[site.site.paths[0]])
        plan = Plan(
            model=type(self.subject.model).__name__,
            device=device_type(self.device),
            sites=tuple(site.site for site in prepared),
            kinds=tuple(kind for _, kind, _ in self.kinds.values()),
            functions=tuple(function_plans),
            rejected=_grouped(self.rejected),
            near_misses=tuple(self._near_misses(prepared)),
        )
        return Blueprint(plan, prepared, functions, self.config)

    # --- claims

    def _wanted(self) -> list[_Wanted]:
        """Fusions first; a single-module entry applies to what they leave."""
        wanted = []
        for entry, inherited in self.entries:
            if entry.is_fusion:
                pairs: Any = entry.target
                wanted += [
                    _Wanted(claim, entry, inherited) for claim in find_fusions(self.modules, pairs, self.subject.prefix)
                ]
        check_overlaps([want.claim for want in wanted])
        taken = {path for want in wanted for path in want.claim.paths}
        singles = [want for entry, inherited in self.entries for want in self._single(entry, inherited, taken)]
        singles = self._left_inside(wanted, singles)
        asked = [want for want in (*wanted, *singles) if not want.inherited]
        check_overlaps([want.claim for want in asked], {want.claim for want in asked if not self._takes_over(want)})
        return wanted + self._without_overlaps(wanted, singles)

    def _single(self, entry: Entry, inherited: bool, taken: set[str]) -> list[_Wanted]:
        if entry.is_fusion:
            return []
        name = str(entry.target)
        claims = find_modules(self.modules, name)
        if not claims and not inherited and not find_functions(self.modules, name):
            functions = {f for module in self.modules.values() for f in called_functions(type(module))}
            raise PlanError(no_module_message(self.modules, name, sorted(functions)))
        left = [claim for claim in claims if claim.paths[0] not in taken]
        if claims and not left:
            self.rejected.append(Rejected(entry.label, "", "fusions have taken all of its modules over"))
        return [_Wanted(claim, entry, inherited) for claim in left]

    def _left_inside(self, fusions: list[_Wanted], singles: list[_Wanted]) -> list[_Wanted]:
        """Leave out modules that lie inside one which another kernel takes over with all its parameters."""
        outer = {path: want for want in fusions for path in want.claim.paths}
        outer |= {want.claim.paths[0]: want for want in singles if not want.inherited and self._takes_over(want)}
        kept = []
        for want in singles:
            path = want.claim.paths[0]
            around = next((outer[each] for each in ancestors(path) if each in outer), None)
            if around is None:
                kept.append(want)
            elif not want.inherited:
                self._leave(want.entry, path, f"it lies inside what the kernel for {around.entry.label} takes over")
        return kept

    def _takes_over(self, want: _Wanted) -> bool:
        """Whether a kernel packs the parameters of the modules that it is for; a stateless one leaves them there."""
        if want.claim.is_fusion:
            return True
        modes = choose_modes(want.entry, self.device, self._load) or ()
        return any(kernel.layout is not None for _, _, kernel in modes)

    def _without_overlaps(self, fusions: list[_Wanted], singles: list[_Wanted]) -> list[_Wanted]:
        """Leave out what a default table offers inside, or around, what was asked for."""
        asked = {path for want in (*fusions, *singles) if not want.inherited for path in want.claim.paths}
        kept = []
        for want in singles:
            path = want.claim.paths[0]
            near = None
            if want.inherited:
                near = next((p for p in asked if p == path or _inside(p, path) or _inside(path, p)), None)
            if near is not None:
                self.rejected.append(Rejected(want.entry.label, path, f"another kernel was asked for at {near}"))
            else:
                asked.add(path)
                kept.append(want)
        return kept

    # --- kernels

    def _modes(self, entry: Entry, device: torch.device, place: str, inherited: bool) -> Modes | None:
        """The kernels of an entry by mode; `None` if the place is to be left as it is."""
        modes = choose_modes(entry, device, self._load)
        if modes:
            return modes
        if modes is None:
            self._leave(entry, place, "left alone, as the config says")
            return None
        reason = f"the config has no kernel for {device_type(device)!r}"
        if not inherited and self.config.fallback != "reference":
            raise PlanError(
                f"{entry.label}: {reason}. Add an entry for {device_type(device)!r} ('' leaves the module alone), or "
                f'pass KernelConfig(..., fallback="reference").'
            )
        self._leave(entry, place, reason)
        return None

    def _asked(self, entry: Entry, inherited: bool) -> Asked:
        return Asked(entry, inherited or self.config.fallback == "reference")

    def _leave(self, entry: Entry, place: str, reason: str) -> None:
        self.rejected.append(Rejected(entry.label, place, reason))

    def _load(self, use: Any) -> Kernel:
        """Load a kernel once, also if that fails: a server that cannot be reached is not asked again for each site."""
        if id(use) not in self.kernels:
            try:
                self.kernels[id(use)] = load_kernel(use, backend="cpu" if self.device.type == "cpu" else None)
            except Exception as error:
                self.kernels[id(use)] = error
        found = self.kernels[id(use)]
        if isinstance(found, Exception):
            raise found
        return found

    # --- sites

    def _prepare(self, want: _Wanted) -> PreparedSite | None:
        place = " + ".join(want.claim.paths)
        try:
            return self._site(want, place)
        except KernelGraftError as error:
            if not want.inherited:
                raise
            self._leave(want.entry, place, str(error))
        except Exception as error:
            # A default table leads to code and to servers that the user did not name: what it cannot give is listed.
            if not want.inherited:
                raise
            self._leave(want.entry, place, f"{type(error).__name__}: {error}")
        return None

    def _site(self, want: _Wanted, place: str) -> PreparedSite | None:
        claim, entry = want.claim, want.entry
        members = [self.modules[path] for path in claim.paths]
        self._check_not_shared(claim.paths)
        check_members(claim.paths, members, live=self.subject.live)
        devices = {
            f"{path}.{name}": self.subject.device(f"{path}.{name}", tensor)
            for path, member in zip(claim.paths, members, strict=True)
            for name, tensor in member.named_parameters(remove_duplicate=False)
        }
        check_one_device(claim.paths[0], devices)
        device = next(iter(devices.values()), self.device)
        modes = self._modes(entry, device, place, want.inherited)
        if modes is None:
            return None
        asked = self._asked(entry, want.inherited)
        runs = runs_of([asked], [modes], device)
        layout = _one_layout(entry, modes, fused=claim.is_fusion)
        if layout is None:
            return self._rebound(want, members[0], asked, runs)
        check_hooks(claim.paths, members)
        host = _host_index(layout, claim.paths)
        arguments = None if claim.is_fusion else self.subject.arguments(claim.paths[0])
        made = make_layout(layout, members, arguments)
        kind_index, kind, rules = self._kind(entry, modes, made, claim.paths, members, host)
        self._check_tensors(claim.paths, members, kind)
        keys = tuple(
            ClassKey("host", type(member), layout, modes, (), conflicting_names(made.layout, type(member)))
            if index == host
            else ClassKey("absorbed", type(member), None, (), ())
            for index, member in enumerate(members)
        )
        for key in keys:
            bound_class(key)
        check_attributes([kernel for _, _, kernel in modes], made.layout, members[host], claim.paths[host])
        self._check_recorded(claim.paths, members, host)
        site = SitePlan(claim.paths[host], claim.paths, kind_index)
        return PreparedSite(site, kind, asked, runs, keys, made, rules)

    def _rebound(self, want: _Wanted, member: nn.Module, asked: Asked, runs: Runs) -> PreparedSite:
        """A stateless kernel: it runs on the original's own parameters."""
        path, (modes,) = want.claim.paths[0], runs.kernels
        key = ClassKey("rebound", type(member), None, modes)
        bound_class(key)
        check_attributes([kernel for _, _, kernel in modes], member, member, path)
        identity = (want.entry.target, modes, type(member))
        if identity not in self.kinds:
            plan = KindPlan(want.entry.label, (type(member).__name__,), "", _uses(modes), None)
            self.kinds[identity] = (len(self.kinds), plan, None)
        index, kind, _ = self.kinds[identity]
        return PreparedSite(SitePlan(path, (path,), index), kind, asked, runs, (key,), None, None)

    def _check_not_shared(self, paths: Sequence[str]) -> None:
        for path in paths:
            names = self.users[id(self.modules[path])]
            if len(names) > 1:
                raise PlanError(
                    f"{path!r} is one module that stands at several paths ({', '.join(names)}), so it cannot be "
                    f"replaced at one of them. Leave it out of the config."
                )

    def _kind(
        self, entry: Entry, modes: Modes, made: Made, paths: Sequence[str], members: Sequence[nn.Module], host: int
    ) -> tuple[int, KindPlan, Rules | None]:
        """The kind of a site; its rules are run once, for the first site of the kind."""
        layout = type(made.layout)
        rules = read_rules(layout, argument_names(layout, len(members)) if len(members) > 1 else ())
        identity = (
            entry.target,
            modes,
            tuple(type(member) for member in members),
            tuple((index, *item) for index, member in enumerate(members) for item in shapes_of(member)),
            shapes_of(made.layout),
            paths[host] if names_places(layout) else None,
        )
        if identity not in self.kinds:
            program, dropped = trace_program(rules, made, paths, members, host, self.subject.model, self.subject.prefix)
            made.values()  # what cannot be computed is refused here, and not when the graft is made
            irreversible = tuple((name, program.why(name)) for name in program.irreversible)
            plan = KindPlan(
                target=entry.label,
                classes=tuple(type(member).__name__ for member in members),
                layout=layout.__name__,
                kernels=_uses(modes),
                program=program,
                dropped=dropped,
                irreversible=irreversible,
            )
            self.kinds[identity] = (len(self.kinds), plan, rules)
        return self.kinds[identity]

    def _check_tensors(self, paths: Sequence[str], members: Sequence[nn.Module], kind: KindPlan) -> None:
        assert kind.program is not None
        originals = originals_of(members)
        by_target: dict[str, dict[str, torch.Tensor]] = {}
        for piece in kind.program.pieces:
            sources = by_target.setdefault(piece.target.name, {})
            sources[full_name(piece.source.name, paths)] = originals[piece.source.name]
        for target, sources in by_target.items():
            where = {name: self.subject.device(name, tensor) for name, tensor in sources.items()}
            dtypes = {name: self.subject.dtype_of(name) or tensor.dtype for name, tensor in sources.items()}
            check_sources_agree(paths[0], target, sources, dtypes, where)
        taken = {full_name(name, paths): originals[name] for name in kind.program.sources}
        moved = [full_name(name, paths) for name in kind.program.sources if kind.program.part(name).kind != "whole"]
        check_shared(paths[0], taken, moved, self.users, self.subject.tied)

    def _check_recorded(self, paths: Sequence[str], members: Sequence[nn.Module], host: int) -> None:
        absorbed = {
            inner_path: module
            for index, (path, member) in enumerate(zip(paths, members, strict=True))
            for inner_path, module in member.named_modules(prefix=path)
            if index != host or module is not member
        }
        check_recorded_outputs(self.subject.model, absorbed, paths[host])

    # --- what is proved over the whole model

    def _check_chains(self, prepared: list[PreparedSite]) -> list[PreparedSite]:
        fused = {
            FusionSite(site.site.paths[0].rpartition(".")[0], site.site.paths, site.site.host): site
            for site in prepared
            if len(site.site.paths) > 1
        }
        if not fused:
            return prepared
        model = self.subject.skeleton if self.subject.skeleton is not None else self.subject.model
        live = self.subject.live and self.subject.skeleton is None
        verdicts = check_soundness(model, list(fused), self.subject.run, live=live)
        for fusion, verdict in verdicts.items():
            if verdict.sound is False:
                raise PlanError(
                    f"The fusion {' + '.join(fusion.members)} is not sound: {verdict.reason}. The fused kernel gives "
                    f"only its own output, so what else uses a member's would get something else. Leave this fusion "
                    f"out of the config."
                )
        for identity, (index, kind, rules) in list(self.kinds.items()):
            reasons = [verdicts[f].reason for f, site in fused.items() if site.site.kind == index]
            if reasons:
                self.kinds[identity] = (index, replace(kind, checked=_agreed(reasons)), rules)
        for site in fused.values():
            site.kind = next(kind for index, kind, _ in self.kinds.values() if index == site.site.kind)
        return prepared

    def _ask_kernels(self, prepared: Sequence[PreparedSite]) -> None:
        """Ask kernels that declare `supports` about the call that one forward makes to the first site of a kind."""
        model, run = self.subject.skeleton or self.subject.model, self.subject.run
        asked = {
            each.site.kind: each
            for each in reversed(prepared)
            if any(kernel.supports for kernel in _kernels(each.keys))
        }
        if not asked or run is None:
            return  # each call is asked about when it comes
        calls = calls_of(model, [path for each in asked.values() for path in each.site.paths], run)
        for each in asked.values():
            site = each.site
            if site.host not in calls or site.paths[0] not in calls:
                continue
            args, kwargs = calls[site.host]
            # What flows into the host through absorbed modules reaches the kernel as it was before them.
            args = (*calls[site.paths[0]][0][:1], *args[1:]) if args else args
            for kernel in _kernels(each.keys):
                answer = kernel.supports(*args, **kwargs) if kernel.supports else True
                if answer is not True:
                    said = (
                        f"{kernel.name} refuses a call like {spell_call(args, kwargs)}: {answer or 'no reason given'}"
                    )
                    self._refused_by_kernel(each, said)

    def _refused_by_kernel(self, each: PreparedSite, said: str) -> None:
        if not each.asked.optional:
            raise PlanError(
                f"At {each.site.host!r}: {said}. Leave this site out of the config, or pass "
                f'KernelConfig(..., fallback="reference") to let the original run where the kernel refuses.'
            )
        self._leave(each.asked.entry, each.site.host, f"{said}; the original runs then")

    def _functions(self, taken: set[str]) -> tuple[list[PreparedFunction], list[FunctionPlan]]:
        plans: list[FunctionPlan] = []
        by_path: dict[str, list[tuple[str, Modes, Asked]]] = {}
        for entry, inherited in self.entries:
            if entry.is_fusion:
                continue
            found = find_functions(self.modules, str(entry.target))
            free = {path: name for path, name in found.items() if path not in taken and not _within(path, taken)}
            if found and not free:
                self._leave(entry, "", "every module that calls the function runs a kernel of its own")
            for name in dict.fromkeys(free.values()):
                paths = tuple(path for path in free if free[path] == name)
                modes = self._function_modes(entry, inherited, name, paths)
                if modes:
                    plans.append(FunctionPlan(entry.label, name, paths, _uses(modes)))
                    for path in paths:
                        by_path.setdefault(path, []).append((name, modes, self._asked(entry, inherited)))
        prepared = [self._function(path, functions) for path, functions in by_path.items()]
        for function in prepared:
            check_members([function.path], [self.modules[function.path]], live=False)
            bound_class(function.key)
        return prepared, plans

    def _function(self, path: str, functions: Sequence[tuple[str, Modes, Asked]]) -> PreparedFunction:
        asked = tuple(each for _, _, each in functions)
        runs = runs_of(asked, [modes for _, modes, _ in functions], self.device)
        by_name = tuple((name, modes) for name, modes, _ in functions)
        return PreparedFunction(path, asked, runs, ClassKey("function", type(self.modules[path]), None, (), by_name))

    def _function_modes(self, entry: Entry, inherited: bool, name: str, paths: Sequence[str]) -> Modes | None:
        try:
            modes = self._modes(entry, self.device, name, inherited)
            for _, _, kernel in modes or ():
                check_function(kernel, called_functions(type(self.modules[paths[0]]))[name], name)
        except Exception as error:
            if not inherited:
                raise
            self._leave(entry, name, f"{type(error).__name__}: {error}")
            return None
        return modes

    def _near_misses(self, prepared: Sequence[PreparedSite]) -> list[NearMiss]:
        taken = {path for site in prepared for path in site.site.paths}
        found: dict[tuple[str, str], NearMiss] = {}
        for entry, inherited in self.entries:
            names = [entry.target] if isinstance(entry.target, str) else [name for name, _ in entry.target]
            for name in () if inherited else names:
                for miss in near_misses(self.modules, name, taken):
                    if not _within(miss.path, taken):
                        found.setdefault((miss.path, miss.wanted), miss)
        return list(found.values())


# --- small parts


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


def _kernels(keys: Sequence[ClassKey]) -> list[Kernel]:
    return list(dict.fromkeys(kernel for key in keys for _, _, kernel in key.modes))


def _uses(modes: Modes) -> tuple[KernelUse, ...]:
    return tuple(
        KernelUse(kernel.name, kernel.reference, kernel.digest or "", training, compiling)
        for training, compiling, kernel in modes
    )


def _grouped(rejected: Sequence[Rejected]) -> tuple[Rejected, ...]:
    """One line for all places of an entry that were left for one reason: the first one's, if it names the place."""
    groups: dict[tuple[str, str], list[Rejected]] = {}
    for each in rejected:
        reason = each.reason.replace(each.place, "") if each.place else each.reason
        groups.setdefault((each.target, reason), []).append(each)
    return tuple(
        Rejected(
            group[0].target,
            collapse_paths([each.place for each in group]) if all(each.place for each in group) else "",
            group[0].reason,
        )
        for group in groups.values()
    )


def _agreed(reasons: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(reason or "proved by a forward on the meta device" for reason in reasons))


def _device_of(subject: Subject) -> torch.device:
    for name, parameter in subject.model.named_parameters():
        return subject.device(name, parameter)
    return torch.device("cpu")


def _users(model: nn.Module) -> dict[int, list[str]]:
    """All names of each module and each parameter, by identity."""
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        users.setdefault(id(module), []).append(path)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    return users


def _inside(path: str, outer: str) -> bool:
    return path.startswith(outer + ".")


def _within(path: str, taken: set[str]) -> bool:
    return any(_inside(path, outer) for outer in taken)
