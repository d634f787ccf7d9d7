"""Module trees as plain registries: tensors by dotted name, and shallow copies into which others can be put."""

import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_ACCELERATE = ("forward", "_old_forward", "_hf_hook")


def module_at(module: nn.Module, path: str) -> nn.Module:
    """The module at `path` in `module`, read from torch's registries alone."""
    for step in path.split(".") if path else ():
        child = module._modules[step]
        assert child is not None
        module = child
    return module


def ancestors(path: str) -> Iterator[str]:
    """The paths of the modules around the one at `path`, the nearest first, but for the root."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def tensor_at(module: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer called `name` in `module`, read from torch's registries alone."""
    path, _, last = name.rpartition(".")
    if path:
        module = module_at(module, path)
    tensor: torch.Tensor | None = module._parameters.get(last)
    if tensor is None:
        tensor = module._buffers[last]
    assert tensor is not None
    return tensor


def put_tensor(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put `tensor` where `module` has the parameter or buffer called `name`, whatever its class thinks of it."""
    path, _, last = name.rpartition(".")
    if path:
        module = module_at(module, path)
    registry: dict[str, Any] = module._buffers if last in module._buffers else module._parameters
    registry[last] = tensor


def parameter_names(module: nn.Module, prefix: str = "") -> tuple[str, ...]:
    """The names that `named_parameters(remove_duplicate=False)` gives, read from torch's registries alone."""
    found = tuple(prefix + name for name, tensor in module._parameters.items() if tensor is not None)
    for name, child in module._modules.items():
        if child is not None:
            found += parameter_names(child, f"{prefix}{name}.")
    return found


def saved_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers under the names of `state_dict()`, whose hooks are not run."""
    found: dict[str, torch.Tensor] = {}
    for path, each in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        saved = {k: v for k, v in each._buffers.items() if k not in each._non_persistent_buffers_set}
        found |= {prefix + k: v for k, v in (*each._parameters.items(), *saved.items()) if v is not None}
    return found


def shallow_tree(module: nn.Module) -> nn.Module:
    """A new tree of the same modules that shares everything but the dicts, in which tensors can be put freely.

    Bound methods kept in attributes are bound to the copy. Accelerate's hook on a module is left out: the slot carries
    it. So is what `Module.compile` keeps: it would run the module itself.
    """
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__.update(module.__dict__)
    copy.__dict__.pop("_compiled_call_impl", None)
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
