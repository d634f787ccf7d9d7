"""The part of a tensor that one rank of a mesh holds, by the placements of a `DTensor`."""

from typing import Any

import torch
from torch import nn

from kernelgraft.errors import CheckpointError

PLAIN = (torch.Tensor, nn.Parameter)
"""The types of an ordinary tensor, which is neither distributed nor lazy nor another subclass."""


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is a `DTensor`."""
    return type(tensor) not in PLAIN and hasattr(tensor, "device_mesh")


def local_part(target: Any, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The local tensor of a `DTensor`, and what of the full `value` belongs into it.

    Args:
        target: A `DTensor` whose placements are `Shard` and `Replicate`, split as `torch.chunk` does.
        value: The full tensor, lazy or not; it is only narrowed.

    Raises:
        CheckpointError: A placement is of another kind.
    """
    from torch.distributed.tensor import Replicate, Shard

    coordinate = target.device_mesh.get_coordinate()
    local = target.to_local()
    for mesh_dim, placement in enumerate(target.placements):
        if type(placement) is Replicate:
            continue
        if type(placement) is not Shard:
            raise CheckpointError(
                f"A parameter of shape {list(target.shape)} is distributed as {target.placements}, and a checkpoint is "
                f"read into Shard and Replicate only. Load the model before it is distributed that way."
            )
        size, dim = value.shape[placement.dim], placement.dim
        each = -(-size // target.device_mesh.size(mesh_dim))
        start = min(coordinate[mesh_dim] * each, size)
        value = value.narrow(dim, start, min(each, size - start))
    if value.shape != local.shape:
        raise CheckpointError(
            f"A parameter of shape {list(target.shape)} has the local shape {list(local.shape)} where its placements "
            f"{target.placements} say {list(value.shape)}. Load the model before it is distributed that way."
        )
    return local, value


def with_local(target: Any, local: torch.Tensor) -> torch.Tensor:
    """A `DTensor` distributed as `target` that holds `local`."""
    from torch.distributed.tensor import DTensor

    made: torch.Tensor = DTensor.from_local(
        local, target.device_mesh, target.placements, run_check=False, shape=target.shape, stride=target.stride()
    )
    return made
