"""What one path of a grafted model answers: original names, the original forward, and everything that asks for them.

A slot stands where an original module stood. The original stays beside it without its bytes (the *skeleton*), and each
of its parameters is read as a view of the packed parameters. No hook on the model or on a parent is needed: a slot
answers for its own path, through the original's own code run on a shallow tree of the skeleton.
"""

import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.dlpack import from_dlpack

from kernelgraft.errors import GraftError

if TYPE_CHECKING:
    from kernelgraft.conversion.program import Part

KEY = "_kernelgraft"
"""Name in an instance's `__dict__` under which its `Slot` is kept: outside the module tree, so torch never sees it."""

HOOK_DICTS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Torch's hook registries. A slot shares them with its skeleton, so that handles given out before go on working."""

_ACCELERATE = ("forward", "_old_forward", "_hf_hook")


class Site:
    """What the slots of one site share: which forward runs, and how often it did.

    Attributes:
        host: Path of the module that runs the kernel.
        modes: The pairs `(training, compiling)` for which there is a kernel.
        fallback: "reference" if the original forward may run where the kernel cannot, else "error".
        use_reference: Whether the originals run instead of the kernel; set by `Graft.reference`.
        packed_names: Whether state dicts use packed names; set by `Graft.packed_names`.
        declined: Why the kernel must not run where gradients are asked for (it lost one), or "".
        refused: Threads in which the kernel refused the call that is under way (0 stands for a trace).
        accepted: What the call that `supports` accepted last looked like.
        kernel_calls: Eager calls in which the kernel ran.
        reference_calls: Eager calls in which the host's original forward ran.
    """

    def __init__(self, host: str, modes: frozenset[tuple[bool, bool]], fallback: str) -> None:
        self.host = host
        self.modes = modes
        self.fallback = fallback
        self.use_reference = False
        self.packed_names = False
        self.declined = ""
        self.refused: set[int] = set()
        self.accepted: object = None
        self.kernel_calls = 0
        self.reference_calls = 0

    def runs_originals(self, training: bool) -> bool:
        """Whether each slot of the site runs its own original, known before the call is looked at."""
        if self.use_reference or (training, torch.compiler.is_compiling()) not in self.modes:
            return True
        return bool(self.declined) and torch.is_grad_enabled()


class Slot:
    """The record behind one path of a graft.

    Attributes:
        path: Where the slot stands in the model.
        site: What it shares with the other slots of its site.
        skeleton: The original module; parameters that were taken over are empty, all else is as it was.
        layout: The module that holds the packed parameters (the slot's own module, or the host that absorbed it).
        parts: For each original parameter that was taken over, how it reads from the packed ones.
        before: On a host, the slots whose output flows into it, in order.
        is_behind: Whether the host's output flows into this slot.
        lost: While a graft is being made, the values of originals that cannot be had back from the packed ones.
    """

    def __init__(
        self, path: str, site: Site, skeleton: nn.Module, layout: nn.Module, parts: "Mapping[str, Part]"
    ) -> None:
        self.path = path
        self.site = site
        self.skeleton = skeleton
        self.layout = layout
        self.parts = dict(parts)
        self.before: tuple[Slot, ...] = ()
        self.is_behind = False
        self.lost: dict[str, torch.Tensor] = {}

    @property
    def is_host(self) -> bool:
        """Whether the kernel runs here; else the slot passes its input through."""
        return self.path == self.site.host

    def packed(self, name: str) -> torch.Tensor:
        """The packed parameter or buffer called `name`."""
        return tensor_at(self.layout, name)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every original parameter that was taken over, read from the packed ones, with gradients."""
        return {name: part.read(self.packed) for name, part in self.parts.items()}

    def tree(self) -> nn.Module:
        """A shallow tree of the skeleton with its parameters in place; made per call, so threads do not meet in it."""
        tree = shallow_tree(self.skeleton)
        for name, tensor in self.tensors().items():
            put_tensor(tree, name, tensor)
        return tree

    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """The original's forward, on views of the packed parameters."""
        if torch.compiler.is_compiling():
            return functional_call(self.skeleton, self.tensors(), args, kwargs, tie_weights=False)
        return self.tree().forward(*args, **kwargs)

    def original_attribute(self, name: str) -> Any:
        """What `name` was on the original: a parameter reads as its view, a submodule as a shallow tree."""
        if name in self.parts:
            return self.parts[name].read(self.packed)
        if name in self.skeleton._modules:
            return self.tree()._modules[name]
        return getattr(self.skeleton, name)


