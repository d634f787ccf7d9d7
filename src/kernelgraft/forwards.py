"""The forwards of grafted modules: which kernel runs in which mode, and when the originals do.

A forward reads what it needs off the class's key and the instance's slot, so that all instances of a class share it.
"""

import inspect
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from kernelgraft.errors import GraftError
from kernelgraft.functions import function_of, with_globals
from kernelgraft.kernel import Kernel
from kernelgraft.signature import adapted_forward
from kernelgraft.slot import Site, Slot

if TYPE_CHECKING:
    from kernelgraft.binding import ClassKey

Mode = tuple[bool, bool]
"""`(training, compiling)`."""


def kernel_forward(key: "ClassKey") -> Callable[..., Any]:
    """The forward of a host: the kernel's for the mode, or the original's where that was allowed."""
    original = key.original.forward
    runs = {(training, compiling): adapted_forward(kernel, key.original) for training, compiling, kernel in key.modes}
    names = {(training, compiling): kernel.name for training, compiling, kernel in key.modes}
    supports = {(training, compiling): kernel.supports for training, compiling, kernel in key.modes}
    if key.role == "function":
        runs, names = _function_forwards(key)
        supports = dict.fromkeys(runs)
    note_trace = _trace_counter(key)
    rebound = key.role != "host"

    def run_original(self: nn.Module, args: Any, kwargs: Any) -> Any:
        if rebound:
            return original(self, *args, **kwargs)
        slot: Any = self._kernelgraft
        return slot.reference(*args, **kwargs)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        site: Site = self._kernelgraft.site  # type: ignore[assignment,union-attr]
        compiling = torch.compiler.is_compiling()
        mode = (self.training, compiling)
        if site.runs_originals(self.training):
            if not site.may_run_originals(self.training):
                raise GraftError(_why_not(site, names, mode))
            _count_reference(site)
            return run_original(self, args, kwargs)
        if site.refused:
            site.refused.discard(_thread())
        supported = supports[mode]
        if supported is not None:
            answer = _ask(supported, site, args, kwargs)
            if answer is not True:
                return _run_refused(self, site, args, kwargs, f"{names[mode]} refuses the call: {answer}", run_original)
        if compiling:
            note_trace()
        else:
            site.kernel_calls += 1
        out = runs[mode](self, *args, **kwargs)
        if torch.is_grad_enabled() and not site.has_no_gradient and _lost_gradient(self, args, kwargs, out):
            return _judge_gradient(self, site, args, kwargs, out, names[mode], run_original)
        return out

    shown: Any = key.modes[0][2].forward_class if key.modes else key.original
    forward.__name__, forward.__qualname__ = "forward", f"{shown.__qualname__}.forward"
    forward.__doc__ = shown.forward.__doc__
    forward.__signature__ = inspect.signature(shown.forward)  # type: ignore[attr-defined]
    return forward


def _function_forwards(key: "ClassKey") -> tuple[dict[Mode, Callable[..., Any]], dict[Mode, str]]:
    """The original's forward for each mode, calling the function kernels of that mode."""
    by_mode: dict[Mode, dict[str, Kernel]] = {}
    for name, modes in key.functions:
        for training, compiling, kernel in modes:
            by_mode.setdefault((training, compiling), {})[name] = kernel
    runs = {
        mode: with_globals(key.original.forward, {name: function_of(kernel) for name, kernel in kernels.items()})
        for mode, kernels in by_mode.items()
    }
    return runs, {mode: "|".join(kernel.name for kernel in kernels.values()) for mode, kernels in by_mode.items()}


def absorbed_forward(key: "ClassKey") -> Callable[..., Any]:
    """The forward of a module that a fusion absorbed: its input, untouched, or what the original makes of it."""
    parameters = list(inspect.signature(key.original.forward).parameters)[1:]
    first = parameters[0] if parameters else ""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        slot: Slot = self._kernelgraft  # type: ignore[assignment]
        site = slot.site
        if site.runs_originals(self.training) or (slot.is_behind and _thread() in site.refused):
            return slot.reference(*args, **kwargs)
        return args[0] if args else kwargs[first]

    return forward


def _count_reference(site: Site) -> None:
    if not torch.compiler.is_compiling():
        site.reference_calls += 1


def _run_refused(
    self: nn.Module, site: Site, args: Any, kwargs: Any, why: str, run_original: Callable[..., Any]
) -> Any:
    """The kernel refused this very call: the originals do the work, if that was allowed."""
    if site.fallback != "reference":
        raise GraftError(f"At {site.host!r}: {why}. {_FALLBACK_HINT}")
    site.refused.add(_thread())
    _count_reference(site)
    return run_originals(self, args, kwargs, run_original)


