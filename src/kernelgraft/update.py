"""New weights, under original names, written over those that a grafted model has.

Nothing is kept from one update to the next, nor from one tensor to the next. A name is looked up in torch's own
registries when its value comes, and the view of a packed tensor is made at that moment: what was moved, assigned or
replaced in the meantime is written where it is now, and no memory that the model has let go is held. That costs about
6 us a tensor, of which the copy of a tiny tensor takes 2, and listing the names that are left, which comes last, when a
GPU still copies, takes 0.3 (median; a Qwen3 of 36 layers with merged q/k/v and gate/up, hidden 64; 2 cores of an AMD
EPYC, lightly shared; torch 2.13.0+cpu, Python 3.11, 2026-11-29).
"""

import difflib
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernelgraft.checkpoint.files import Checkpoint
from kernelgraft.checkpoint.fill import check_unchanged, read
from kernelgraft.checkpoint.reader import check_readable
from kernelgraft.checkpoint.sharding import PLAIN, is_sharded, local_part
from kernelgraft.conversion.lazy import LazyTensor
from kernelgraft.conversion.part import Part, Reading, apply, fit_for
from kernelgraft.errors import ConversionError, GraftError
from kernelgraft.slot import KEY, Slot
from kernelgraft.tree import tensor_at

Weights = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | str | os.PathLike[str]
"""Tensors under original names, or the place of a checkpoint that has them."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""A view of the memory to write, and the values for it, lazy or not, in the same shape."""


def update(model: nn.Module, tensors: Weights) -> list[str]:
    """Write new weights into their places in a grafted model: see `Graft.update`."""
    if isinstance(tensors, str | os.PathLike):
        with Checkpoint.at(tensors if isinstance(tensors, str) else Path(tensors)) as checkpoint:
            return update(model, checkpoint)
    with torch.no_grad():
        names = _write_all(model, tensors) if isinstance(tensors, Mapping) else _write_each(model, tensors)
    return _left(model, names)


