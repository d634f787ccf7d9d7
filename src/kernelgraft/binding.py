"""Which forward a grafted module runs, on which device, in which mode.

One class is made for each combination of layout, kernels and original class, and the instance's `__class__` is set to
it. Never a class per instance: `torch.compile` would compile once for each. Nothing is put into an instance's
`__dict__` as `forward`: that place belongs to accelerate, and a bound method there is lost in a pickle.
"""

import inspect
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from kernelgraft.errors import GraftError, KernelError, PlanError
from kernelgraft.functions import function_of, with_globals
from kernelgraft.kernel import Kernel, load_kernel
from kernelgraft.reference import KernelReference
from kernelgraft.signature import adapted_forward
from kernelgraft.slot import KEY, GraftedModule, Site, Slot

Mode = tuple[bool, bool]
"""`(training, compiling)`."""

Modes = tuple[tuple[bool, bool, Kernel], ...]
"""`(training, compiling, kernel)` for each mode that has a kernel."""


@dataclass(frozen=True)
class ClassKey:
    """What a generated class depends on, and how a pickle finds it again.

    Attributes:
        role: "host" (runs the kernel on a layout), "absorbed" (passes its input through), "rebound" (runs a
            stateless kernel on the original's own parameters) or "function" (runs the original's forward with other
            functions).
        original: The class that stood there.
        layout: The layout's class, for a host.
        modes: The kernels by mode.
        functions: For "function", the kernels by mode of each global name.
        answers: Names that the class must answer from the instance although the original's class defines them.
    """

    role: str
    original: type[nn.Module]
    layout: type[nn.Module] | None
    modes: Modes = ()
    functions: tuple[tuple[str, Modes], ...] = ()
    answers: frozenset[str] = frozenset()

    def __call__(self) -> nn.Module:
        """A bare instance of the class: what a pickle or a deep copy fills."""
        cls = bound_class(self)
        return cls.__new__(cls)

    def __deepcopy__(self, memo: object) -> "ClassKey":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        functions = tuple((name, _portable(modes)) for name, modes in self.functions)
        return _restore_key, (
            self.role,
            self.original,
            self.layout is not None,
            _portable(self.modes),
            functions,
            self.answers,
        )


Portable = tuple[tuple[bool, bool, str, str | None, Any], ...]


def _portable(modes: Modes) -> Portable:
    """Kernels as a pickle keeps them: by reference and digest; those given as objects, by their importable names."""
    return tuple(
        (
            training,
            compiling,
            kernel.reference,
            kernel.digest,
            None if kernel.digest else (kernel.forward_class or kernel.function, kernel.layout),
        )
        for training, compiling, kernel in modes
    )


def _restored(modes: Portable) -> Modes:
    """Load the kernels that a pickle names, under the trust rules of `kernels`, and refuse other code than it meant."""
    return tuple(
        (training, compiling, Kernel(*objects) if objects else _load_again(reference, digest))
        for training, compiling, reference, digest, objects in modes
    )


def _load_again(reference: str, digest: str | None) -> Kernel:
    kernel = load_kernel(KernelReference.parse(reference))
    if kernel.digest != digest:
        raise KernelError(
            f"The pickle was made with {reference} at digest {digest}; what is there now has digest {kernel.digest}. "
            f"Restore that version of the kernel, or graft the model anew."
        )
    return kernel


def _restore_key(
    role: str,
    original: type[nn.Module],
    has_layout: bool,
    modes: Portable,
    functions: tuple[tuple[str, Portable], ...],
    answers: frozenset[str],
) -> ClassKey:
    loaded = _restored(modes)
    layout = loaded[0][2].layout if has_layout else None
    return ClassKey(role, original, layout, loaded, tuple((n, _restored(m)) for n, m in functions), answers)


_classes: "weakref.WeakValueDictionary[ClassKey, type[nn.Module]]" = weakref.WeakValueDictionary()
_classes_lock = threading.Lock()


