"""The class of a grafted model: the model's, under its name, through which Transformers' switches reach the graft.

`model.use_kernels = False` removes it, moving the model moves it, and saving and pickling go by the original names.
"""

import functools
import weakref
from dataclasses import dataclass
from typing import Any

from torch import nn

from kernelgraft import compat
from kernelgraft.errors import GraftError
from kernelgraft.saving import save_pretrained

ROOT_KEY = "_kernelgraft_graft"
"""Name in the root's `__dict__` under which its `Graft` is kept."""

_roots: "weakref.WeakValueDictionary[type[nn.Module], type[nn.Module]]" = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class _RootMaker:
    original: type[nn.Module]

    def __call__(self) -> nn.Module:
        cls = root_class(self.original)
        return cls.__new__(cls)

    def __deepcopy__(self, memo: object) -> "_RootMaker":
        return self


def root_class(original: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the model's class, under the same name, through which `model.use_kernels = False` reaches us."""
    cls = _roots.get(original)
    if cls is None:
        namespace = {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "use_kernels": property(_get_use_kernels, _set_use_kernels),
            "set_use_kernels": set_use_kernels,
            "_apply": _apply_root,
            "__reduce_ex__": _reduce_root,
            "_kernelgraft_original": original,
        }
        if compat.is_pretrained_class(original):
            namespace["save_pretrained"] = _saver(original)
        cls = _roots.setdefault(original, type(original.__name__, (original,), namespace))
    return cls


def _get_use_kernels(_: nn.Module) -> bool:
    return True


def _set_use_kernels(self: nn.Module, value: bool) -> None:
    self.set_use_kernels(value)  # type: ignore[operator]


def set_use_kernels(self: nn.Module, use_kernels: bool, kernel_config: Any = None, mode: Any = None) -> None:  # noqa: ARG001 - the signature of Transformers
    """As Transformers' method: `False` removes the graft; `True` changes nothing on a model that is grafted already."""
    if not use_kernels:
        vars(self)[ROOT_KEY].remove()
    elif kernel_config is not None:
        raise GraftError(
            "The model is grafted already. Remove that graft first (model.use_kernels = False), then graft with the "
            "new config: kernelgraft.graft(model, kernel_config)."
        )


def _apply_root(self: nn.Module, fn: Any, recurse: bool = True) -> Any:
    graft: Any = vars(self).get(ROOT_KEY)
    parameter = next(self.parameters(), None)
    if graft is not None and parameter is not None and not parameter.is_meta:
        goes_to = fn(parameter.detach().new_empty(0)).device
        if goes_to.type not in (parameter.device.type, "meta"):
            graft.moved_to(goes_to)
    return type(self)._kernelgraft_original._apply(self, fn, recurse)  # type: ignore[attr-defined]


def _saver(original: Any) -> Any:
    @functools.wraps(original.save_pretrained)
    def save(self: nn.Module, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        save_pretrained(self, vars(self).get(ROOT_KEY), save_directory, *args, **kwargs)

    return save


def _reduce_root(self: nn.Module, _: Any) -> Any:
    return _RootMaker(type(self)._kernelgraft_original), (), self.__getstate__()  # type: ignore[attr-defined,no-untyped-call]