def _write_each(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Each tensor as it comes. Not even a lazy one is put off: its file may be closed before the next one comes."""
    names = set()
    for name, value in tensors:
        lazy = _write(model, name, value)
        if lazy:
            _read(lazy)
        names.add(name)
        del value, lazy  # or they would live until the next one is made
    return names


def _write_all(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """What is in memory as it comes, and then what is in files in one pass over them."""
    waiting: dict[object, list[Pair]] = {}
    names = set()
    for name, value in tensors.items():
        lazy = _write(model, name, value)
        if lazy or waiting:
            # Of the names of a tied parameter the last one counts.
            place = _find(model, name)
            waiting[id(place) if isinstance(place, torch.Tensor) else name] = lazy
        names.add(name)
        del value
    pairs = [pair for pairs in waiting.values() for pair in pairs]
    # Before the first is written over, all are read once.
    check_readable((lazy, out.detach()) for out, lazy in pairs if isinstance(lazy, LazyTensor))
    _read(pairs)
    return names


def _write(model: nn.Module, name: str, value: torch.Tensor) -> list[Pair]:
    """Write what is in memory; what is left is lazy.

    Nearly every value is an ordinary tensor for an ordinary one, or for rows of one, and few questions show that it is.
    `_pairs` knows all other cases, and what to say of a value that cannot be written.
    """
    place = _find(model, name)
    out = _rows(*place) if isinstance(place, tuple) else place
    if (
        out is not None
        and type(out) in PLAIN
        and type(value) in PLAIN
        and out.shape == value.shape
        and not (value.is_meta or out.is_meta or out.is_inference())
    ):
        # Not `non_blocking`: the caller may refill a pinned buffer as soon as this returns.
        out.copy_(value)
        return []
    lazy: list[Pair] = []
    for target, piece in _pairs(model, name, place, value):
        if isinstance(piece, LazyTensor):
            lazy.append((target, piece))
        else:
            target.copy_(piece)
    return lazy


def _rows(slot: Slot, part: Part) -> torch.Tensor | None:
    """The rows of a packed tensor that a part is, if it is just that and the tensor an ordinary one."""
    if part.kind != "view":
        return None
    (reading,) = part.readings
    if reading.place or len(reading.steps) != 1 or reading.steps[0][:2] != ("narrow", 0):
        return None
    packed = _packed(slot, part, reading)
    _, _, start, length = reading.steps[0]
    # An index takes two thirds of the time of `narrow`, and where there are not so many rows it gives fewer.
    rows = packed[start : start + length] if type(packed) in PLAIN and packed.dim() else None
    return rows if rows is not None and rows.shape == part.shape else None


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


def _find(model: nn.Module, name: str) -> torch.Tensor | tuple[Slot, Part] | None:
    """What an original name stands for: a whole tensor, or what lies in pieces of a slot's packed tensors; or nothing.

    In a slot the way goes on in the original, so packed names lead nowhere.
    """
    # An attribute of what has a `__getattr__`, as modules have, is slow to ask for: here it is one at each step.
    own = model.__dict__
    step, dot, rest = name.partition(".")
    while dot:
        child = own["_modules"].get(step)
        if child is None:
            return None
        own = child.__dict__
        slot = own.get(KEY)
        if slot is not None and slot.skeleton is not child:  # not one that was only rebound
            part = slot.parts.get(rest)
            if part is not None:
                return _packed(slot, part, part.readings[0]) if part.kind == "whole" else (slot, part)
            own = slot.skeleton.__dict__
        step, dot, rest = rest.partition(".")
    tensor: torch.Tensor | None = own["_parameters"].get(step)
    if tensor is None:
        tensor = own["_buffers"].get(step)
    return tensor


def _packed(slot: Slot, part: Part, reading: Reading) -> torch.Tensor:
    try:
        return slot.packed(reading.packed)
    except KeyError:
        raise GraftError(
            f"{part.name} is to be written into {slot.site.host}.{reading.packed}, which the graft put there and which "
            f"has been parametrized or pruned. Undo that first."
        ) from None


def _parameters(model: nn.Module, but: Container[str] = ()) -> dict[str, torch.Tensor | tuple[Slot, Part]]:
    """Every original parameter, under each of its names if it is tied, or the part that it is of packed ones.

    Args:
        model: The model.
        but: Names that are left out.
    """
    found: dict[str, torch.Tensor | tuple[Slot, Part]] = {}

    def collect(module: nn.Module, prefix: str) -> None:
        own = module.__dict__
        slot = own.get(KEY)
        if slot is not None and slot.skeleton is not module:
            for name in slot.names:
                if (path := prefix + name) not in but:
                    part = slot.parts.get(name)
                    found[path] = tensor_at(slot.skeleton, name) if part is None else (slot, part)
            return
        for name, tensor in own["_parameters"].items():
            if tensor is not None and (path := prefix + name) not in but:
                found[path] = tensor
        for name, child in own["_modules"].items():
            if child is not None:
                collect(child, f"{prefix}{name}.")

    collect(model, "")
    return found


def _left(model: nn.Module, names: set[str]) -> list[str]:
    """The parameters that were written under none of their names."""
    left = _parameters(model, but=names)
    written = {id(tensor) for name in names if (tensor := _whole_at(model, name)) is not None} if left else set()
    return [name for name, place in left.items() if id(_tensor(place)) not in written]


def _whole_at(model: nn.Module, name: str) -> torch.Tensor | None:
    """The one tensor, if there is one, that a name stands for the whole of."""
    try:
        place = _find(model, name)
    except GraftError:  # it was written, and has been parametrized or pruned since
        return None
    return None if isinstance(place, tuple) else place


def _tensor(place: torch.Tensor | tuple[Slot, Part]) -> torch.Tensor | None:
    """The one tensor, if there is one, of which a parameter is the whole."""
    if not isinstance(place, tuple):
        return place
    slot, part = place
    if part.kind != "whole":
        return None
    try:
        return slot.packed(part.packed[0])
    except KeyError:
        return None


# --- what goes there


def _pairs(
    model: nn.Module, name: str, place: torch.Tensor | tuple[Slot, Part] | None, value: torch.Tensor
) -> list[Pair]:
    """What must be copied for `name`, which stands for `place`, to have `value`.

    Raises:
        GraftError: There is no such name, the value does not fit, or its place cannot be written.
        ConversionError: The packed parameters do not hold it.
    """
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
    piece = value
    if reading.place:
        if isinstance(value, LazyTensor) and any(step[0] == "as_strided" for step in reading.place):
            value = value.materialize()  # of a file's tensor, a view of the mapped file
        piece = apply(reading.place, fit_for(reading.place, value))
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