class Rebound(nn.Module):
    """Base of the classes that run a stateless kernel on the original module itself."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self)._kernelgraft_maker, (), self.__getstate__()  # type: ignore[attr-defined,no-untyped-call]


def bound_class(key: ClassKey) -> type[nn.Module]:
    """The generated class for `key`, made at most once.

    Raises:
        PlanError: The layout's and the original's classes have no common method resolution order, or the kernel's
            forward cannot stand in for the original's.
    """
    with _classes_lock:
        cls = _classes.get(key)
        if cls is None:
            cls = _classes[key] = _make_class(key)
        return cls


def _make_class(key: ClassKey) -> type[nn.Module]:
    bases: tuple[type, ...]
    if key.role in ("rebound", "function"):
        bases = (Rebound, key.original)
    elif key.layout is None or issubclass(key.original, key.layout):
        bases = (GraftedModule, key.original)
    elif issubclass(key.layout, key.original):
        bases = (GraftedModule, key.layout)
    else:
        bases = (GraftedModule, key.layout, key.original)
    namespace: dict[str, Any] = {
        "__module__": key.original.__module__,
        "__qualname__": key.original.__qualname__,
        "__doc__": key.original.__doc__,
        "_kernelgraft_maker": key,
        "forward": _absorbed_forward(key) if key.role == "absorbed" else _kernel_forward(key),
        "extra_repr": _extra_repr,
        "kernel_condition": staticmethod(_never),
        **{name: _answer(name) for name in key.answers},
    }
    try:
        return type(key.original.__name__, bases, namespace)
    except TypeError as error:
        layout = key.layout.__name__ if key.layout else "the kernel"
        raise PlanError(
            f"{layout} cannot stand where a {key.original.__name__} stood: their classes do not combine ({error}). "
            f"Derive the layout from torch.nn.Module alone."
        ) from error


def _never(_: object) -> bool:
    """Tells `kernels.kernelize` to keep off: the forward is chosen here."""
    return False


def _extra_repr(self: nn.Module) -> str:
    slot: Slot = self.__dict__[KEY]
    if not slot.is_host:
        return f"absorbed by {slot.site.host}"
    key: ClassKey = type(self)._kernelgraft_maker  # type: ignore[attr-defined]
    modes = key.modes or tuple(mode for _, modes in key.functions for mode in modes)
    kernels = dict.fromkeys(kernel.name for _, _, kernel in modes)
    return f"kernel={'|'.join(kernels)}"


def _answer(name: str) -> property:
    """A property that answers from the instance, where the original's class would otherwise answer in its place."""

    def registry_of(self: nn.Module) -> dict[str, Any]:
        for registry in ("_parameters", "_buffers", "_modules"):
            if name in self.__dict__[registry]:
                return self.__dict__[registry]  # type: ignore[no-any-return]
        return self.__dict__

    def read(self: nn.Module) -> Any:
        registry = registry_of(self)
        if name not in registry:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return registry[name]

    def write(self: nn.Module, value: Any) -> None:
        registry_of(self)[name] = value

    return property(read, write)


def conflicting_names(layout: nn.Module, original: type[nn.Module]) -> frozenset[str]:
    """Names of the layout's tensors, children and attributes that the original's class defines in another way."""
    registered = {*layout._parameters, *layout._buffers, *layout._modules}
    plain = {name for name in vars(layout) if name not in vars(nn.Module())}
    found = set()
    for base in original.__mro__:
        if base in (nn.Module, object):
            continue
        for name, value in vars(base).items():
            if name in registered or (name in plain and hasattr(type(value), "__set__")):
                found.add(name)
    return frozenset(found)


# --- the forwards


def _kernel_forward(key: ClassKey) -> Callable[..., Any]:
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


def _function_forwards(key: ClassKey) -> tuple[dict[Mode, Callable[..., Any]], dict[Mode, str]]:
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


def _absorbed_forward(key: ClassKey) -> Callable[..., Any]:
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


def _trace_counter(key: ClassKey) -> Callable[[], bool]:
    counts = traces_of

    def note_trace() -> bool:
        counts[key] = counts.get(key, 0) + 1
        return True

    # What torch.compiler.assume_constant_result sets; calling that would import dynamo, a second, for every load.
    note_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return note_trace


traces_of: "weakref.WeakKeyDictionary[ClassKey, int]" = weakref.WeakKeyDictionary()
"""How often `torch.compile` traced the kernel of a generated class: per class, since compiled code is shared."""
