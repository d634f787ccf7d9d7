"""The tree of a model's modules as plain data: classes, and the names and shapes of parameters."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from kernelgraft.slot import KEY, GraftedModule, Slot


@dataclass(frozen=True)
class Node:
    """One module.

    Attributes:
        name: Its name in its parent; "" for the model itself.
        class_name: Name of its class.
        parameters: Names and shapes of its own parameters, those of its children not among them.
        children: Its children.
    """

    name: str
    class_name: str
    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    children: tuple["Node", ...]


@dataclass(frozen=True)
class ModelTree:
    """The untouched model, whether kernels are in it or not.

    Attributes:
        root: The model.
        num_tensors: How many parameters it has; one that several modules share counts once.
        num_elements: How many elements they have.
    """

    root: Node
    num_tensors: int
    num_elements: int


def tree_of(model: nn.Module) -> ModelTree:
    """The tree of a model in original classes, names and shapes; a grafted one gives the tree that it had before."""
    seen: dict[object, int] = {}
    root = _node("", model, None, "", seen)
    return ModelTree(root, len(seen), sum(seen.values()))


def _node(name: str, module: nn.Module, slot: Slot | None, inside: str, seen: dict[object, int]) -> Node:
    """One module; within a slot's skeleton `inside` is where, and what was taken over has its shape from the parts."""
    if isinstance(module, GraftedModule):
        slot, inside = vars(module)[KEY], ""
        module = slot.skeleton
    taken = {} if slot is None else {key: tuple(part.shape) for key, part in slot.parts.items()}
    parameters = []
    for key, tensor in module._parameters.items():
        if tensor is not None:
            identity, shape = _identity(tensor, slot, inside + key, taken)
            parameters.append((key, shape))
            seen[identity] = torch.Size(shape).numel()
    children = tuple(
        _node(key, child, slot, f"{inside}{key}.", seen) for key, child in module._modules.items() if child is not None
    )
    return Node(name, type(module).__name__, tuple(parameters), children)


def _identity(
    tensor: torch.Tensor, slot: Slot | None, local: str, taken: Mapping[str, tuple[int, ...]]
) -> tuple[object, tuple[int, ...]]:
    """What makes a parameter the same as another, and its shape."""
    if slot is not None and local in taken:
        return (id(slot), local), taken[local]
    return id(tensor), tuple(tensor.shape)
