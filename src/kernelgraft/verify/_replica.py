"""A site outside of its model: the same code and kernels, with tensors, counters and switches of its own.

So a check can cast weights, change them and run whatever it likes, and nothing of it is in the model afterwards.
"""

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from kernelgraft.conversion.program import Part
from kernelgraft.slot import KEY, GraftedModule, Site, Slot
from kernelgraft.soundness._copying import Copier, Variant


class Replica:
    """Copies of the modules of one site, and of what is inside them.

    Attributes:
        members: The copies, in the order of the fusion.
        tensors: Their parameters and buffers, and tensors that are plain attributes, each once.
        originals: How each original parameter reads from them, by its name in the model.
        buffers: The same for original buffers that are packed, and those that stayed where they were.
    """

    def __init__(self, modules: dict[str, nn.Module], dtype: torch.dtype | None = None) -> None:
        """Copies modules by their paths.

        Args:
            modules: The modules that stand at the site's paths.
            dtype: What floating tensors are cast to; `None` keeps each in its own.
        """
        copier = _SlotCopier(next(iter(modules.values())), dtype)
        with torch.no_grad():
            self.members = [copier.module(module) for module in modules.values()]
        self.sites = list(copier.sites.values())
        self.tensors = list(copier.copies.values())
        for module in copier.modules:
            for parameter in module._parameters.values():
                if parameter is not None and parameter.is_floating_point():
                    parameter.requires_grad_(True)
        self.originals: dict[str, _Reading] = {}
        self.buffers: dict[str, _Reading] = {}
        for path, member in zip(modules, self.members, strict=True):
            for name, is_parameter, reading in _readings(member, path):
                (self.originals if is_parameter else self.buffers).setdefault(name, reading)
        self._fresh = [(tensor, tensor.clone()) for reading in self.buffers.values() for tensor in reading.tensors]
        weakref.finalize(self, _let_go, copier.modules).atexit = False

    @torch.no_grad()
    def take(self, other: "Replica") -> None:
        """Take over the values of another replica of the same site, its buffers as they were at first."""
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine.copy_(theirs)
        for (mine, _), (_, theirs) in zip(self._fresh, other._fresh, strict=True):
            mine.copy_(theirs)
        self._fresh = [(tensor, tensor.clone()) for tensor, _ in self._fresh]

    @torch.no_grad()
    def differs(self, other: "Replica") -> bool:
        """Whether a parameter differs from that of a replica that holds the same values in a wider dtype."""
        pairs = zip(self.tensors, other.tensors, strict=True)
        return any(isinstance(mine, nn.Parameter) and not torch.equal(mine.to(b.dtype), b) for mine, b in pairs)

    @torch.no_grad()
    def change_weights(self, generator: torch.Generator) -> None:
        """Multiply each weight by a number between 1/2 and 3/2, in place, as an optimizer's step would write them."""
        for tensor in self.tensors:
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                factors = torch.rand(tensor.shape, generator=generator) + 0.5
                tensor.mul_(factors.to(tensor.device, tensor.dtype))

    @torch.no_grad()
    def refresh(self, *, training: bool, use_reference: bool) -> None:
        """Buffers as they were at first, and everything set for one call."""
        for tensor, value in self._fresh:
            tensor.copy_(value)
        for module in self.modules():
            module.training = training
        for site in self.sites:
            site.use_reference = use_reference
            site.declined, site.has_no_gradient = "", False
            site.refused.clear()

    def modules(self) -> Iterator[nn.Module]:
        """All modules, the originals behind slots among them."""
        for member in self.members:
            for module in member.modules():
                yield module
                slot = vars(module).get(KEY)
                if isinstance(module, GraftedModule) and slot is not None:
                    yield from slot.skeleton.modules()

    def without_dropout(self) -> bool:
        """Set every probability of dropout to 0, where a module keeps it as an attribute; whether there was one."""
        found = False
        for module in self.modules():
            for name, value in vars(module).items():
                is_one = "dropout" in name or (name == "p" and isinstance(module, nn.modules.dropout._DropoutNd))
                if is_one and type(value) is float and value:
                    vars(module)[name] = 0.0
                    found = True
        return found


def _let_go(modules: list[nn.Module]) -> None:
    """Part modules from their slots, which hold them: so their memory is free at once, and not when Python looks."""
    for module in modules:
        vars(module).pop(KEY, None)


class _Reading:
    """How one original reads from what holds it now."""

    def __init__(self, get: Callable[[str], torch.Tensor], part: Part | None, name: str) -> None:
        self.get, self.part, self.name = get, part, name

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.get(name) for name in (self.part.packed if self.part else (self.name,))]

    def read(self, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The original, with each tensor that holds it changed first."""
        if self.part is None:
            return change(self.get(self.name))
        return self.part.read(lambda name: change(self.get(name)))


def _readings(module: nn.Module, path: str) -> Iterator[tuple[str, bool, _Reading]]:
    """The originals of a module and of what is inside it: name, whether it is a parameter, and how it reads."""
    slot: Slot | None = vars(module).get(KEY)
    if isinstance(module, GraftedModule) and slot is not None:
        for name, part in slot.parts.items():
            if part.kind != "lost":
                reading = _Reading(slot.packed, part, name)
                yield f"{path}.{name}", all(isinstance(each, nn.Parameter) for each in reading.tensors), reading
        left = {name: buffer for name, buffer in slot.skeleton.named_buffers() if name not in slot.parts}
        for name in left:
            yield f"{path}.{name}", False, _Reading(left.__getitem__, None, name)
        return
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            own = {name: tensor}
            yield f"{path}.{name}", isinstance(tensor, nn.Parameter), _Reading(own.__getitem__, None, name)
    for name, child in module._modules.items():
        if child is not None:
            yield from _readings(child, f"{path}.{name}")


class _SlotCopier(Copier):
    """Copies slots and their sites with the modules that they belong to."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        def own(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().to(dtype if tensor.is_floating_point() else None, copy=True)

        super().__init__(model, Variant("in a replica", own, own), set())
        self.sites: dict[int, Site] = {}
        self.copies: dict[int, torch.Tensor] = {}
        self.modules: list[nn.Module] = []

    def module(self, module: nn.Module) -> nn.Module:
        is_new = id(module) not in self.done
        new = super().module(module)
        if is_new:
            self.modules.append(new)
        return new

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        new = super().tensor(tensor)
        self.copies[id(tensor)] = new
        return new

    def value(self, value: Any) -> Any:
        if isinstance(value, Slot):
            return self.slot(value)
        return super().value(value)

    def slot(self, slot: Slot) -> Slot:
        if id(slot) in self.done:
            found: Slot = self.done[id(slot)]
            return found
        new = copy.copy(slot)
        self.done[id(slot)] = new
        new.site = self.site(slot.site)
        new.skeleton, new.layout = self.module(slot.skeleton), self.module(slot.layout)
        new.before = tuple(self.slot(each) for each in slot.before)
        return new

    def site(self, site: Site) -> Site:
        if id(site) not in self.sites:
            # A refused call shall be told, and not be answered by the original.
            self.sites[id(site)] = Site(site.host, site.modes, site.originals, "error")
        return self.sites[id(site)]