class GraftedModule(nn.Module):
    """Base of the generated classes: answers for one path as the original module did."""

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As the original's: its names, order, metadata and values. The values are live views."""
        slot: Slot = self.__dict__[KEY]
        if slot.site.packed_names:
            return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if destination is None and not args:
            destination = OrderedDict()
            destination._metadata = OrderedDict()
        out = slot.tree().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if keep_vars:
            return out
        for name, part in slot.parts.items():
            tensor = out.get(prefix + name)
            if part.kind == "view" and type(tensor) is torch.Tensor and tensor.device.type in ("cpu", "cuda"):
                # The same memory under a storage of its own: savers that look at storages take parts that share one
                # for tied weights and drop all but one of them.
                out[prefix + name] = from_dlpack(tensor)
        return out

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        slot: Slot = self.__dict__[KEY]
        if slot.site.packed_names:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            return
        mine = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        _load_slot(slot, mine, prefix, local_metadata, missing_keys, unexpected_keys, error_msgs)
        for key in list(state_dict):
            if key.startswith(prefix):
                del state_dict[key]
        # Torch now goes on to the layout's own children: each finds itself, which copies nothing.
        state_dict.update({prefix + name: parameter for name, parameter in self.named_parameters()})
        state_dict.update({prefix + name: buffer for name, buffer in self.named_buffers()})

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        slot: Slot = self.__dict__[KEY]
        slot.skeleton._apply(fn)  # type: ignore[no-untyped-call]
        return self

    def train(self, mode: bool = True) -> Any:
        """Sets the mode here and in the original, whose forward may depend on it."""
        self.__dict__[KEY].skeleton.train(mode)
        return super().train(mode)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            slot = self.__dict__.get(KEY)
            if slot is None or name.startswith("__"):
                raise
            return slot.original_attribute(name)

    def __setattr__(self, name: str, value: Any) -> None:
        slot: Slot | None = self.__dict__.get(KEY)
        if slot is not None:
            if isinstance(value, nn.Module) and name in self._modules and self._modules[name] is not value:
                self._refuse_replacing(name, value)
            if name in slot.parts and isinstance(value, torch.Tensor):
                return self._set_original(slot, name, value)
        return super().__setattr__(name, value)

    def _refuse_replacing(self, name: str, value: nn.Module) -> None:
        old = self._modules[name]
        if isinstance(old, AbsorbedSubmodule) or (old is not None and any(True for _ in old.parameters())):
            slot: Slot = self.__dict__[KEY]
            raise GraftError(
                f"{type(value).__name__} would replace {name!r} of the graft at {slot.path!r}, whose weights are "
                f"packed for the kernel. Leave this module out of what you replace (an adapter's target_modules, for "
                f"example), or remove the graft first."
            )

    def _set_original(self, slot: Slot, name: str, value: torch.Tensor) -> None:
        part = slot.parts[name]
        if part.kind != "whole" or not isinstance(value, nn.Parameter):
            raise GraftError(
                f"{slot.path}.{name} is part of {', '.join(part.packed)}, packed for the kernel, and cannot be "
                f"replaced. Copy into it under torch.no_grad(), use load_state_dict, or remove the graft first."
            )
        put_tensor(slot.layout, part.packed[0], value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self)._kernelgraft_maker, (), self.__dict__  # type: ignore[attr-defined]


