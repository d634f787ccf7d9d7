"""What is in a module, read off torch's registries once, for all who ask while a graft is planned or made."""

from functools import cached_property
from typing import TypeVar

import torch
from torch import nn

Each = TypeVar("Each")


class Contents:
    """The modules and tensors in one module at one moment, by their names in it; what is put in later does not show.

    Attributes:
        module: The module itself.
        all_modules: Every module under all its names, the module itself first.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.all_modules: list[tuple[str, nn.Module]] = []
        _walk(module, "", self.all_modules)

    @cached_property
    def modules(self) -> list[tuple[str, nn.Module]]:
        """Every module once: as `named_modules()`."""
        return _once(self.all_modules)

    @cached_property
    def all_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter under all its names."""
        return {
            f"{path}.{name}" if path else name: tensor
            for path, module in self.all_modules
            for name, tensor in module._parameters.items()
            if tensor is not None
        }

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter once: as `named_parameters()`."""
        return dict(_once(list(self.all_parameters.items())))

    @cached_property
    def buffers(self) -> dict[str, torch.Tensor]:
        """Every buffer once: as `named_buffers()`."""
        found = [
            (f"{path}.{name}" if path else name, tensor)
            for path, module in self.all_modules
            if module._buffers
            for name, tensor in module._buffers.items()
            if tensor is not None
        ]
        return dict(_once(found))

    @cached_property
    def saved(self) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers under all their names: those of `state_dict()`, in its order."""
        if not self.buffers:
            return dict(self.all_parameters)
        found: dict[str, torch.Tensor] = {}
        for path, module in self.all_modules:
            prefix, unsaved = f"{path}." if path else "", module._non_persistent_buffers_set
            found |= {prefix + name: each for name, each in module._parameters.items() if each is not None}
            buffers = {name: each for name, each in module._buffers.items() if each is not None}
            found |= {prefix + name: each for name, each in buffers.items() if name not in unsaved}
        return found

    @cached_property
    def shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Names and shapes of all parameters and buffers, to compare."""
        named = (*self.parameters.items(), *self.buffers.items())
        return tuple([(name, tensor.shape) for name, tensor in named])


def joined(path: str, name: str) -> str:
    """The name of what is called `name` in the module at `path`; "" is the module itself, or the root."""
    return f"{path}.{name}" if path and name else path or name


def _walk(module: nn.Module, path: str, found: list[tuple[str, nn.Module]]) -> None:
    found.append((path, module))
    for name, child in module._modules.items():
        if child is not None:
            _walk(child, f"{path}.{name}" if path else name, found)


def _once(named: list[tuple[str, Each]]) -> list[tuple[str, Each]]:
    """Each object once, under its first name."""
    ids = {id(each) for _, each in named}
    if len(ids) == len(named):
        return named
    first: dict[int, tuple[str, Each]] = {}
    for name, each in named:
        first.setdefault(id(each), (name, each))
    return list(first.values())
