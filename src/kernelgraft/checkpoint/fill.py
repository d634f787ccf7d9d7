"""Lazy tensors turned into the parameters and buffers of a model."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from kernelgraft.conversion.lazy import LazyTensor
from kernelgraft.errors import CheckpointError
from kernelgraft.recording import arguments_of
from kernelgraft.tree import put_tensor, saved_tensors, tensor_at


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
        CheckpointError: Names are missing or unexpected, or shapes differ; one error lists them all.
    """
    state = saved_tensors(model)
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
        listed = "; ".join(f"{what}: {_some(names)}" for what, names in found.items() if names)
        raise CheckpointError(
            f"The checkpoint does not fit {type(model).__name__}: {listed}. It must have the names and shapes of "
            f"model.state_dict()."
        )


def _some(names: Sequence[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def fill_from(model: nn.Module, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Give `model` the values of `tensors`: in place where it has values, else as lazy or plain parameters.

    Args:
        model: The model; what of it is on the meta device gets new parameters.
        tensors: What `check_names` has let through; lazy tensors stay lazy until `materialize`.
        device: Where new parameters shall be.

    Raises:
        CheckpointError: A non-persistent buffer on the meta device cannot be made again.
    """
    remade = _remade(model)
    state = saved_tensors(model)
    # Of parameters that are tied, a checkpoint may have any one.
    values = {id(state[name]): tensor for name, tensor in tensors.items()}
    made: dict[int, torch.Tensor] = {}
    for name, target in state.items():
        value = values[id(target)]
        if not target.is_meta:
            with torch.no_grad():
                target.copy_(value)
            continue
        if id(target) not in made:
            made[id(target)] = _as_in(target, value.to(device=device, dtype=target.dtype))
        put_tensor(model, name, made[id(target)])
    for name, buffer in remade.items():
        put_tensor(model, name, buffer.to(device))


def _as_in(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(value, requires_grad=target.requires_grad) if isinstance(target, nn.Parameter) else value


def _unsaved_on_meta(model: nn.Module) -> list[str]:
    saved = saved_tensors(model)
    return [name for name, buffer in model.named_buffers() if name not in saved and buffer.is_meta]


def _remade(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that no checkpoint has and that are on meta, from building their modules once more on the CPU."""
    again: dict[str, nn.Module] = {}
    found = {}
    for name in _unsaved_on_meta(model):
        path, _, last = name.rpartition(".")
        if path not in again:
            again[path] = _built_again(model.get_submodule(path), name)
        found[name] = tensor_at(again[path], last)
    return found


def _built_again(module: nn.Module, name: str) -> nn.Module:
    arguments = arguments_of(module)
    if arguments is None:
        raise CheckpointError(
            f"{name} is a non-persistent buffer on the meta device: no checkpoint has it. Build the model inside `with "
            f"kernelgraft.recorded():`, so that {type(module).__name__} can be made again, or build it on the CPU."
        )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return type(module)(*arguments.args, **arguments.kwargs)
