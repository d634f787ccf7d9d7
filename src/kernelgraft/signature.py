"""A kernel's forward in the place of the original's: what it is handed, and what it reads.

A kernel's promises are checked before it is bound: signatures, and the attributes that its code reads.
"""

import difflib
import dis
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from kernelgraft.errors import PlanError
from kernelgraft.kernel import Kernel

ALIASES = (("past_key_values", "cache"),)
"""Keywords that Transformers renamed while kernels were being written for both names (in 5.23 and 5.24)."""


def renamed_keywords(kernel: type, original: type[nn.Module]) -> dict[str, str]:
    """The keywords to hand over under another name, so that the kernel gets what the original got.

    Args:
        kernel: The kernel's class.
        original: The class whose forward it replaces.

    Returns:
        The kernel's name for each keyword that the original knows under another one.

    Raises:
        PlanError: The kernel would not get something that the original's forward names, needs something that the
            original does not have, or does not take the further keywords that the original takes.
    """
    ours = list(inspect.signature(kernel.forward).parameters.values())[1:]  # type: ignore[attr-defined]
    theirs = list(inspect.signature(original.forward).parameters.values())[1:]
    if any(p.kind is p.VAR_POSITIONAL for p in (*ours, *theirs)):
        return {}
    our_names = [p.name for p in ours if p.kind is not p.VAR_KEYWORD]
    their_names = [p.name for p in theirs if p.kind is not p.VAR_KEYWORD]
    renames: dict[str, str] = {}
    for index, parameter in enumerate(p for p in ours if p.kind is not p.VAR_KEYWORD):
        name = parameter.name
        if name in their_names:
            continue
        alias = next((theirs for theirs in _aliases(name) if theirs in their_names), None)
        is_needed = parameter.default is parameter.empty
        # By its place only what the kernel cannot do without: an option of its own must not get something else.
        if alias is None and is_needed and index < len(their_names) and their_names[index] not in our_names:
            other = their_names[index]
            alias = other if not any(a in our_names for a in _aliases(other)) else None
        if alias is not None:
            renames[alias] = name
        elif is_needed:
            raise _signature_error(kernel, original, f"the kernel needs {name!r}, which the original does not take")
    lost = [name for name in their_names if name not in our_names and name not in renames]
    takes_more = any(p.kind is p.VAR_KEYWORD for p in ours)
    if lost and (takes_more or any(p.default is p.empty for p in theirs if p.name in lost)):
        raise _signature_error(kernel, original, f"the kernel would not get {', '.join(map(repr, lost))} by name")
    if any(p.kind is p.VAR_KEYWORD for p in theirs) and not takes_more:
        raise _signature_error(kernel, original, "the original takes further keywords (**kwargs), the kernel does not")
    for old, new in ALIASES:
        for name, other in ((old, new), (new, old)):
            if name in our_names and other not in our_names:
                renames[other] = name
    return renames


def _aliases(name: str) -> list[str]:
    return [b if name == a else a for a, b in ALIASES if name in (a, b)]


def _signature_error(kernel: type, original: type[nn.Module], why: str) -> PlanError:
    return PlanError(
        f"{kernel.__name__}.forward{inspect.signature(kernel.forward)} cannot stand for "  # type: ignore[attr-defined]
        f"{original.__name__}.forward{inspect.signature(original.forward)}: {why}. "
        f"Give the kernel's forward the original's parameters, by their names."
    )


def adapted_forward(kernel: Kernel, original: type[nn.Module]) -> Callable[..., Any]:
    """The kernel's forward, taking what the original's callers pass: renamed keywords, and arguments by their place."""
    assert kernel.forward_class is not None
    run: Callable[..., Any] = kernel.forward_class.forward  # type: ignore[attr-defined]
    renames = renamed_keywords(kernel.forward_class, original)
    ours = [p.name for p in list(inspect.signature(run).parameters.values())[1:] if p.kind is p.POSITIONAL_OR_KEYWORD]
    theirs = [
        p.name
        for p in list(inspect.signature(original.forward).parameters.values())[1:]
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    in_order = [renames.get(name, name) for name in theirs][: len(ours)] == ours[: len(theirs)]
    if not renames and in_order:
        return run

    def adapted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not in_order:
            kwargs = {**dict(zip(theirs, args, strict=False)), **kwargs}
            args = ()
        kwargs = {renames.get(name, name): value for name, value in kwargs.items()}
        return run(self, *args, **kwargs)

    return adapted


def read_attributes(kernel: type) -> list[str]:
    """The attributes of `self` that a kernel's forward reads: annotated in its class, or found in its code.

    One that the code asks for first, by `hasattr(self, "name")`, may be missing and is left out.
    """
    forward = inspect.unwrap(kernel.forward)  # type: ignore[attr-defined]
    code = getattr(forward, "__code__", None)
    names = [name for base in kernel.__mro__ if base is not nn.Module for name in inspect.get_annotations(base)]
    if code is not None and code.co_argcount:
        me = code.co_varnames[0]
        loaded: Any = None
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and loaded == me and step.argval not in code.co_consts:
                names.append(step.argval)
            loaded = None
            if step.opname.startswith("LOAD_FAST"):
                # Newer Pythons load two names in one step; the last of them is what the next step reads from.
                loaded = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
    return [name for name in dict.fromkeys(names) if not name.startswith("__")]


def check_attributes(kernels: Iterable[Kernel], layout: nn.Module, original: nn.Module, path: str) -> None:
    """Refuse a kernel whose forward reads something that neither its layout nor the original has.

    Raises:
        PlanError: With what it reads, and what there is.
    """
    for kernel in dict.fromkeys(kernels):
        assert kernel.forward_class is not None
        missing = [
            name
            for name in read_attributes(kernel.forward_class)
            if not hasattr(layout, name) and not hasattr(original, name) and not hasattr(kernel.forward_class, name)
        ]
        if missing:
            have = sorted({*_public(layout), *_public(original)})
            near = [match for name in missing for match in difflib.get_close_matches(name, have, n=2)]
            raise PlanError(
                f"{kernel.name}.forward reads {', '.join(f'self.{name}' for name in missing)}, which "
                f"{type(original).__name__} at {path!r} does not have"
                f"{f' (nearest: {near})' if near else ''}. It has: {', '.join(have)}."
            )


def _public(module: nn.Module) -> list[str]:
    names = {*module._parameters, *module._buffers, *module._modules, *vars(module)}
    return [name for name in names if not name.startswith("_") and name != "training"]


def spell_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """A call as a message shows it: tensors by shape and dtype."""
    spelt = [_spell(value) for value in args] + [f"{name}={_spell(value)}" for name, value in kwargs.items()]
    return f"({', '.join(spelt)})"


def _spell(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_spell, value))})"
    return repr(value) if isinstance(value, int | float | str | None) else type(value).__name__
