"""A plan applied to a model, and removed.

A graft changes one model: module instances at the paths that its plan lists, and the root's class. It is all or
nothing, and `remove()` gives back the same module objects with the current weights.
"""

import contextlib
import difflib
import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from kernelgraft.binding import ClassKey, Rebound, bound_class, traces_of
from kernelgraft.checkpoint.fill import materialize
from kernelgraft.config import KernelConfig, device_type
from kernelgraft.entry import Entry
from kernelgraft.errors import GraftError
from kernelgraft.install import install_site, rebind_function, restore_site
from kernelgraft.kernel import load_kernel
from kernelgraft.plan import Plan
from kernelgraft.planner import Blueprint, choose_modes
from kernelgraft.slot import KEY, GraftedModule, Site, Slot

logger = logging.getLogger("kernelgraft")

ROOT_KEY = "_kernelgraft_graft"
"""Name in the root's `__dict__` under which its `Graft` is kept."""


@dataclass(frozen=True)
class Calls:
    """How often what ran since the graft was made.

    Attributes:
        kernel: Eager calls in which a kernel ran.
        reference: Eager calls in which an original forward ran instead.
        traced: Times that torch.compile traced a kernel of this graft's kinds into a graph.
        sites: `(kernel, reference)` for each host path.
    """

    kernel: int
    reference: int
    traced: int
    sites: dict[str, tuple[int, int]]


@dataclass
class Installed:
    """One site in the model: its slots' modules by path, and what was there before."""

    site: Site
    entry: Entry
    keys: tuple[ClassKey, ...]
    modules: dict[str, nn.Module]
    device: str


