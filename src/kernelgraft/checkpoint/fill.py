"""Lazy tensors turned into the parameters and buffers of a model."""

from collections.abc import Mapping

import torch
from torch import nn

from kernelgraft.conversion.lazy import LazyTensor
from kernelgraft.errors import CheckpointError
from kernelgraft.recording import arguments_of
from kernelgraft.slot import put_tensor, tensor_at


def materialize(model: nn.Module) -> None:
    """Give every parameter and buffer of `model` that is still lazy its bytes."""
    for module in model.modules():
        for registry in (module._parameters, module._buffers):
            for name, tensor in registry.items():
                if isinstance(tensor, LazyTensor):
                    registry[name] = tensor.resolved()  # type: ignore[assignment]


def check_names(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that are not exactly the model's.

    Raises:
        CheckpointError: Names are missing or unexpected, or shapes differ; all of them are listed.
    """
    state = model.state_dict(keep_vars=True)
    same: dict[int, list[str]] = {}
    for name, tensor in state.items():
        same.setdefault(id(tensor), []).append(name)
    # Of parameters that are tied, safetensors keeps one.
    missing = [name for name, tensor in state.items() if not any(each in tensors for each in same[id(tensor)])]
    unexpected = [name for name in tensors if name not in state]
    wrong = [
        f"{name} (model {list(tensor.shape)}, checkpoint {list(tensors[name].shape)})"
        for name, tensor in state.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    if any(found.values()):
        listed = "; ".join(f"{what}: {', '.join(names[:10])}" for what, names in found.items() if names)
        raise CheckpointError(
            f"The checkpoint does not fit {type(model).__name__}: {listed}. It must have the names and shapes of "
            f"model.state_dict()."
        )


def fill_from(model: nn.Module, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Give `model` the values of `tensors`: in place where it has values, else as lazy or plain parameters.

    Args:
        model: The model; what of it is on the meta device gets new parameters.
        tensors: Tensors by the names of `model.state_dict()`; lazy ones stay lazy until `materialize`.
        device: Where new parameters shall be.

    Raises:
        CheckpointError: A non-persistent buffer on the meta device cannot be made again.
    """
    remade = {name: _remake(model, name) for name in _unsaved_on_meta(model)}
    made: dict[int, torch.Tensor] = {}
    for name, target in model.state_dict(keep_vars=True).items():
        if id(target) in made:
            put_tensor(model, name, made[id(target)])
        elif name in tensors and target.is_meta:
            made[id(target)] = _as_in(target, tensors[name].to(device=device, dtype=target.dtype))
            put_tensor(model, name, made[id(target)])
        elif name in tensors:
            with torch.no_grad():
                target.copy_(tensors[name])
    for name, buffer in remade.items():
        put_tensor(model, name, buffer.to(device))


def _as_in(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(value, requires_grad=target.requires_grad) if isinstance(target, nn.Parameter) else value


def _unsaved_on_meta(model: nn.Module) -> list[str]:
    saved = model.state_dict(keep_vars=True)
    return [name for name, buffer in model.named_buffers() if name not in saved and buffer.is_meta]


def _remake(model: nn.Module, name: str) -> torch.Tensor:
    """A buffer that no checkpoint has, from building its module once more on the CPU."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    arguments = arguments_of(module)
    if arguments is None:
        raise CheckpointError(
            f"{name} is a non-persistent buffer on the meta device: no checkpoint has it. Build the model inside `with "
            f"kernelgraft.recorded():`, so that {type(module).__name__} can be made again, or build it on the CPU."
        )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        again = type(module)(*arguments.args, **arguments.kwargs)
    return tensor_at(again, last)