def run_originals(self: nn.Module, args: Any, kwargs: Any, run_original: Callable[..., Any]) -> Any:
    """The host's original on what its predecessors' originals give.

    What flows into the host has passed through its absorbed slots untouched by now, so their originals run here; those
    behind the host see that the call was refused and run their own.
    """
    for slot in self._kernelgraft.before:  # type: ignore[union-attr]
        if args:
            args = (slot.reference(args[0]), *args[1:])
        else:
            first = next(iter(kwargs))
            kwargs = {**kwargs, first: slot.reference(kwargs[first])}
    return run_original(self, args, kwargs)


def _judge_gradient(
    self: nn.Module, site: Site, args: Any, kwargs: Any, out: Any, name: str, run_original: Callable[..., Any]
) -> Any:
    """The kernel's output has no gradient. Whether it should, the originals' output tells."""
    compiling = torch.compiler.is_compiling()
    expected = run_originals(self, args, kwargs, run_original)
    if not _has_gradient(expected):
        if not compiling:
            site.has_no_gradient = True
        return out
    why = f"{name} gives outputs without a gradient"
    if not compiling:
        site.declined = why
    if site.fallback != "reference":
        raise GraftError(f"At {site.host!r}: {why}. {_FALLBACK_HINT}")
    site.refused.add(_thread())
    _count_reference(site)
    return expected


_FALLBACK_HINT = (
    'Pass KernelConfig(..., fallback="reference") to let the original forward run in such a case, or remove the graft.'
)


def _why_not(site: Site, names: Mapping[tuple[bool, bool], str], mode: tuple[bool, bool]) -> str:
    if site.declined:
        return f"At {site.host!r}: {site.declined}, and gradients are asked for. {_FALLBACK_HINT}"
    training, compiling = mode
    wanted = ("training" if training else "inference") + (" under torch.compile" if compiling else "")
    have = ", ".join(
        f"{name} for {'training' if t else 'inference'}{' under torch.compile' if c else ''}"
        for (t, c), name in names.items()
    )
    return f"At {site.host!r} there is no kernel for {wanted}; there is {have or 'none'}. {_FALLBACK_HINT}"


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _ask(supports: Callable[..., bool | str], site: Site, args: Any, kwargs: Any) -> bool | str:
    """What the kernel says of this call; a call that looks like the last accepted one costs one comparison."""
    if torch.compiler.is_compiling():
        return supports(*args, **kwargs)
    looks: list[Any] = [*kwargs]
    for value in (*args, *kwargs.values()):
        _look(value, looks)
    if looks == site.accepted:
        return True
    answer = supports(*args, **kwargs)
    if answer is True:
        site.accepted = looks
        return True
    return answer or "supports() returned False"


def _look(value: Any, looks: list[Any]) -> None:
    """Append what counts of an argument, or of all that lies in it."""
    kind = type(value)
    if isinstance(value, torch.Tensor):
        looks += (value.shape, value.dtype, value.stride(), value.device, value.requires_grad)
    elif kind in _PLAIN:
        looks += (kind, value)
    elif kind is tuple or kind is list:
        looks += (kind, len(value))
        for each in value:
            _look(each, looks)
    else:
        leaves = tree_leaves(value)
        if len(leaves) == 1 and leaves[0] is value:
            looks.append(value if isinstance(value, int | float | str) else kind)
        else:
            looks += (kind, len(leaves))
            for leaf in leaves:
                _look(leaf, looks)


_PLAIN = (bool, int, float, str, type(None))


def _lost_gradient(self: nn.Module, args: Any, kwargs: Any, out: Any) -> bool:
    """Whether no output has a gradient although an input or a parameter asks for one."""
    if _has_gradient(out) or not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(out)):
        return False
    return _has_gradient((args, kwargs)) or any(parameter.requires_grad for parameter in self.parameters())


def _has_gradient(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(value))


def _trace_counter(key: "ClassKey") -> Callable[[], bool]:
    counts = traces_of

    def note_trace() -> bool:
        counts[key] = counts.get(key, 0) + 1
        return True

    # What torch.compiler.assume_constant_result sets; calling that would import dynamo, a second, for every load.
    note_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return note_trace


traces_of: "weakref.WeakKeyDictionary[ClassKey, int]" = weakref.WeakKeyDictionary()
"""How often `torch.compile` traced the kernel of a generated class: per class, since compiled code is shared."""
