"""Making a layout: on the meta device, so that nothing is allocated and the random state does not move.

A fusion's layout gets the member modules, a single module's gets what the original's `__init__` got, or the module
itself if it has `from_module`. What the layout computes in its `__init__` besides parameters (non-persistent buffers,
plain tensors) has no value on meta and is taken from a second construction on the CPU.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kernelgraft.contents import Contents, joined
from kernelgraft.errors import PlanError
from kernelgraft.meta import WithoutDrawing
from kernelgraft.recording import Arguments, Signatures, bind_arguments
from kernelgraft.tree import shallow_tree, tensor_at

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@dataclass
class Made:
    """A layout on the meta device, not yet in the model.

    Attributes:
        layout: The layout.
        kept: For each tensor of the layout that simply is one of a member's, that original: `<member's index>.<name>`.
        computed: Names of non-persistent buffers, and of attributes that hold tensors, which need a value.
        contents: What is in the layout.
    """

    layout: nn.Module
    kept: dict[str, str]
    computed: tuple[str, ...]
    contents: Contents
    _call: "_Construction" = field(repr=False)

    def values(self) -> dict[str, torch.Tensor]:
        """The values of what `computed` names, from a second construction on the CPU.

        Raises:
            PlanError: A value depends on a member's tensors, so it cannot be had before they are loaded.
        """
        if not self.computed:
            return {}
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            again = self._call.build()
        found = {name: _attribute(again, name) for name in self.computed}
        for name, value in found.items():
            if value.is_meta:
                raise PlanError(
                    f"{type(self.layout).__name__}.{name} is made from a member's tensors, which have no values while "
                    f"a graft is planned. Make it from plain numbers, or make it a parameter with a rule that fills it."
                )
        return found


@dataclass(frozen=True)
class _Construction:
    layout: type[nn.Module]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    from_module: bool = False

    def build(self) -> nn.Module:
        make: Any = self.layout.from_module if self.from_module else self.layout  # type: ignore[attr-defined]
        try:
            made = make(*self.args, **self.kwargs)
        except Exception as error:
            given = ", ".join(
                [_named(value) for value in self.args]
                + [f"{name}={_named(value)}" for name, value in self.kwargs.items()]
            )
            raise PlanError(
                f"{self.layout.__name__}({given}) raised {type(error).__name__}: {error}. A layout's __init__ takes "
                f"the fused modules in the order of the config's tuple, or what the replaced module's __init__ took."
            ) from error
        if not isinstance(made, nn.Module):
            raise PlanError(f"{self.layout.__name__}.from_module returned a {type(made).__name__}, not a layout.")
        return made


def make_layout(
    layout: type[nn.Module], members: Sequence[Contents], arguments: Arguments | None, signatures: Signatures
) -> Made:
    """Make `layout` for the given members.

    Args:
        layout: The layout's class.
        members: The original modules, in the order of the config's tuple.
        arguments: For a single module, what its `__init__` got, if that is known.
        signatures: Those of the sites before.

    Raises:
        PlanError: The layout's `__init__` cannot take what there is, or raises.
    """
    if len(members) > 1 or hasattr(layout, "from_module"):
        copies = [on_meta(member.module) for member in members]
        modules = tuple(copy for copy, _ in copies)
        call = _Construction(layout, modules, {}, from_module=len(members) == 1)
    else:
        copies = []
        call = _Construction(layout, *_recorded(layout, type(members[0].module), arguments, signatures))
    with torch.random.fork_rng(devices=[]), torch.device("meta"), WithoutDrawing():
        made = call.build()
    contents = Contents(made)
    origin = {id(tensor): f"{index}.{name}" for index, (_, named) in enumerate(copies) for name, tensor in named}
    held = (*contents.parameters.items(), *contents.buffers.items())
    kept = {name: origin[id(tensor)] for name, tensor in held if id(tensor) in origin}
    computed = [name for name in contents.buffers if name not in contents.saved and name not in kept]
    for path, module in contents.modules:
        own = [name for name in vars(module) if name not in _OF_EVERY_MODULE]
        computed += [joined(path, name) for name in own if isinstance(vars(module)[name], torch.Tensor)]
    return Made(made, kept, tuple(computed), contents, call)


def _recorded(
    layout: type[nn.Module], original: type[nn.Module], arguments: Arguments | None, signatures: Signatures
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if arguments is None:
        raise PlanError(
            f"{layout.__name__} wants what {original.__name__}.__init__ got, and that was not recorded for this "
            f"module. Build the model inside `with kernelgraft.recorded():`, or give {layout.__name__} a "
            f"`from_module(cls, module)` classmethod."
        )
    return bind_arguments(layout, arguments, original, signatures)


def on_meta(member: nn.Module) -> tuple[nn.Module, list[tuple[str, torch.Tensor]]]:
    """A shallow copy of a member with its tensors on meta, and those tensors by name."""
    copy = shallow_tree(member)
    made: dict[int, torch.Tensor] = {}
    for module in copy.modules():
        for registry in (module._parameters, module._buffers):
            for name, tensor in registry.items():
                if tensor is not None:
                    if id(tensor) not in made:
                        made[id(tensor)] = _meta_like(tensor)
                    registry[name] = made[id(tensor)]  # type: ignore[assignment]
    contents = Contents(copy)
    return copy, [*contents.parameters.items(), *contents.buffers.items()]


def _meta_like(tensor: torch.Tensor) -> torch.Tensor:
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta


def _attribute(module: nn.Module, name: str) -> torch.Tensor:
    path, _, last = name.rpartition(".")
    holder = module.get_submodule(path)
    value = vars(holder).get(last)
    return value if isinstance(value, torch.Tensor) else tensor_at(module, name)


def put_value(layout: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a computed value where the layout keeps it: a buffer, or a plain attribute."""
    path, _, last = name.rpartition(".")
    holder = layout.get_submodule(path)
    if last in holder._buffers:
        holder._buffers[last] = value
    else:
        vars(holder)[last] = value


def _named(value: Any) -> str:
    return type(value).__name__ if isinstance(value, nn.Module) else repr(value)[:60]
