"""Makes plans, and proves them complete on names and shapes alone, before a byte that a kernel takes is read.

The outcome is a `Blueprint`: the `Plan`, which is data, and what a graft needs beside it (layouts on the meta device,
classes to bind), which is not. Nothing of the model has changed when it is there.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from kernelgraft.binding import ClassKey, Modes, bound_class
from kernelgraft.blueprint import Blueprint, PreparedFunction, PreparedSite, Subject
from kernelgraft.choosing import Chooser, Chosen, runs_of
from kernelgraft.claims import Claims
from kernelgraft.config import Entry, KernelConfig, device_type
from kernelgraft.contents import Contents
from kernelgraft.errors import PlanError
from kernelgraft.functions import called_functions, check_function, find_functions
from kernelgraft.kernel import Kernel
from kernelgraft.matching import NearMiss, collapse_paths, near_misses
from kernelgraft.pausing import collector_paused
from kernelgraft.plan import FunctionPlan, Plan, Rejected
from kernelgraft.refusals import check_members
from kernelgraft.signature import spell_call
from kernelgraft.sites import SitePlanner, uses_of
from kernelgraft.soundness import FusionSite, calls_of, check_soundness
from kernelgraft.tree import ancestors


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
    # Torch wraps a random state for Python while it holds the generator's lock. A collection that starts there and runs
    # Python code gives the interpreter up; another thread that asks for the state keeps it, and both wait forever.
    with collector_paused():
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
        contents = Contents(subject.model)
        self.modules = dict(contents.modules)
        self.device = _device_of(subject)
        self.rejected = list(rejected)
        backend = "cpu" if self.device.type == "cpu" else None
        self.chooser = Chooser(config.fallback, backend, self.rejected)
        self.sites = SitePlanner(subject, contents, self.device, self.chooser)

    def blueprint(self) -> Blueprint:
        claims = Claims(self.modules, self.subject.prefix, self.entries, self.chooser, self.device)
        wanted = claims.collect()
        self.subject.on_claims({path for want in wanted for path in want.claim.paths})
        prepared = [site for want in wanted if (site := self.sites.prepare(want)) is not None]
        self._check_chains(prepared)
        self._ask_kernels(prepared)
        functions, function_plans = self._functions({path for site in prepared for path in site.site.paths})
        order = {path: index for index, path in enumerate(self.modules)}
        prepared.sort(key=lambda site: order[site.site.paths[0]])
        plan = Plan(
            model=type(self.subject.model).__name__,
            device=device_type(self.device),
            sites=tuple(site.site for site in prepared),
            kinds=tuple(kind.plan for kind in self.sites.kinds.values()),
            functions=tuple(function_plans),
            rejected=_grouped(self.rejected),
            near_misses=tuple(self._near_misses(prepared)),
        )
        return Blueprint(plan, prepared, functions, self.config)

    # --- what is proved over the whole model

    def _check_chains(self, prepared: Sequence[PreparedSite]) -> None:
        fused = {
            FusionSite(site.site.paths[0].rpartition(".")[0], site.site.paths, site.site.host): site
            for site in prepared
            if len(site.site.paths) > 1
        }
        if not fused:
            return
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
        for kind in self.sites.kinds.values():
            reasons = [verdicts[fusion].reason for fusion, site in fused.items() if site.site.kind == kind.index]
            if reasons:
                kind.plan = replace(kind.plan, checked=_agreed(reasons))
        plans = {kind.index: kind.plan for kind in self.sites.kinds.values()}
        for site in fused.values():
            site.kind = plans[site.site.kind]

    def _ask_kernels(self, prepared: Sequence[PreparedSite]) -> None:
        """Ask kernels that declare `supports` about the call that one forward makes to the first site of a kind."""
        model, run = self.subject.skeleton or self.subject.model, self.subject.run
        first = {each.site.kind: each for each in reversed(prepared)}
        asked = [each for each in first.values() if any(kernel.supports for kernel in _kernels(each.keys))]
        if not asked or run is None:
            return  # each call is asked about when it comes
        calls = calls_of(model, [path for each in asked for path in each.site.paths], run)
        for each in asked:
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
        self.chooser.leave(each.asked.entry, each.site.host, f"{said}; the original runs then")

    def _functions(self, taken: set[str]) -> tuple[list[PreparedFunction], list[FunctionPlan]]:
        plans: list[FunctionPlan] = []
        by_path: dict[str, list[tuple[str, Chosen]]] = {}
        for entry, inherited in self.entries:
            if entry.has_paths:
                continue
            found = find_functions(self.modules, str(entry.target))
            free = {path: name for path, name in found.items() if path not in taken and not _within(path, taken)}
            if found and not free:
                self.chooser.leave(entry, "", "every module that calls the function runs a kernel of its own")
            for name in dict.fromkeys(free.values()):
                paths = tuple(path for path in free if free[path] == name)
                chosen = self._chosen_function(entry, inherited, name, paths)
                if chosen is not None:
                    plans.append(FunctionPlan(entry.label, name, paths, uses_of(chosen.modes)))
                    for path in paths:
                        by_path.setdefault(path, []).append((name, chosen))
        prepared = [self._function(path, functions) for path, functions in by_path.items()]
        for function in prepared:
            check_members([function.path], [Contents(self.modules[function.path])], live=False)
            bound_class(function.key)
        return prepared, plans

    def _function(self, path: str, functions: Sequence[tuple[str, Chosen]]) -> PreparedFunction:
        asked = tuple(chosen.asked for _, chosen in functions)
        by_name: tuple[tuple[str, Modes], ...] = tuple((name, chosen.modes) for name, chosen in functions)
        runs = runs_of(asked, [modes for _, modes in by_name], self.device)
        return PreparedFunction(path, asked, runs, ClassKey("function", type(self.modules[path]), None, (), by_name))

    def _chosen_function(self, entry: Entry, inherited: bool, name: str, paths: Sequence[str]) -> Chosen | None:
        try:
            chosen = self.chooser.chosen(entry, self.device, name, inherited=inherited)
            for kernel in chosen.kernels if chosen else ():
                check_function(kernel, called_functions(type(self.modules[paths[0]]))[name], name)
        except Exception as error:
            if not inherited:
                raise
            self.chooser.leave(entry, name, f"{type(error).__name__}: {error}")
            return None
        return chosen

    def _near_misses(self, prepared: Sequence[PreparedSite]) -> list[NearMiss]:
        taken = {path for site in prepared for path in site.site.paths}
        found: dict[tuple[str, str], NearMiss] = {}
        for entry, inherited in self.entries:
            names = [entry.target] if isinstance(entry.target, str) else [name for name, _ in entry.target]
            # Who names one module by its path does not mean the others of its class.
            for name in () if inherited or (entry.has_paths and not entry.is_fusion) else names:
                for miss in near_misses(self.modules, name, taken):
                    if not _within(miss.path, taken):
                        found.setdefault((miss.path, miss.wanted), miss)
        return list(found.values())


# --- small parts


def _kernels(keys: Sequence[ClassKey]) -> list[Kernel]:
    return list(dict.fromkeys(kernel for key in keys for _, _, kernel in key.modes))


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


def _within(path: str, taken: set[str]) -> bool:
    return any(outer in taken for outer in ancestors(path))
