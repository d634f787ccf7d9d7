"""The classes that grafted modules have.

One class is made for each combination of layout, kernels and original class, and the instance's `__class__` is set to
it. Never a class per instance: `torch.compile` would compile once for each. Nothing is put into an instance's
`__dict__` as `forward`: that place belongs to accelerate, and a bound method there is lost in a pickle.
"""

import threading
import weakref
from dataclasses import dataclass
from typing import Any

from torch import nn

from kernelgraft.errors import KernelError, PlanError
from kernelgraft.forwards import absorbed_forward, kernel_forward
from kernelgraft.kernel import Kernel, load_kernel
from kernelgraft.reference import KernelReference
from kernelgraft.slot import KEY, GraftedModule, Slot

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
        "forward": absorbed_forward(key) if key.role == "absorbed" else kernel_forward(key),
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