class AbsorbedSubmodule(nn.Module):
    """Stands under the name of a submodule that a kernel took over, so that who looks for it finds it and is told.

    It has no parameters of its own; reading `weight` gives the view of the packed one.
    """

    def __init__(self, slot: Slot, path: str) -> None:
        super().__init__()
        self.__dict__[KEY] = slot
        self.__dict__["_path"] = path

    def __getattr__(self, name: str) -> Any:
        slot: Slot | None = self.__dict__.get(KEY)
        if slot is None or name.startswith("__"):
            raise AttributeError(name)
        return getattr(slot.tree().get_submodule(self.__dict__["_path"]), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the original submodule on views of the packed parameters."""
        slot: Slot = self.__dict__[KEY]
        return slot.tree().get_submodule(self.__dict__["_path"])(*args, **kwargs)

    def extra_repr(self) -> str:
        """Says who has the weights."""
        slot: Slot = self.__dict__[KEY]
        return f"absorbed by {slot.site.host}"


def add_stubs(module: nn.Module, slot: Slot) -> None:
    """Give `module` a stub for every child of the original that had parameters and that the layout does not name."""
    for name, child in slot.skeleton.named_children():
        if name not in module._modules and any(True for _ in child.parameters()):
            module._modules[name] = _stub(slot, name, child)


def _stub(slot: Slot, path: str, original: nn.Module) -> AbsorbedSubmodule:
    stub = AbsorbedSubmodule(slot, path)
    for name, child in original.named_children():
        if any(True for _ in child.parameters()):
            stub._modules[name] = _stub(slot, f"{path}.{name}", child)
    return stub


def _load_slot(
    slot: Slot,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Load a slot's own keys with the original's code, whose messages and strictness are so the original's."""
    refused = _refuse_distributed(slot, state_dict, prefix, error_msgs)
    with torch.no_grad():
        tree = slot.tree()
    before = {name: tensor_at(tree, name) for name in slot.parts}
    for path, module in tree.named_modules(remove_duplicate=False):
        at = prefix + path + "." if path else prefix
        own = {key: value for key, value in state_dict.items() if key.startswith(at)}
        metadata = dict(local_metadata)
        if "version" in metadata and path:
            # Torch does not hand a module its children's versions: a checkpoint that has ours is taken as current.
            metadata["version"] = module._version
        module._load_from_state_dict(own, at, metadata, True, missing_keys, unexpected_keys, error_msgs)
    if refused:
        return
    for name, part in slot.parts.items():
        loaded = tensor_at(tree, name)
        if loaded is not before[name]:
            _assign_part(slot, name, loaded)
        elif part.kind == "assembled" and prefix + name in state_dict:
            part.write(slot.packed, loaded)
    _keep_assigned(slot, tree)


def _assign_part(slot: Slot, name: str, loaded: torch.Tensor) -> None:
    """`assign=True`: a whole parameter is assigned; a merged one is re-made once and filled part by part."""
    part = slot.parts[name]
    if part.kind == "whole":
        put_tensor(slot.layout, part.packed[0], loaded)
        return
    for packed_name in part.packed:
        packed = slot.packed(packed_name)
        if (packed.dtype, packed.device) != (loaded.dtype, loaded.device):
            made = torch.empty_like(packed, dtype=loaded.dtype, device=loaded.device)
            if not packed.is_meta:
                made.copy_(packed.detach())
            put_tensor(slot.layout, packed_name, nn.Parameter(made, requires_grad=packed.requires_grad))
    part.write(slot.packed, loaded.detach())


def _keep_assigned(slot: Slot, tree: nn.Module) -> None:
    """What the load put into the shallow tree outside the packed parameters belongs to the skeleton."""
    for path, module in tree.named_modules(remove_duplicate=False):
        kept = slot.skeleton.get_submodule(path)
        for name, value in module._buffers.items():
            kept._buffers[name] = value
        for name, parameter in module._parameters.items():
            if (f"{path}.{name}" if path else name) not in slot.parts:
                kept._parameters[name] = parameter


def _refuse_distributed(slot: Slot, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> bool:
    found = False
    for name, part in slot.parts.items():
        value = state_dict.get(prefix + name)
        if part.kind != "whole" and hasattr(value, "device_mesh"):
            error_msgs.append(
                f"{prefix}{name} comes as a DTensor, and it is part of {', '.join(part.packed)}, which a kernel packs. "
                f"Load full tensors, or remove the graft before loading sharded ones."
            )
            found = True
    return found


def tensor_at(module: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer called `name` in `module`, read from torch's registries alone."""
    path, _, last = name.rpartition(".")
    for step in path.split(".") if path else ():
        child = module._modules[step]
        assert child is not None
        module = child
    tensor: torch.Tensor | None = module._parameters.get(last)
    if tensor is None:
        tensor = module._buffers[last]
    assert tensor is not None
    return tensor


def put_tensor(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put `tensor` where `module` has the parameter or buffer called `name`, whatever its class thinks of it."""
    path, _, last = name.rpartition(".")
    for step in path.split(".") if path else ():
        child = module._modules[step]
        assert child is not None
        module = child
    registry: dict[str, Any] = module._buffers if last in module._buffers else module._parameters
    registry[last] = tensor


def has_tensor(module: nn.Module, name: str) -> bool:
    """Whether `module` has a parameter or buffer called `name`."""
    return any(True for found, _ in _named_tensors(module) if found == name)


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def shallow_tree(module: nn.Module) -> nn.Module:
    """A new tree of the same modules that shares everything but the dicts, in which tensors can be put freely.

    Bound methods kept in attributes are bound to the copy. Accelerate's hook on a module is left out: the slot carries
    it.
    """
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__.update(module.__dict__)
    if "_hf_hook" in module.__dict__:
        for name in _ACCELERATE:
            copy.__dict__.pop(name, None)
    for name, value in list(copy.__dict__.items()):
        if isinstance(value, types.MethodType) and value.__self__ is module:
            copy.__dict__[name] = types.MethodType(value.__func__, copy)
    copy.__dict__["_parameters"] = dict(module._parameters)
    copy.__dict__["_buffers"] = dict(module._buffers)
    copy.__dict__["_modules"] = {
        name: None if child is None else shallow_tree(child) for name, child in module._modules.items()
    }
    return copy
