"""The sites of a graft by kind, and in which modes their kernels run."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from kernelgraft.binding import ClassKey
from kernelgraft.graft import Graft, Installed
from kernelgraft.kernel import Kernel
from kernelgraft.slot import KEY, Slot


@dataclass(frozen=True)
class Pass:
    """One mode in which a kind of site is tried.

    Attributes:
        training: The mode of the modules.
        gradients: Whether gradients are compared.
        complete: Whether all is tried, or the activations of the model alone.
    """

    training: bool
    gradients: bool
    complete: bool


@dataclass
class Kind:
    """Sites with the same kernels, classes and shapes.

    Attributes:
        title: The kernels and what they stand for.
        sites: The sites, in the model's order.
        kernels: Kernels that run eagerly, by whether the modules are in training.
        compiled: Names of those that run under torch.compile alone.
    """

    title: str
    sites: list[Installed] = field(default_factory=list)
    kernels: dict[bool, tuple[Kernel, ...]] = field(default_factory=dict)
    compiled: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The kernels' names."""
        return tuple(dict.fromkeys(kernel.name for kernels in self.kernels.values() for kernel in kernels))

    def different(self) -> list[Installed]:
        """The first site, and of those that say something else in their attributes (a window, an epsilon) one each."""
        found: dict[Any, Installed] = {}
        for each in self.sites:
            found.setdefault(tuple(_said(module) for module in _originals(each)), each)
        return list(found.values())

    @property
    def lost(self) -> str:
        """Why the originals cannot be had back from the packed parameters, or ""."""
        parts = [part for site in self.sites[:1] for slot in _slots(site) for part in slot.parts.values()]
        return next((f"{part.name}: {part.why}" for part in parts if part.kind == "lost"), "")

    def passes(self, gradients: bool) -> tuple[list[Pass], str]:
        """The modes to try, and what is to be said about gradients."""
        inference, training = self.kernels.get(False), self.kernels.get(True)
        without = [kernel.name for kernel in training or inference or () if not kernel.has_backward]
        if not gradients:
            said = "not asked for"
        elif without:
            said = f"not checked: {', '.join(without)} says has_backward = False"
        elif training is None:
            said = "not checked: the kernel runs in inference alone"
        else:
            said = "checked"
        checked = said == "checked"
        passes = []
        if inference is not None:
            passes.append(Pass(False, checked and inference == training, True))
        if training is not None:
            passes.append(Pass(True, checked, inference != training))
        return passes, said


def kinds_of(graft: Graft) -> list[Kind]:
    """The sites of a graft, those of function kernels behind the others."""
    plan, installed = graft.plan, graft._installed
    kinds: dict[Any, Kind] = {}
    for index, each in enumerate(installed):
        if index < len(plan.sites):
            identity: Any = plan.sites[index].kind
            title = f"for {' + '.join(plan.kinds[identity].classes)}"
        else:
            identity = each.keys
            names = ", ".join(f"{name}()" for name, _ in each.keys[0].functions)
            title = f"in the place of {names} in {each.keys[0].original.__name__}"
        kind = kinds.get(identity)
        if kind is None:
            kernels = _eager_kernels(each)
            kind = kinds[identity] = Kind("", [], kernels, _compiled_kernels(each, kernels))
            kind.title = f"{' | '.join(kind.names) or 'no kernel'} {title}"
        kind.sites.append(each)
    return list(kinds.values())


def _eager_kernels(installed: Installed) -> dict[bool, tuple[Kernel, ...]]:
    found: dict[bool, list[Kernel]] = {}
    for key in installed.keys:
        lists = [key.modes, *(modes for _, modes in key.functions)]
        for modes in lists:
            for training, compiling, kernel in modes:
                runs = not compiling and (training, False) in installed.site.modes
                if runs and kernel not in found.setdefault(training, []):
                    found[training].append(kernel)
    return {training: tuple(kernels) for training, kernels in found.items()}


def _compiled_kernels(installed: Installed, eager: dict[bool, tuple[Kernel, ...]]) -> tuple[str, ...]:
    known = {kernel for kernels in eager.values() for kernel in kernels}
    lists = [modes for key in installed.keys for modes in (key.modes, *(more for _, more in key.functions))]
    modes = [mode for each in lists for mode in each]
    return tuple(dict.fromkeys(kernel.name for _, compiling, kernel in modes if compiling and kernel not in known))


def keys_of(installed: Installed) -> dict[str, ClassKey]:
    """The classes of a site's slots by path."""
    return dict(zip(installed.modules, installed.keys, strict=True))


def forwards_of(installed: Installed) -> tuple[Callable[..., Any], ...]:
    """The forwards of a site's originals."""
    return tuple(key.original.forward for key in installed.keys)


def _slots(installed: Installed) -> list[Slot]:
    return [vars(module)[KEY] for module in installed.modules.values()]


def _originals(installed: Installed) -> Iterable[nn.Module]:
    return (slot.skeleton for slot in _slots(installed))


_INTERNAL = frozenset(vars(nn.Module())) | {KEY}
_PLAIN = (int, float, str, bool, type(None), tuple)


def _said(module: nn.Module) -> Any:
    """What a module and those inside it say in plain attributes, the layer's index left out."""
    plain = tuple(
        (name, value)
        for name, value in vars(module).items()
        if name not in _INTERNAL
        and isinstance(value, _PLAIN)
        and not name.endswith(("idx", "index", "layer_id", "layer_number"))
    )
    children = tuple((name, _said(child)) for name, child in module._modules.items() if child is not None)
    return type(module), repr(plain), children
