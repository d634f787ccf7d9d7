"""A kernel: the forward, the layout beside it, and where both came from.

A kernel repository lists its kernels in `layers`; the layout of a kernel is the class `{KernelName}Layout` in the
module that defines the kernel. The class of a kernel is forward-only: parameters and constants belong to its layout.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, cast

from torch import nn

from kernelgraft.errors import ConfigTypeError, KernelError
from kernelgraft.reference import KernelReference
from kernelgraft.source import Source, importing, load_source, place_of

_FLAGS = {"has_backward", "can_torch_compile", "supports"}
_MEMBERS_OF_MODULE = frozenset(dir(nn.Module))


@dataclass(frozen=True, init=False)
class Kernel:
    """A kernel class, or a function, that a graft can put into a model.

    Two kernels are equal if they run the same code, wherever they were asked for from.

    Attributes:
        name: `__name__` of the class or function, whatever the repository's `layers` calls it.
        forward_class: The class whose `forward` runs; `None` for a function.
        layout: The `nn.Module` class that holds the parameters as the kernel wants them; `None` for a kernel that
            takes them as they are.
        function: The function, for a kernel that replaces one; else `None`.
        reference: The text that names it.
        digest: The commit on the Hub, or the sha256 of the source files, if known.
        origin: The folder or file it was loaded from, if known.
    """

    name: str
    forward_class: type | None
    layout: type[nn.Module] | None
    function: Callable[..., Any] | None
    reference: str = field(compare=False)
    digest: str | None = field(compare=False)
    origin: str | None = field(compare=False)

    def __init__(
        self,
        kernel: type | Callable[..., Any],
        layout: type[nn.Module] | None = None,
        *,
        reference: str | None = None,
        digest: str | None = None,
        origin: str | None = None,
    ) -> None:
        """Makes a kernel of a class with a `forward`, or of a function.

        Args:
            kernel: The class, or the function.
            layout: Its layout. By default `{KernelName}Layout` of the module that defines the class, if there is one.
            reference: The text that names it in messages, by default its module and name.
            digest: What identifies its source, if known.
            origin: Where its source lies, by default the file of its module.

        Raises:
            ConfigTypeError: `kernel` is neither a class nor a function, or `layout` no `nn.Module` class.
            KernelError: The class has no forward, or carries state.
        """
        if not is_kernel_object(kernel):
            raise ConfigTypeError(
                f"A kernel is a class with a forward, or a function; got {kernel!r} of type {type(kernel).__name__}."
                + (f" Give the class: Kernel({type(kernel).__name__})." if isinstance(kernel, nn.Module) else "")
            )
        own_name = getattr(kernel, "__name__", type(kernel).__name__)
        own_module = sys.modules.get(getattr(kernel, "__module__", None) or "")
        said = reference or f"{getattr(kernel, '__module__', '?')}:{getattr(kernel, '__qualname__', own_name)}"
        is_class = isinstance(kernel, type)
        if isinstance(kernel, type):
            _check_class(kernel, said)
            layout = _checked_layout(kernel, layout, said)
        elif layout is not None:
            raise ConfigTypeError(f"Kernel {said!r} is a function: it holds no parameters and takes no layout.")
        values = {
            "name": own_name,
            "forward_class": kernel if is_class else None,
            "layout": layout,
            "function": None if is_class else kernel,
            "reference": said,
            "digest": digest,
            "origin": origin or place_of(own_module)[0],
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)
        _check_supports(self)

    @property
    def has_backward(self) -> bool:
        """Whether it says that gradients flow through it; true by default, as in the `kernels` library."""
        return bool(getattr(self.forward_class or self.function, "has_backward", True))

    @property
    def can_torch_compile(self) -> bool:
        """Whether it says that `torch.compile` takes it; false by default, as in the `kernels` library."""
        return bool(getattr(self.forward_class or self.function, "can_torch_compile", False))

    @property
    def supports(self) -> Callable[..., bool | str] | None:
        """What was declared to be asked before a call, `supports(*args, **kwargs)`; else `None`.

        It stands in the kernel's class, or in its layout's: the `kernels` library takes no kernel that has it.
        """
        declared = getattr(self.forward_class or self.function, "supports", None) or getattr(
            self.layout, "supports", None
        )
        return cast("Callable[..., bool | str] | None", declared)

    def __str__(self) -> str:
        return self.reference


def is_kernel_object(value: object) -> bool:
    """Whether this is a class or a function, as against text, a repository object or an instance of a module."""
    return isinstance(value, type) or (callable(value) and not isinstance(value, nn.Module | Kernel))


def is_repository(value: object) -> bool:
    """Whether this is a repository object of the `kernels` library, or one that behaves like them."""
    return not isinstance(value, type | Kernel | nn.Module | ModuleType) and callable(getattr(value, "load", None))


def load_kernel(use: object, *, backend: str | None = None) -> Kernel:
    """Loads what a config names.

    Args:
        use: A `KernelReference`, a repository object of the `kernels` library, a class, a function, or a `Kernel`,
            which is given back as it is.
        backend: For repositories in the Hub's layout: "cpu" to take the variant for it on a machine that has an
            accelerator; by default the one for the accelerator.

    Raises:
        KernelError: There is no such kernel, or it is none.
        ConfigTypeError: `use` is something else.
    """
    if isinstance(use, Kernel):
        return use
    if isinstance(use, KernelReference):
        source = load_source(use, backend=backend)
        return _kernel_of(_find(source, use), use_text(use), source)
    if is_repository(use):
        text = use_text(use)
        with importing(repr(text)):
            found = cast(Any, use).load()
        if not is_kernel_object(found):
            raise KernelError(f"Kernel {text!r}: its load() gave {found!r}, which is neither a class nor a function.")
        origin, digest = place_of(sys.modules.get(found.__module__))
        return Kernel(found, reference=text, digest=digest, origin=origin)
    return Kernel(cast(Any, use))


def use_text(use: object) -> str:
    """The text that names a kernel, before it is loaded; what names a place can be read as a reference again."""
    if isinstance(use, KernelReference):
        # The working folder may be another one by then.
        return f"{use.path}:{use.name}" if use.kind == "path" else str(replace(use, revision=_branch(use)))
    if isinstance(use, Kernel):
        return use.reference
    if is_repository(use):
        place = getattr(use, "_repo_id", None) or getattr(use, "_repo_path", None)
        name = getattr(use, "layer_name", None) or getattr(use, "func_name", None)
        branch = _branch(use, "_")
        return f"{place}{f'@{branch}' if branch else ''}:{name}" if place and name else repr(use)
    return f"{getattr(use, '__module__', '?')}:{getattr(use, '__qualname__', repr(use))}"


def _branch(use: object, prefix: str = "") -> str | None:
    """The revision that was asked for; version 2 is the branch v2, and version 1 is what no revision means."""
    revision, version = getattr(use, f"{prefix}revision", None), getattr(use, f"{prefix}version", None)
    return revision if revision is not None or version in (None, 1) else f"v{version}"


def require_layout(kernel: Kernel) -> type[nn.Module]:
    """The layout of a kernel that cannot do without one, as a fusion cannot.

    Raises:
        KernelError: There is none; the message names the class that was looked for and those that are there.
    """
    if kernel.layout is not None:
        return kernel.layout
    if kernel.forward_class is None:
        raise KernelError(f"Kernel {kernel.reference!r} is a function: a fusion needs a kernel class with a layout.")
    module = sys.modules.get(kernel.forward_class.__module__)
    raise KernelError(
        f"Kernel {kernel.reference!r} has no layout, which a fusion needs: there is no class '{kernel.name}Layout' "
        f"in the module that defines {kernel.name!r} ({getattr(module, '__file__', None) or module!r}); "
        f"its classes are {_listed(_classes(module))}. Write it there, with the fused modules as arguments:\n"
        f"  class {kernel.name}Layout(nn.Module):\n"
        f"      def __init__(self, first, second): ..."
    )


# --- finding a kernel in a module -------------------------------------------------------------------------------------


def _find(source: Source, reference: KernelReference) -> type | Callable[..., Any]:
    module, name = source.module, reference.name
    layers = getattr(module, "layers", None)
    if layers is None:
        raise _no_layers(source, reference)
    found = getattr(layers, name, None)
    if is_kernel_object(found):
        return cast("type | Callable[..., Any]", found)
    names = kernels_in(layers)
    if found is not None:
        raise KernelError(
            f"Kernel {str(reference)!r}: `layers` of {source.origin!r} has {name!r}, but it is {found!r}, neither a "
            f"class nor a function. Its kernels are {_listed(names)}."
        )
    near = difflib.get_close_matches(name, names, n=2)
    hint = f" Did you mean '{reference.location}:{near[0]}'?" if near else ""
    if isinstance(other := getattr(module, name, None), type) or inspect.isroutine(other):
        hint = f" The module has {name!r}, but does not list it: write `{name} = {name}` in its `layers`."
    raise KernelError(
        f"Kernel {str(reference)!r}: there is no {name!r} in `layers` of {source.origin!r}. "
        f"Its kernels are {_listed(names)}.{hint}"
    )


def _no_layers(source: Source, reference: KernelReference) -> KernelError:
    classes = [name for name in _classes(source.module) if not name.endswith("Layout")]
    example = reference.name if reference.name in classes or not classes else classes[0]
    is_package = hasattr(source.module, "__path__")
    written = (
        "write `from . import layers` in its __init__.py, and the kernels in layers.py"
        if is_package and not classes
        else f"add\n  class layers:\n      {example} = {example}"
    )
    return KernelError(
        f"Kernel {str(reference)!r}: {source.origin or source.module.__name__!r} has no `layers`, where a repository "
        f"lists its kernels. Its classes are {_listed(classes)}. To make it a kernel repository, {written}"
    )


def kernels_in(layers: object) -> list[str]:
    """The names that a repository's `layers` has for kernels."""
    names = []
    for name, value in vars(layers).items() if hasattr(layers, "__dict__") else ():
        public = not name.startswith("_") and not name.endswith("Layout")
        if public and is_kernel_object(value) and not getattr(value, "__module__", "").startswith("torch."):
            names.append(name)
    return names


