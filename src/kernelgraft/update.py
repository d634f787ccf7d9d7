"""New weights, under original names, written over those that a grafted model has.

Nothing is kept from one update to the next, nor from one tensor to the next. A name is looked up in torch's own
registries when its value comes, and the view of a packed tensor is made at that moment: what was moved, assigned or
replaced in the meantime is written where it is now, and no memory that the model has let go is held. That costs about
10 us a tensor. What takes longer, listing the names that are left, comes last, when a GPU still copies.
"""

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernelgraft.checkpoint.files import Checkpoint, checkpoint_files
from kernelgraft.checkpoint.fill import check_unchanged, read
from kernelgraft.checkpoint.sharding import is_sharded, local_part
from kernelgraft.conversion.lazy import LazyTensor
from kernelgraft.conversion.part import Part, Reading, apply, fit_for
from kernelgraft.errors import ConversionError, GraftError
from kernelgraft.slot import KEY, Slot

Weights = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | str | os.PathLike[str]
"""Tensors under original names, or the place of a checkpoint that has them."""

Place = tuple[nn.Module, Slot | None, str]
"""A module, the slot in whose original it lies, and the beginning of the names that its tensors have there."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""A view of the memory to write, and the values for it, lazy or not, in the same shape."""


def update(model: nn.Module, tensors: Weights) -> list[str]:
    """Write new weights into their places in a grafted model: see `Graft.update`."""
    if isinstance(tensors, str | os.PathLike):
        with Checkpoint(checkpoint_files(tensors if isinstance(tensors, str) else Path(tensors))) as checkpoint:
            return update(model, checkpoint)
    with torch.no_grad():
        names = _write_all(model, tensors) if isinstance(tensors, Mapping) else _write_each(model, tensors)
    return _left(model, names)


