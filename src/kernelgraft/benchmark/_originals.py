"""What stood in the model before the graft, beside it and on the same memory: what a kernel is timed against.

`Graft.reference` runs originals through slots, which make a view of each parameter at each call. That takes time which
the original never took, and would flatter the kernel.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from kernelgraft.conversion.program import Part
from kernelgraft.graft import Graft
from kernelgraft.slot import CALL_HOOKS, KEY, GraftedModule, Slot
from kernelgraft.tree import put_tensor, shallow_tree, tensor_at

_CALLED_WITH = (*CALL_HOOKS, "_is_full_backward_hook", "gradient_checkpointing", "_gradient_checkpointing_func")
"""What stands on a slot and acts on each call of it, so that it has to act on the original too."""


def original_of(module: nn.Module) -> nn.Module:
    """The original behind a module of a graft, with parameters of its own on the packed parameters' memory.

    A part that is no contiguous view of a packed parameter is a copy, as it would be in the model.
    """
    slot: Slot = vars(module)[KEY]
    is_slot = isinstance(module, GraftedModule)
    new = shallow_tree(slot.skeleton if is_slot else module)
    if is_slot:
        for name in _CALLED_WITH:
            if name in vars(module):
                vars(new)[name] = vars(module)[name]
        for name, part in slot.parts.items():
            put_tensor(new, name, _original(slot, name, part))
    else:
        for name in (KEY, "forward"):
            vars(new).pop(name, None)
        new.__class__ = type(module)._kernelgraft_maker.original  # type: ignore[attr-defined]
    _replace_slots(new)
    return new


def _replace_slots(tree: nn.Module) -> None:
    for name, child in tree._modules.items():
        if child is not None and KEY in vars(child):
            tree._modules[name] = original_of(child)
        elif child is not None:
            _replace_slots(child)


def _original(slot: Slot, name: str, part: Part) -> torch.Tensor:
    if part.kind == "whole":
        return slot.packed(part.packed[0])
    value = slot.lost[name] if name in slot.lost else part.read(slot.packed).detach().contiguous()
    if not isinstance(tensor_at(slot.skeleton, name), nn.Parameter):
        return value
    packed = [slot.packed(each) for each in part.packed]
    return nn.Parameter(value, any(each.requires_grad for each in packed))


def originals_of(graft: Graft) -> dict[str, nn.Module]:
    """The originals of a graft by path; those inside others are in those."""
    modules = {path: module for each in graft._installed for path, module in each.modules.items()}
    return {path: original_of(module) for path, module in modules.items() if not _is_inside(path, modules)}


def _is_inside(path: str, others: Mapping[str, nn.Module]) -> bool:
    while "." in path:
        path = path.rpartition(".")[0]
        if path in others:
            return True
    return False


@contextmanager
def originals_in(model: nn.Module, originals: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside the block the originals stand in the model."""
    grafted = {path: model.get_submodule(path) for path in originals}
    try:
        _put(model, originals)
        yield
    finally:
        _put(model, grafted)


def _put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._modules[name] = module
