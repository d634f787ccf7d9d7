"""A slot's own keys, loaded by the original's code: its messages, its strictness, its versions."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from kernelgraft.errors import GraftError
from kernelgraft.tree import parameter_names, put_tensor, tensor_at

if TYPE_CHECKING:
    from kernelgraft.slot import Slot


def load_slot(
    slot: "Slot",
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Load a slot's own keys with the original's code, whose messages and strictness are so the original's."""
    refused = _refuse_distributed(slot, state_dict, prefix, error_msgs)
    tree, before = _loadable_tree(slot)

    def load(module: nn.Module, own: dict[str, Any], at: str) -> None:
        metadata = dict(local_metadata)
        if "version" in metadata and module is not tree:
            # Torch does not hand a module its children's versions: a checkpoint that has ours is taken as current.
            metadata["version"] = module._version
        module._load_from_state_dict(own, at, metadata, True, missing_keys, unexpected_keys, error_msgs)
        for name, child in module._modules.items():
            if child is not None:
                below = f"{at}{name}."
                load(child, {key: value for key, value in own.items() if key.startswith(below)}, below)
        for hook in () if module is tree else module._load_state_dict_post_hooks.values():
            hook(module, _IncompatibleKeys(missing_keys, unexpected_keys))

    load(tree, state_dict, prefix)
    if not refused:
        _take_over(slot, tree, before, prefix, error_msgs)


def load_submodule(slot: "Slot", path: str, state_dict: Mapping[str, Any], *, strict: bool, assign: bool) -> Any:
    """Load a submodule of a slot's original by the submodule's own `load_state_dict`.

    Raises:
        GraftError: What is loaded cannot be packed.
    """
    errors: list[str] = []
    _refuse_distributed(slot, {f"{path}.{name}": value for name, value in state_dict.items()}, "", errors)
    if not errors:
        tree, before = _loadable_tree(slot)
        try:
            found = tree.get_submodule(path).load_state_dict(state_dict, strict, assign)
        finally:
            _take_over(slot, tree, before, "", errors)
    if errors:
        raise GraftError("; ".join(errors))
    return found


def _take_over(slot: "Slot", tree: nn.Module, before: "_Before", prefix: str, error_msgs: list[str]) -> None:
    """Let the packed parameters have what was loaded into `tree`, where that was not done in place."""
    assigned: dict[str, torch.Tensor] = {}
    for name, part in slot.parts.items():
        loaded = tensor_at(tree, name)
        if part.kind == "whole":
            put_tensor(slot.layout, part.packed[0], loaded)
        elif loaded is not before[name][0] or _memory(loaded) != before[name][1]:
            assigned[name] = loaded.detach()
        elif part.kind == "assembled":
            part.write(slot.packed, loaded)
    _assign_parts(slot, assigned, prefix, error_msgs)
    _keep_assigned(slot, tree)


def _loadable_tree(slot: "Slot") -> tuple[nn.Module, "_Before"]:
    """The slot's tree with parameters where the original has them: torch assigns nothing else in their place.

    Beside it, where each of these lies, to tell later which ones were assigned.
    """
    with torch.no_grad():
        tree = slot.tree()
        for name in slot.parts:
            tensor = tensor_at(tree, name)
            if isinstance(tensor_at(slot.skeleton, name), nn.Parameter) and not isinstance(tensor, nn.Parameter):
                packed = (slot.packed(each) for each in slot.parts[name].packed)
                put_tensor(tree, name, nn.Parameter(tensor, any(each.requires_grad for each in packed)))
    tensors = {name: tensor_at(tree, name) for name in slot.parts}
    return tree, {name: (tensor, _memory(tensor)) for name, tensor in tensors.items()}


_Before = Mapping[str, tuple[torch.Tensor, object]]


def _memory(tensor: torch.Tensor) -> object:
    return tensor.dtype, tensor.device, tensor.untyped_storage()._cdata


def _assign_parts(slot: "Slot", assigned: Mapping[str, torch.Tensor], prefix: str, error_msgs: list[str]) -> None:
    """`assign=True` of parts: in place, or into a packed parameter made anew if all of it comes in another dtype."""
    kinds: dict[str, set[tuple[torch.dtype, torch.device]]] = {}
    covered: dict[str, int] = {}
    for name, loaded in assigned.items():
        for reading in slot.parts[name].readings:
            kinds.setdefault(reading.packed, set()).add((loaded.dtype, loaded.device))
            covered[reading.packed] = covered.get(reading.packed, 0) + reading.numel(slot.packed)
    for packed_name, (kind, *others) in kinds.items():
        packed = slot.packed(packed_name)
        if not others and kind != (packed.dtype, packed.device) and covered[packed_name] == packed.numel():
            made: torch.Tensor = torch.empty_like(packed, dtype=kind[0], device=kind[1])
            if isinstance(packed, nn.Parameter):
                made = nn.Parameter(made, requires_grad=packed.requires_grad)
            put_tensor(slot.layout, packed_name, made)
    for name, loaded in assigned.items():
        part = slot.parts[name]
        packed = slot.packed(part.packed[0])
        if any((loaded.dtype, loaded.device) != (each.dtype, each.device) for each in map(slot.packed, part.packed)):
            error_msgs.append(
                f"{prefix}{name} comes as {loaded.dtype} on {loaded.device}, and it is part of "
                f"{', '.join(part.packed)}, which a kernel packs as {packed.dtype} on {packed.device}. Assign all that "
                f"is packed there in one dtype and on one device, or load without assign=True."
            )
        else:
            part.write(slot.packed, loaded)


def _keep_assigned(slot: "Slot", tree: nn.Module) -> None:
    """What the load put into the shallow tree outside the packed parameters belongs to the skeleton."""
    for path, module in tree.named_modules(remove_duplicate=False):
        kept = slot.skeleton.get_submodule(path)
        for registry, own in ((module._buffers, kept._buffers), (module._parameters, kept._parameters)):
            for name, tensor in registry.items():
                if (f"{path}.{name}" if path else name) not in slot.parts:
                    own[name] = tensor
    slot.names = parameter_names(slot.skeleton)


def _refuse_distributed(slot: "Slot", state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> bool:
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