def _write_each(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Each tensor as it comes. Not even a lazy one is put off: its file may be closed before the next one comes."""
    names = set()
    for name, value in tensors:
        _read(_copy(_pairs(model, name, value)))
        names.add(name)
        del value  # or it would live until the next one is made
    return names


def _write_all(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """What is in memory as it comes, and then what is in files in one pass over them."""
    waiting: dict[object, list[Pair]] = {}
    names = set()
    known: dict[str, Place | None] = {}
    for name, value in tensors.items():
        lazy = _copy(_pairs(model, name, value, known))
        if lazy or waiting:
            # Of the names of a tied parameter the last one counts.
            place = _find(model, name, known)
            waiting[id(place) if isinstance(place, torch.Tensor) else name] = lazy
        names.add(name)
        del value
    _read([pair for pairs in waiting.values() for pair in pairs])
    return names


def _copy(pairs: Sequence[Pair]) -> list[Pair]:
    """Write what is in memory; what is left is lazy."""
    lazy: list[Pair] = []
    for out, value in pairs:
        if isinstance(value, LazyTensor):
            lazy.append((out, value))
        else:
            # Not `non_blocking`: the caller may refill a pinned buffer as soon as this returns.
            out.copy_(value)
    return lazy


def _read(pairs: Sequence[tuple[torch.Tensor, Any]]) -> None:
    lazies = [lazy for _, lazy in pairs]
    check_unchanged(lazies)
    try:
        read([(lazy, out.detach()) for out, lazy in pairs])
    finally:
        # Bytes that came from a file did not pass by autograd, which must notice.
        torch.autograd.graph.increment_version([out for out, _ in pairs])
    check_unchanged(lazies)


# --- where a value belongs


def _find(
    model: nn.Module, name: str, known: dict[str, Place | None] | None = None
) -> torch.Tensor | tuple[Slot, Part] | None:
    """What an original name stands for: a whole tensor, or what lies in pieces of a slot's packed tensors; or nothing.

    Args:
        model: The model.
        name: The name.
        known: The modules found so far, where none can be replaced between one name and the next.
    """
    path, _, last = name.rpartition(".")
    if known is None:
        place = _module(model, path)
    elif path in known:
        place = known[path]
    else:
        place = known[path] = _module(model, path)
    if place is None:
        return None
    module, slot, start = place
    part = None if slot is None else slot.parts.get(start + last)
    if slot is not None and part is not None:
        return _packed(slot, part, part.readings[0]) if part.kind == "whole" else (slot, part)
    tensor = module._parameters.get(last)
    return module._buffers.get(last) if tensor is None else tensor


def _module(model: nn.Module, path: str) -> Place | None:
    """The module at an original path. In a slot the way goes on in the original, so packed names lead nowhere."""
    module, slot, start = model, None, ""
    for step in path.split(".") if path else ():
        child = module._modules.get(step)
        if child is None:
            return None
        module, start = child, f"{start}{step}."
        found = module.__dict__.get(KEY)
        if found is not None and found.skeleton is not module:  # not one that was only rebound
            slot, module, start = found, found.skeleton, ""
    return module, slot, start


def _packed(slot: Slot, part: Part, reading: Reading) -> torch.Tensor:
    packed = _packed_or_none(slot, reading)
    if packed is None:
        raise GraftError(
            f"{part.name} is to be written into {slot.site.host}.{reading.packed}, which the graft put there and which "
            f"has been parametrized or pruned. Undo that first."
        )
    return packed


def _packed_or_none(slot: Slot, reading: Reading) -> torch.Tensor | None:
    try:
        return slot.packed(reading.packed)
    except KeyError:
        return None


def _parameters(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """Every original parameter, under each of its names if it is tied; None for what lies in pieces."""
    found: dict[str, torch.Tensor | None] = {}

    def collect(module: nn.Module, prefix: str, slot: Slot | None, local: str) -> None:
        here = module.__dict__.get(KEY)
        if here is not None and here.skeleton is not module:
            slot, module, local = here, here.skeleton, ""
        for name, tensor in module._parameters.items():
            part = None if slot is None else slot.parts.get(local + name)
            if slot is not None and part is not None:
                whole = part.kind == "whole"
                found[prefix + name] = _packed_or_none(slot, part.readings[0]) if whole else None
            elif tensor is not None:
                found[prefix + name] = tensor
        for name, child in module._modules.items():
            if child is not None:
                collect(child, f"{prefix}{name}.", slot, f"{local}{name}.")

    collect(model, "", None, "")
    return found


def _left(model: nn.Module, names: set[str]) -> list[str]:
    """The parameters that were written under none of their names."""
    known = _parameters(model)
    left = [name for name in known if name not in names]
    written = {id(known[name]) for name in names if known.get(name) is not None} if left else set()
    return [name for name in left if id(known[name]) not in written]


# --- what goes there


def _pairs(
    model: nn.Module, name: str, value: torch.Tensor, known: dict[str, Place | None] | None = None
) -> list[Pair]:
    """What must be copied for `name` to have `value`; `known` as for `_find`.

    Raises:
        GraftError: There is no such name, the value does not fit, or its place cannot be written.
        ConversionError: The packed parameters do not hold it.
    """
    place = _find(model, name, known)
    if place is None:
        raise GraftError(_unknown(model, name))
    if isinstance(place, torch.Tensor):
        _check_value(name, place.shape, value)
        return [_whole(name, place, value)]
    slot, part = place
    _check_value(name, part.shape, value)
    if part.kind == "lost":
        raise ConversionError(
            f"{name} cannot be updated: the packed parameters do not hold it, since {part.why}. Load the model again "
            f"with the new weights."
        )
    return [_piece(slot, part, reading, value) for reading in part.readings]


def _check_value(name: str, shape: Sequence[int], value: torch.Tensor) -> None:
    if not isinstance(value, torch.Tensor):
        raise GraftError(f"{name} comes as a {type(value).__name__}. Give a tensor.")
    if value.shape != shape:
        raise GraftError(f"{name} has shape {list(shape)}, and the update brings {list(value.shape)}.")
    if value.is_meta and not isinstance(value, LazyTensor):
        raise GraftError(f"{name} comes as a tensor on the meta device, which has no values. Give one that has.")


def _whole(name: str, tensor: torch.Tensor, value: torch.Tensor) -> Pair:
    if is_sharded(tensor):
        return (tensor, value) if is_sharded(value) else local_part(tensor, value)
    if is_sharded(value):
        raise GraftError(f"{name} comes as a DTensor, and the model has it whole. Give its full_tensor().")
    return _writable(name, tensor), value


def _piece(slot: Slot, part: Part, reading: Reading, value: torch.Tensor) -> Pair:
    """The view of a packed tensor in which a piece of an original lies, and the piece of its new values."""
    packed = _packed(slot, part, reading)
    if is_sharded(packed) or is_sharded(value):
        raise GraftError(
            f"{part.name} is part of {slot.site.host}.{reading.packed}, which a kernel packs, and one of the two is a "
            f"DTensor. Give full tensors (full_tensor()) to a model that is not distributed, or remove the graft first."
        )
    if isinstance(value, LazyTensor) and any(step[0] == "as_strided" for step in reading.place):
        value = value.materialize()  # of a file's tensor, a view of the mapped file
    piece = apply(reading.place, fit_for(reading.place, value)) if reading.place else value
    memory = _writable(part.name, packed)
    try:
        out = apply(reading.steps, memory)
    except (RuntimeError, IndexError) as error:
        raise GraftError(_repacked(slot, part, reading, packed)) from error
    if out.shape != piece.shape:
        raise GraftError(_repacked(slot, part, reading, packed))
    return out, piece


def _writable(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or its memory as one that can be written outside inference mode too."""
    if tensor.is_meta:
        raise GraftError(
            f"{name} cannot be updated: it is on the meta device, where the model was moved or offloaded to. Undo that "
            f"first; offloading by accelerate.hooks.remove_hook_from_submodules(model)."
        )
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        memory = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return memory.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _unknown(model: nn.Module, name: str) -> str:
    near = difflib.get_close_matches(name, list(_parameters(model)), n=3, cutoff=0.4)
    return f"{name!r} is no parameter of the model. Nearest: {', '.join(near) or 'none'}. Use the original names."


def _repacked(slot: Slot, part: Part, reading: Reading, packed: torch.Tensor) -> str:
    return (
        f"{part.name} is part of {slot.site.host}.{reading.packed}, which is no longer as the graft packed it: it has "
        f"shape {list(packed.shape)} and dtype {packed.dtype} now. Undo what replaced it, or remove the graft first."
    )