def _classes(module: ModuleType | None) -> list[str]:
    defined = getattr(module, "__name__", None)
    return [
        name
        for name, value in vars(module or object).items()
        if isinstance(value, type) and name != "layers" and value.__module__.startswith(f"{defined}")
    ]


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _kernel_of(found: type | Callable[..., Any], text: str, source: Source) -> Kernel:
    return Kernel(found, reference=text, digest=source.digest, origin=source.origin)


# --- what a kernel class must be --------------------------------------------------------------------------------------


def _check_class(cls: type, reference: str) -> None:
    base = cls.__name__.removesuffix("Layout")
    if base != cls.__name__ and hasattr(sys.modules.get(cls.__module__), base):
        raise KernelError(f"Kernel {reference!r}: class {cls.__name__!r} is a layout; name the kernel: {base!r}.")
    forward = getattr(cls, "forward", None)
    if not callable(forward) or forward is nn.Module.forward:
        methods = [name for name, value in vars(cls).items() if inspect.isfunction(value)]
        raise KernelError(
            f"Kernel {reference!r}: class {cls.__name__!r} has no forward; its methods are {_listed(methods)}. "
            f"A kernel is `class {cls.__name__}(nn.Module): def forward(self, ...): ...`."
        )
    if state := state_of(cls):
        raise KernelError(
            f"Kernel {reference!r}: class {cls.__name__!r} carries state: {'; '.join(state)}. A kernel is "
            f"forward-only. Put parameters and attributes into `class {cls.__name__}Layout(nn.Module)` beside it, "
            f"whose instances the forward gets as `self`, and constants into the module."
        )


