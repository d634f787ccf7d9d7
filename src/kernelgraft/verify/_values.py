"""Arguments and results as named tensors: found, replaced and copied wherever they lie.

A name is how one would write it: `hidden_states`, `position_embeddings[0]`, `cache.layers[1].keys`.
"""

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

Change = Callable[[str, torch.Tensor], Any]

_SHARED = (str, bytes, int, float, bool, complex, type(None), type, torch.device, torch.Size, nn.Module)
_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)


class Rebuilder:
    """Makes copies of values in which other tensors stand for those that are there; what is one object stays one.

    Objects that a module may write into, such as a cache of keys and values, are copied too; modules, functions and
    configs are not.

    Args:
        change: Gives what stands for a tensor of a name.
        dtype: What stands for a floating dtype that an object has noted.
    """

    def __init__(self, change: Change, dtype: torch.dtype | None = None) -> None:
        self.change, self.dtype = change, dtype
        self.done: dict[int, Any] = {}
        self.kept: list[Any] = []  # so that no id is given out again

    def copy(self, value: Any, name: str) -> Any:
        """A copy of `value`, which is called `name`."""
        if isinstance(value, (*_SHARED, *_FUNCTIONS)):
            return value
        if isinstance(value, torch.dtype):
            return self.dtype if self.dtype is not None and value.is_floating_point else value
        if id(value) not in self.done:
            self.kept.append(value)
            self.done[id(value)] = self._made(value, name)
        return self.done[id(value)]

    def _made(self, value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            return self.change(name, value)
        if isinstance(value, tuple | list):
            items = [self.copy(item, f"{name}[{index}]") for index, item in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, dict):
            new = _bare(value)
            for key, item in value.items():
                new[key] = self.copy(item, _item(name, key))
            return new
        if not hasattr(value, "__dict__") or type(value).__name__.endswith("Config"):
            return value
        new = _bare(value)
        self.done[id(value)] = new
        for key, item in vars(value).items():
            vars(new)[key] = self.copy(item, f"{name}.{key}")
        return new


def _bare(value: Any) -> Any:
    """Another object of the same class and attributes. `copy.copy` would leave a note in the class."""
    cls: Any = type(value)
    new = cls.__new__(cls)
    if hasattr(value, "__dict__"):
        vars(new).update(vars(value))
    return new


def _item(name: str, key: Any) -> str:
    return f"{name}.{key}" if isinstance(key, str) and key.isidentifier() else f"{name}[{key!r}]"


def named(value: Any, name: str) -> dict[str, torch.Tensor]:
    """The tensors in `value` by name, those inside objects among them; one that is there twice has its first name."""
    found: dict[str, torch.Tensor] = {}

    def note(name: str, tensor: torch.Tensor) -> torch.Tensor:
        found[name] = tensor
        return tensor

    Rebuilder(note).copy(value, name)
    return found


def direct(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in the tuples, lists and dicts of `value`, and none that an object holds."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from direct(item, f"{name}[{index}]")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from direct(item, _item(name, key))


def copied(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A copy with memory of its own and the same strides, so that it looks to a kernel as the real one does.

    Args:
        tensor: What to copy; detached.
        dtype: The floating dtype of the copy, if `tensor` is floating. What a narrower one cannot hold becomes the
            largest number that it can, as masks of the lowest number mean it.
    """
    tensor = tensor.detach()
    dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    # Of a large tensor the place inside it says nothing more than how it is aligned.
    return laid_out(_held(tensor, dtype), tensor.stride(), int(tensor.storage_offset()) % 64)


def laid_out(tensor: torch.Tensor, strides: Sequence[int], offset: int) -> torch.Tensor:
    """A copy with memory of its own, in other strides and that many elements behind the memory's start."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    memory = torch.zeros(offset + (extent if tensor.numel() else 0), dtype=tensor.dtype, device=tensor.device)
    # Not a view of the memory: autograd lets what it takes for one be written into in fewer cases.
    new = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    new.set_(memory.untyped_storage(), offset, tensor.shape, strides)
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)
    new[once].copy_(tensor[once])
    return new


def _held(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if tensor.dtype == dtype or not dtype.is_floating_point:
        return tensor
    info = torch.finfo(dtype)
    if info.max < torch.finfo(tensor.dtype).max:
        tensor = torch.where(tensor.isinf(), tensor, tensor.clamp(info.min, info.max))
    return tensor.to(dtype)


def spelt(tensors: Mapping[str, torch.Tensor]) -> str:
    """Tensors as a report shows them: `hidden_states bfloat16[2, 24, 576]`."""
    return ", ".join(f"{name} {str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for name, t in tensors.items())