class Graft:
    """An applied plan. Use it as a context manager to have it removed at the end of a block.

    Attributes:
        model: The grafted model.
        plan: What was done.
    """

    def __init__(self, model: nn.Module, plan: Plan, config: KernelConfig) -> None:
        self.model = model
        self.plan = plan
        self._config = config
        self._installed: list[Installed] = []
        self._original_class = type(model)
        self._traces_before: dict[ClassKey, int] = {}

    def __enter__(self) -> "Graft":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<Graft of {self.plan.summary()}{'' if self.is_applied else ' (removed)'}>"

    @property
    def is_applied(self) -> bool:
        """Whether the graft is in the model."""
        return vars(self.model).get(ROOT_KEY) is self

    def remove(self) -> None:
        """Put the original modules back, with the weights as they are now. A graft that is removed stays so.

        Raises:
            GraftError: A rule of the graft has no inverse, or a grafted module was replaced by something else. Nothing
                has changed then.
        """
        if not self.is_applied:
            return
        for installed in self._installed:
            self._check_removable(installed)
        for installed in reversed(self._installed):
            restore_site(self.model, installed.modules)
        self._installed = []
        del vars(self.model)[ROOT_KEY]
        self.model.__class__ = self._original_class

    def _check_removable(self, installed: Installed) -> None:
        for path, module in installed.modules.items():
            found = self.model.get_submodule(path)
            if found is not module:
                raise GraftError(
                    f"{path!r} no longer holds what the graft put there but a {type(found).__name__}. Undo that "
                    f"change, then remove the graft."
                )
            slot: Slot = vars(module)[KEY]
            lost = [f"{path}.{name} ({part.why})" for name, part in slot.parts.items() if part.kind == "lost"]
            if lost:
                raise GraftError(
                    f"The graft cannot be removed: {'; '.join(lost)}. The kernel's rule has no inverse. Load the model "
                    f"again without the kernel."
                )

    @property
    def calls(self) -> Calls:
        """How often kernels and originals ran: the proof that what was asked for happened."""
        sites: dict[str, tuple[int, int]] = {}
        for installed in self._installed:
            site = installed.site
            sites[site.host] = (site.kernel_calls, site.reference_calls)
        traced = sum(traces_of.get(key, 0) - before for key, before in self._traces_before.items())
        return Calls(sum(k for k, _ in sites.values()), sum(r for _, r in sites.values()), traced, sites)

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """For each original parameter name, the names under which its values are in `named_parameters()` now.

        Empty for what the graft does not train: parameters that a layout dropped.
        """
        found: dict[str, tuple[str, ...]] = {}
        slots = self._slots()
        for name, _ in self._original_parameters():
            path, local = _split(name, slots)
            if path is None:
                found[name] = (name,)
            else:
                slot = slots[path]
                host = slot.site.host
                packed = slot.parts[local].packed if local in slot.parts else ()
                found[name] = tuple(f"{host}.{each}" for each in packed)
        return found

    def _original_parameters(self) -> Iterator[tuple[str, Any]]:
        slots = self._slots()
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if _split(name, slots)[0] is None:
                yield name, parameter
        for path, slot in slots.items():
            for name, parameter in slot.skeleton.named_parameters():
                yield f"{path}.{name}", parameter

    def _slots(self) -> dict[str, Slot]:
        return {
            path: vars(module)[KEY]
            for installed in self._installed
            for path, module in installed.modules.items()
            if isinstance(module, GraftedModule)
        }

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Inside the block every site runs its originals, on the same weights and with gradients."""
        yield from self._switched("use_reference")

    @contextlib.contextmanager
    def packed_names(self) -> Iterator[None]:
        """Inside the block `state_dict()` and `load_state_dict()` use packed names, as `named_parameters()` does.

        For tools that pair the two, such as accelerate's `cpu_offload`.
        """
        yield from self._switched("packed_names")

    def _switched(self, name: str) -> Iterator[None]:
        before = [(installed.site, getattr(installed.site, name)) for installed in self._installed]
        for site, _ in before:
            setattr(site, name, True)
        try:
            yield
        finally:
            for site, value in before:
                setattr(site, name, value)

    def update(self, tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> list[str]:
        """Write new weights, given under original names, into their places; part by part if they are streamed.

        Nothing is allocated: every packed parameter keeps its `data_ptr`, and a captured CUDA graph goes on.

        Args:
            tensors: Original names and tensors, of any dtype and device.

        Returns:
            The original parameter names that were not among them.

        Raises:
            GraftError: A name is none of the model's, or a shape does not fit. What came before it has been written.
        """
        items = tensors.items() if isinstance(tensors, Mapping) else tensors
        slots = self._slots()
        plain = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        left = dict.fromkeys(name for name, _ in self._original_parameters())
        for name, tensor in items:
            path, local = _split(name, slots)
            if path is not None and local in slots[path].parts:
                slots[path].parts[local].write(slots[path].packed, tensor)
            else:
                target = plain.get(name) if path is None else _kept(slots[path], local)
                if target is None or target.shape != tensor.shape:
                    raise GraftError(_no_such_name(name, tensor, target, left))
                with torch.no_grad():
                    target.copy_(tensor)
            left.pop(name, None)
        return list(left)

    def moved_to(self, device: torch.device) -> None:
        """Choose the kernels for another device type; called before the model's tensors go there.

        Raises:
            GraftError: The config has no kernel for the device, or one with another layout. Nothing has changed.
        """
        kind = device_type(device)
        changes = [(each, self._keys_for(each, device)) for each in self._installed if each.device != kind]
        for installed, keys in changes:
            installed.keys, installed.device = keys, kind
            for module, key in zip(installed.modules.values(), keys, strict=True):
                module.__class__ = bound_class(key)
                if key.modes:
                    installed.site.modes = frozenset((t, c) for t, c, _ in key.modes)
            if not any(key.modes or key.functions for key in keys):
                installed.site.modes = frozenset()

    def _keys_for(self, installed: Installed, device: torch.device) -> tuple[ClassKey, ...]:
        modes = choose_modes(installed.entry, device, load_kernel) or ()
        if not modes and self._config.fallback != "reference":
            raise GraftError(
                f"{installed.entry.label}: the config has no kernel for {device_type(device)!r}, where the model is "
                f"about to go. Add one, pass KernelConfig(..., fallback='reference'), or remove the graft first."
            )
        keys = []
        for key in installed.keys:
            if key.role == "function":
                keys.append(replace(key, functions=tuple((name, modes) for name, _ in key.functions)))
            elif key.modes:
                if any(kernel.layout is not key.layout for _, _, kernel in modes):
                    raise GraftError(
                        f"{installed.entry.label}: its kernel for {device_type(device)!r} has another layout than the "
                        f"one that is packed. Remove the graft, move the model, and graft it there."
                    )
                keys.append(replace(key, modes=modes or key.modes))
            else:
                keys.append(key)
        return tuple(keys)


def _split(name: str, slots: Mapping[str, Slot]) -> tuple[str | None, str]:
    """The slot in which an original name lies, and the rest of the name."""
    path = name
    while "." in path:
        path = path.rpartition(".")[0]
        if path in slots:
            return path, name[len(path) + 1 :]
    return None, name


def _kept(slot: Slot, local: str) -> torch.Tensor | None:
    return {**dict(slot.skeleton.named_parameters()), **dict(slot.skeleton.named_buffers())}.get(local)


def _no_such_name(name: str, tensor: torch.Tensor, target: torch.Tensor | None, known: Iterable[str]) -> str:
    if target is not None:
        return f"{name} has shape {list(target.shape)}, and the update brings {list(tensor.shape)}."
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f"{name!r} is no parameter of the model. Nearest: {', '.join(near) or 'none'}. Use the original names."


# --- the root


_roots: "weakref.WeakValueDictionary[type[nn.Module], type[nn.Module]]" = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class _RootMaker:
    original: type[nn.Module]

    def __call__(self) -> nn.Module:
        cls = root_class(self.original)
        return cls.__new__(cls)

    def __deepcopy__(self, memo: object) -> "_RootMaker":
        return self


def root_class(original: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the model's class, under the same name, through which `model.use_kernels = False` reaches us."""
    cls = _roots.get(original)
    if cls is None:
        namespace = {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "use_kernels": property(_get_use_kernels, _set_use_kernels),
            "set_use_kernels": set_use_kernels,
            "_apply": _apply_root,
            "__reduce_ex__": _reduce_root,
            "_kernelgraft_original": original,
        }
        cls = _roots.setdefault(original, type(original.__name__, (original,), namespace))
    return cls


