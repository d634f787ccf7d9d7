"""Function kernels: a plain function that a module's forward calls, replaced for this model's instances alone.

A forward reads such a function as a global of its module, shared by the whole process. So the process-wide function is
not touched: the instance's class gets a copy of the forward that has globals of its own.
"""

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from kernelgraft.errors import PlanError
from kernelgraft.kernel import Kernel


def called_functions(cls: type[nn.Module]) -> dict[str, Any]:
    """The functions that the forward of `cls` reads as globals, by their global names.

    The `kernels` library turns a function that a kernel may replace into a module; those count too.
    """
    forward = inspect.unwrap(cls.forward)
    if not isinstance(forward, types.FunctionType):
        return {}
    found = {name: forward.__globals__.get(name) for name in _global_names(forward.__code__)}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, types.FunctionType) or (isinstance(value, nn.Module) and _layer_name(value))
    }


def _global_names(code: types.CodeType) -> list[str]:
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _global_names(constant)
    return list(dict.fromkeys(names))


def _layer_name(function: Any) -> str | None:
    return getattr(function, "kernel_layer_name", None)


def find_functions(modules: Mapping[str, nn.Module], name: str) -> dict[str, str]:
    """Paths of the modules whose forward calls the function that `name` means, and its global name there.

    `name` is the function's `kernel_layer_name`, its own name, or its own name without `apply_`.
    """
    by_class: dict[type, str | None] = {}
    found = {}
    for path, module in modules.items():
        cls = type(module)
        if cls not in by_class:
            functions = called_functions(cls).items()
            by_class[cls] = next(
                (key for key, value in functions if _layer_name(value) == name or key in (name, f"apply_{name}")), None
            )
        key = by_class[cls]
        if path and key is not None:
            found[path] = key
    return found


def function_of(kernel: Kernel) -> Callable[..., Any]:
    """What a function kernel calls: its function, or the forward of its stateless class."""
    if kernel.function is not None:
        return kernel.function
    assert kernel.forward_class is not None
    return kernel.forward_class().forward  # type: ignore[no-any-return]


def check_function(kernel: Kernel, original: Any, name: str) -> None:
    """Refuse a function kernel that cannot take what the original function takes.

    Raises:
        PlanError: With both signatures.
    """
    ours = inspect.signature(function_of(kernel))
    theirs = inspect.signature(original.forward if isinstance(original, nn.Module) else original)
    required = [
        p.name for p in theirs.parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    try:
        ours.bind(*required)
    except TypeError as error:
        raise PlanError(
            f"{kernel.name}{ours} cannot stand for {name}{theirs}: {error}. Give the kernel the original's parameters."
        ) from error


def with_globals(forward: Callable[..., Any], replacements: Mapping[str, Any]) -> Callable[..., Any]:
    """A copy of a forward in whose globals `replacements` stand; what it is decorated with is copied around it.

    `__name__` is left out of the copied globals: by it torch.compile would find, and guard on, the real module.
    """
    assert isinstance(forward, types.FunctionType)
    inner = getattr(forward, "__wrapped__", None)
    if inner is None:
        own = {name: value for name, value in forward.__globals__.items() if name != "__name__"}
        return _copy(forward, {**own, **replacements}, forward.__closure__)
    cells = forward.__closure__ or ()
    if not any(cell.cell_contents is inner for cell in cells):
        raise PlanError(
            f"{forward.__qualname__} is decorated by something that keeps the function out of sight, so the functions "
            f"that it calls cannot be replaced. Leave them out of the config."
        )
    new = with_globals(inner, replacements)
    closure = tuple(types.CellType(new) if cell.cell_contents is inner else cell for cell in cells)
    copy = _copy(forward, forward.__globals__, closure)
    copy.__dict__.update(forward.__dict__, __wrapped__=new)
    return copy


def _copy(
    function: types.FunctionType, its_globals: dict[str, Any], closure: tuple[types.CellType, ...] | None
) -> types.FunctionType:
    copy = types.FunctionType(function.__code__, its_globals, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__qualname__ = function.__qualname__
    return copy