def state_of(cls: type) -> list[str]:
    """What a class has beyond functions, annotations and the known flags.

    The `kernels` library refuses every member but `forward` and two flags, and says only that there is one. Methods
    and properties are let through here: whether the forward can reach them is checked where it is bound.
    """
    state = []
    for owner in cls.__mro__:
        if owner in (nn.Module, object) or owner.__module__ in ("typing", "abc"):
            continue
        for name, value in vars(owner).items():
            at = "" if owner is cls else f" (in its base {owner.__name__!r})"
            if name == "__init__":
                state.append(f"it defines __init__{at}")
            elif name.startswith("__") or name == "_abc_impl" or name in _FLAGS or name in _MEMBERS_OF_MODULE:
                continue
            elif not isinstance(value, staticmethod | classmethod | property) and not inspect.isroutine(value):
                state.append(f"{name} = {type(value).__name__}{at}")
    return state


def _checked_layout(cls: type, layout: type[nn.Module] | None, reference: str) -> type[nn.Module] | None:
    name = f"{cls.__name__}Layout"
    given = layout is not None
    found = layout if given else getattr(sys.modules.get(cls.__module__), name, None)
    if found is None:
        return None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        message = f"Kernel {reference!r}: its layout is {found!r}. A layout is a class: `class {name}(nn.Module)`."
        raise ConfigTypeError(message) if given else KernelError(message)
    return found


def _check_supports(kernel: Kernel) -> None:
    supports = kernel.supports
    if supports is None:
        return
    if not callable(supports):
        raise KernelError(f"Kernel {kernel.reference!r}: its `supports` is {supports!r}, which cannot be called.")
    if next(iter(inspect.signature(supports).parameters), None) == "self":
        raise KernelError(
            f"Kernel {kernel.reference!r}: its `supports` takes self, but is asked before there is an instance. "
            f"Write it as `@staticmethod def supports(*args, **kwargs)` with the arguments of the forward."
        )
