"""What a planner is given and what it gives: a `Subject`, and a `Blueprint` that a graft carries out."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from operator import is_

import torch
from torch import nn

from kernelgraft.binding import ClassKey
from kernelgraft.choosing import Asked, Runs
from kernelgraft.config import KernelConfig
from kernelgraft.conversion.lazy import LazyTensor
from kernelgraft.conversion.rules import Rules
from kernelgraft.layouts import Made
from kernelgraft.origins import full_name
from kernelgraft.plan import KindPlan, Plan, SitePlan
from kernelgraft.recording import Arguments
from kernelgraft.soundness import Run


@dataclass
class Subject:
    """The model that a plan is for, and what is known about it.

    Attributes:
        model: The model; on the meta device if it is being loaded.
        live: Whether its parameters hold values.
        arguments: What the `__init__` of the module at a path got, if that is known.
        skeleton: The same model on the meta device, if there is one: there a forward costs nothing.
        device_of: The device on which a parameter is, or will be.
        dtype_of: The dtype in which a parameter will be loaded, `None` for the one that it has.
        run: One forward of the model it is given, for the soundness of fusions.
        tied: Parameters that will be tied after loading: target to source.
        prefix: The `base_model_prefix`, "" if there is none.
        on_claims: Told the paths of all modules that something is asked for, before it is found out whether it can be.
    """

    model: nn.Module
    live: bool
    arguments: Callable[[str], Arguments | None]
    skeleton: nn.Module | None = None
    device_of: Callable[[str], torch.device] | None = None
    dtype_of: Callable[[str], torch.dtype | None] = lambda _: None
    run: Run | None = None
    tied: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    on_claims: Callable[[Collection[str]], None] = lambda _: None

    def device(self, name: str, tensor: torch.Tensor) -> torch.device:
        """Where the parameter called `name` is, or will be: on the CPU if nothing else is said of a skeleton's."""
        if self.device_of is not None:
            return self.device_of(name)
        return torch.device("cpu") if tensor.is_meta else tensor.device


@dataclass
class PreparedSite:
    """What a graft needs to make one site: the plan's part, what runs, the layout, and the classes of its slots."""

    site: SitePlan
    kind: KindPlan
    asked: Asked
    runs: Runs
    keys: tuple[ClassKey, ...]
    made: Made | None
    rules: Rules | None
    _packed: dict[str, tuple[LazyTensor, list[torch.Tensor]]] = field(default_factory=dict, repr=False)

    def keeps(self, packed: str) -> bool:
        """Whether a parameter of the layout will be one of the originals, the same object."""
        assert self.made is not None
        program = self.kind.program
        assert program is not None
        is_parameter = isinstance(self.made.contents.parameters.get(packed), nn.Parameter)
        return packed in program.whole and packed not in program.casts and is_parameter

    def kept(self) -> list[str]:
        """The names in the model of the originals that stay what they are in the layout."""
        program = self.kind.program
        if self.made is None or program is None:
            return []
        return [full_name(name, self.site.paths) for packed, name in program.whole.items() if self.keeps(packed)]

    def pack_early(self, tensors: Mapping[str, torch.Tensor]) -> list[LazyTensor]:
        """What is packed of lazy tensors that will be in the model, given by name.

        `lazy` gives the same objects again, if it is these tensors that are in the model when the site is made.
        """
        program = self.kind.program
        assert program is not None
        named = {name: full_name(name, self.site.paths) for name in program.sources}
        originals = {name: tensors[full] for name, full in named.items() if full in tensors}
        for packed, names in program.feeds.items():
            if not self.keeps(packed) and all(name in originals for name in names):
                lazy = program.lazy(packed, originals)
                if lazy is not None:
                    self._packed[packed] = lazy, [originals[name] for name in names]
        return [lazy for lazy, _ in self._packed.values()]

    def lazy(self, packed: str, originals: Mapping[str, torch.Tensor]) -> LazyTensor | None:
        """One packed tensor as a lazy one of the originals, by their names in the program: see `Program.lazy`."""
        program = self.kind.program
        assert program is not None
        early = self._packed.get(packed)
        if early is not None and all(map(is_, early[1], [originals[name] for name in program.feeds[packed]])):
            return early[0]
        return program.lazy(packed, originals)


@dataclass
class PreparedFunction:
    """What a graft needs to rebind one module's forward to function kernels."""

    path: str
    asked: tuple[Asked, ...]
    runs: Runs
    key: ClassKey


@dataclass
class Blueprint:
    """A plan and what is needed to carry it out."""

    plan: Plan
    sites: list[PreparedSite]
    functions: list[PreparedFunction]
    config: KernelConfig
