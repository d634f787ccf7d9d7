"""Which modules the entries of a config and of a default table ask for, and which of two that want the same gets it.

Claims are collected on the untouched model and checked against each other; whether they can be met `planner.py` proves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kernelgraft.choosing import Chooser
from kernelgraft.config import Entry
from kernelgraft.errors import PlanError
from kernelgraft.functions import called_functions, find_functions
from kernelgraft.matching import Claim, check_overlaps, find_modules, find_placed, no_module_message
from kernelgraft.tree import ancestors


@dataclass(frozen=True)
class Wanted:
    """A claim together with the entry that makes it; `inherited` entries may fail without an error."""

    claim: Claim
    entry: Entry
    inherited: bool


@dataclass
class Claims:
    """The claims on one model.

    Attributes:
        modules: The model's modules by path.
        prefix: Its `base_model_prefix`, "" if there is none.
        entries: The entries, and whether each is inherited from a default table.
        chooser: Which kernels they run; what is left out is noted there.
        device: The model's device.
    """

    modules: Mapping[str, nn.Module]
    prefix: str
    entries: Sequence[tuple[Entry, bool]]
    chooser: Chooser
    device: torch.device

    def collect(self) -> list[Wanted]:
        """Modules that are named by their paths first; an entry with a class name alone applies to what they leave.

        Raises:
            PlanError: An entry names nothing, or two that the user wrote want the same module.
        """
        wanted = []
        for entry, inherited in self.entries:
            if entry.has_paths:
                pairs: Any = entry.target
                wanted += [Wanted(claim, entry, inherited) for claim in find_placed(self.modules, pairs, self.prefix)]
        check_overlaps([want.claim for want in wanted], {want.claim for want in wanted if not self._takes_over(want)})
        taken = {path for want in wanted for path in want.claim.paths}
        singles = [want for entry, inherited in self.entries for want in self._single(entry, inherited, taken)]
        singles = self._left_inside(wanted, singles)
        asked = [want for want in (*wanted, *singles) if not want.inherited]
        check_overlaps([want.claim for want in asked], {want.claim for want in asked if not self._takes_over(want)})
        return wanted + self._without_overlaps(wanted, singles)

    def _single(self, entry: Entry, inherited: bool, taken: set[str]) -> list[Wanted]:
        if entry.has_paths:
            return []
        name = str(entry.target)
        claims = find_modules(self.modules, name)
        if not claims and not inherited and not find_functions(self.modules, name):
            functions = {f for module in self.modules.values() for f in called_functions(type(module))}
            raise PlanError(no_module_message(self.modules, name, sorted(functions)))
        left = [claim for claim in claims if claim.paths[0] not in taken]
        if claims and not left:
            self.chooser.leave(entry, "", "entries with paths have taken all of its modules over")
        return [Wanted(claim, entry, inherited) for claim in left]

    def _left_inside(self, placed: list[Wanted], singles: list[Wanted]) -> list[Wanted]:
        """Leave out modules that lie inside one which another kernel takes over with all its parameters."""
        outer = {path: want for want in placed if self._takes_over(want) for path in want.claim.paths}
        outer |= {want.claim.paths[0]: want for want in singles if not want.inherited and self._takes_over(want)}
        kept = []
        for want in singles:
            path = want.claim.paths[0]
            around = next((outer[each] for each in ancestors(path) if each in outer), None)
            if around is None:
                kept.append(want)
            elif not want.inherited:
                reason = f"it lies inside what the kernel for {around.entry.label} takes over"
                self.chooser.leave(want.entry, path, reason)
        return kept

    def _takes_over(self, want: Wanted) -> bool:
        """Whether a kernel packs the parameters of the modules that it is for; a stateless one leaves them there."""
        if want.claim.is_fusion:
            return True
        modes = self.chooser.modes(want.entry, self.device) or ()
        return any(kernel.layout is not None for _, _, kernel in modes)

    def _without_overlaps(self, placed: list[Wanted], singles: list[Wanted]) -> list[Wanted]:
        """Leave out what a default table offers inside, or around, what was asked for."""
        if not any(want.inherited for want in singles):
            return singles
        asked: set[str] = set()
        around: dict[str, str] = {}  # a module around one that was asked for, and that one

        def ask(path: str) -> None:
            asked.add(path)
            for each in ancestors(path):
                around.setdefault(each, path)

        for want in (*placed, *singles):
            if not want.inherited:
                for path in want.claim.paths:
                    ask(path)
        kept = []
        for want in singles:
            path = want.claim.paths[0]
            near = None
            if want.inherited:
                near = next((each for each in (path, *ancestors(path)) if each in asked), around.get(path))
            if near is not None:
                self.chooser.leave(want.entry, path, f"another kernel was asked for at {near}")
            else:
                ask(path)
                kept.append(want)
        return kept