def _get_use_kernels(_: nn.Module) -> bool:
    return True


def _set_use_kernels(self: nn.Module, value: bool) -> None:
    self.set_use_kernels(value)  # type: ignore[operator]


def set_use_kernels(self: nn.Module, use_kernels: bool, kernel_config: Any = None, mode: Any = None) -> None:  # noqa: ARG001 - the signature of Transformers
    """As Transformers' method: `False` removes the graft; `True` changes nothing on a model that is grafted already."""
    if not use_kernels:
        vars(self)[ROOT_KEY].remove()
    elif kernel_config is not None:
        raise GraftError(
            "The model is grafted already. Remove that graft first (model.use_kernels = False), then graft with the "
            "new config: kernelgraft.graft(model, kernel_config)."
        )


def _apply_root(self: nn.Module, fn: Any, recurse: bool = True) -> Any:
    graft: Graft | None = vars(self).get(ROOT_KEY)
    parameter = next(self.parameters(), None)
    if graft is not None and parameter is not None and not parameter.is_meta:
        goes_to = fn(parameter.detach().new_empty(0)).device
        if goes_to.type not in (parameter.device.type, "meta"):
            graft.moved_to(goes_to)
    return type(self)._kernelgraft_original._apply(self, fn, recurse)  # type: ignore[attr-defined]


def _reduce_root(self: nn.Module, _: Any) -> Any:
    return _RootMaker(type(self)._kernelgraft_original), (), self.__dict__  # type: ignore[attr-defined]


# --- applying


def apply_blueprint(model: nn.Module, blueprint: Blueprint) -> Graft:
    """Carry a blueprint out, all or nothing, and log one line about it."""
    graft = Graft(model, blueprint.plan, blueprint.config)
    undo: list[dict[str, nn.Module]] = []
    try:
        for prepared in blueprint.sites:
            site, modules = install_site(model, prepared, blueprint.config.fallback)
            undo.append(modules)
            graft._installed.append(Installed(site, prepared.entry, prepared.keys, modules, blueprint.plan.device))
        for function in blueprint.functions:
            site, modules = rebind_function(model, function, blueprint.config.fallback)
            undo.append(modules)
            graft._installed.append(Installed(site, function.entry, (function.key,), modules, blueprint.plan.device))
    except BaseException:
        for modules in reversed(undo):
            restore_site(model, modules)
        raise
    materialize(model)
    for slot in graft._slots().values():
        slot.lost = {}
    keys = dict.fromkeys(key for installed in graft._installed for key in installed.keys)
    graft._traces_before = {key: traces_of.get(key, 0) for key in keys}
    vars(model)[ROOT_KEY] = graft
    model.__class__ = root_class(type(model))
    logger.info("%s", blueprint.plan.summary())
    return graft


def graft_of(model: nn.Module) -> Graft | None:
    """The graft that is in `model`, also after `from_pretrained`; `None` if there is none."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    found: Graft | None = vars(model).get(ROOT_KEY)
    return found


def slots_of(model: nn.Module) -> Sequence[nn.Module]:
    """The modules of `model` that a graft put there or rebound."""
    return [module for module in model.modules() if isinstance(module, GraftedModule | Rebound)]
