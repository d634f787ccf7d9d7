"""The operations of plain-data rules (`packing`), by name: each is a small function on tensors, lazy or not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernelgraft.errors import ConversionError

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        run: The function: the tensors so far, then the arguments; it returns the tensors after it.
        arguments: Name and type of each argument.
        example: How it is written.
        defaults: Values for the arguments that may be left out at the end.
        merges: Whether it takes any number of tensors and makes one of them.
    """

    run: Callable[..., torch.Tensor]
    arguments: tuple[tuple[str, type], ...]
    example: str
    defaults: tuple[Any, ...] = ()
    merges: bool = False


def _interleave(tensors: Tensors, dim: int) -> torch.Tensor:
    """Row i of every tensor, then row i + 1 of every tensor."""
    dim = dim % tensors[0].ndim
    return torch.stack(tensors, dim + 1).flatten(dim, dim + 1)


def _chunk(tensor: torch.Tensor, index: int, count: int, dim: int) -> torch.Tensor:
    size = tensor.shape[dim]
    if count < 1 or size % count or not 0 <= index < count:
        raise ValueError(f"dim {dim} of size {size} has no chunk {index} of {count} equal ones")
    return tensor.narrow(dim, index * (size // count), size // count)


def _slice(tensor: torch.Tensor, dim: int, start: int, stop: int) -> torch.Tensor:
    if not 0 <= start < stop <= tensor.shape[dim]:
        raise ValueError(f"dim {dim} of size {tensor.shape[dim]} has no slice {start}:{stop}")
    return tensor.narrow(dim, start, stop - start)


def _squeeze(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    if tensor.shape[dim] != 1:
        raise ValueError(f"dim {dim} has size {tensor.shape[dim]}, and only one of size 1 can be squeezed")
    return tensor.squeeze(dim)


def _cast(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"torch has no dtype {dtype!r}")
    return tensor.to(found)


OPERATIONS: dict[str, Operation] = {
    "concatenate": Operation(
        lambda tensors, dim: torch.cat(tensors, dim), (("dim", int),), '["concatenate", 0]', (0,), merges=True
    ),
    "stack": Operation(
        lambda tensors, dim: torch.stack(tensors, dim), (("dim", int),), '["stack", 0]', (0,), merges=True
    ),
    "interleave": Operation(_interleave, (("dim", int),), '["interleave", 0]', (0,), merges=True),
    "transpose": Operation(torch.transpose, (("dim0", int), ("dim1", int)), '["transpose", 0, 1]'),
    "permute": Operation(torch.permute, (("dims", list),), '["permute", [1, 0, 2]]'),
    "reshape": Operation(torch.reshape, (("shape", list),), '["reshape", [-1, 64]]'),
    "chunk": Operation(_chunk, (("index", int), ("count", int), ("dim", int)), '["chunk", 0, 3, 0]', (0,)),
    "slice": Operation(_slice, (("dim", int), ("start", int), ("stop", int)), '["slice", 0, 0, 64]'),
    "unsqueeze": Operation(torch.unsqueeze, (("dim", int),), '["unsqueeze", 0]'),
    "squeeze": Operation(_squeeze, (("dim", int),), '["squeeze", 0]'),
    "cast": Operation(_cast, (("dtype", str),), '["cast", "float32"]'),
}


def read_operation(written: Any, where: str) -> tuple[str, tuple[Any, ...]]:
    """Checks one operation of a `packing` entry.

    Args:
        written: What the entry says, such as `["transpose", 0, 1]`.
        where: The entry, for the message.

    Returns:
        Its name, and all its arguments with defaults filled in.

    Raises:
        ConversionError: If there is no such operation, or it takes other arguments.
    """
    if not isinstance(written, (list, tuple)) or not written or not isinstance(written[0], str):
        raise ConversionError(f'{where} has the operation {written!r}; write a list such as ["transpose", 0, 1].')
    name, *arguments = written
    operation = OPERATIONS.get(name)
    if operation is None:
        raise ConversionError(f"{where} has the operation {name!r}; the known ones are {', '.join(OPERATIONS)}.")
    missing = len(operation.arguments) - len(arguments)
    if 0 < missing <= len(operation.defaults):
        arguments += operation.defaults[-missing:]
    if len(arguments) != len(operation.arguments) or not all(map(_is_a, arguments, operation.arguments)):
        wanted = ", ".join(f"{argument} ({kind.__name__})" for argument, kind in operation.arguments)
        raise ConversionError(
            f"{where} has {list(written)!r}, and {name!r} takes {wanted}; write it like {operation.example}."
        )
    return name, tuple(tuple(a) if isinstance(a, list) else a for a in arguments)


def _is_a(value: Any, argument: tuple[str, type]) -> bool:
    kind = argument[1]
    if kind is list:
        return isinstance(value, (list, tuple)) and all(_is_a(item, ("", int)) for item in value)
    return isinstance(value, kind) and not isinstance(value, bool)


def run_operation(name: str, arguments: Sequence[Any], tensors: Tensors, where: str) -> Tensors:
    """Runs one operation that `read_operation` accepted.

    Returns:
        One tensor if the operation merges; otherwise one for each that was given.

    Raises:
        ConversionError: If the tensors' shapes do not allow it.
    """
    operation = OPERATIONS[name]
    try:
        if operation.merges:
            return [operation.run(tensors, *arguments)]
        return [operation.run(tensor, *arguments) for tensor in tensors]
    except (RuntimeError, IndexError, ValueError) as error:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
        raise ConversionError(
            f"{where}: {[name, *arguments]!r} cannot be done on tensors of shape {shapes}: {error}. "
            f"Correct the operation or the names of its sources; it is written like {operation.example}."
        ) from error
