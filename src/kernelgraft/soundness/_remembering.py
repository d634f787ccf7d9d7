"""Operations on meta tensors, each worked out once for each form of its inputs.

Torch works most of their shapes out in Python, so that a layer takes longer on the meta device than on a few real
tokens; and all layers do the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

_PLAIN = (torch.Tensor, nn.Parameter)
_ATOMS = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class Remembering(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the block, what only makes new meta tensors makes them as it did for inputs of the same form.

    Anything else runs as ever: views, what writes in place, and whatever has to do with a tensor that is not on meta.
    """

    # Operations on functions come here too, and go on; without this they would be refused.
    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch shall hide this from dynamo: that would import it, and a check runs nothing compiled."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._is_for_us: dict[Any, bool] = {}
        self._made: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs the operation, or makes tensors like those that it made before."""
        kwargs = kwargs or {}
        if func not in self._is_for_us:
            self._is_for_us[func] = _makes_new_tensors(func)
        looks = _looks((*args, *kwargs, *kwargs.values())) if self._is_for_us[func] else None
        if looks is None:
            return func(*args, **kwargs)
        key = (func, torch.get_default_dtype(), looks)
        if key in self._made:
            new = [torch.empty_strided(*form, dtype=dtype, device="meta") for *form, dtype in self._made[key]]
            return new[0] if len(new) == 1 else tuple(new)
        result = func(*args, **kwargs)
        made = _looks(result if isinstance(result, tuple) else (result,))
        if made is not None:
            self._made[key] = made
        return result


def _makes_new_tensors(func: Any) -> bool:
    schema = getattr(func, "_schema", None)
    if schema is None or schema.is_mutable or not schema.returns:
        return False
    return all(str(each.type) == "Tensor" and each.alias_info is None for each in schema.returns)


def _looks(values: Sequence[Any]) -> tuple[Any, ...] | None:
    """All that an operation on the meta device can see of its arguments; `None` where there is more to see."""
    found: list[Any] = []
    for value in values:
        kind = type(value)
        if kind in _PLAIN:
            if not value.is_meta or value.layout is not torch.strided:
                return None
            found.append((value.shape, value.stride(), value.dtype))
        elif kind in _ATOMS:
            found.append((kind, value))
        elif kind in (list, tuple):
            inner = _looks(value)
            if inner is None:
                return None
            found.append((kind, inner))
        else:
            return None
    return tuple(found)
