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

from kernelgraft.errors import PlanError
from kernelgraft.recording import Arguments, bind_arguments
from kernelgraft.tree import saved_tensors, shallow_tree, tensor_at


@dataclass
class Made:
    """A layout on the meta device, not yet in the model.

    Attributes:
        layout: The layout.
        kept: For each tensor of the layout that simply is one of a member's, that original: `<member's index>.<name>`.
        computed: Names of non-persistent buffers, and of attributes that hold tensors, which need a value.
    """

    layout: nn.Module
    kept: dict[str, str]
    computed: tuple[str, ...]
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


def make_layout(layout: type[nn.Module], members: Sequence[nn.Module], arguments: Arguments | None) -> Made:
    """Make `layout` for the given members.

    Args:
        layout: The layout's class.
        members: The original modules, in the order of the config's tuple.
        arguments: For a single module, what its `__init__` got, if that is known.

    Raises:
        PlanError: The layout's `__init__` cannot take what there is, or raises.
    """
    copies = [_on_meta(member) for member in members]
    call = _construction(layout, [copy for copy, _ in copies], type(members[0]), arguments)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        made = call.build()
    origin: dict[int, str] = {}
    for index, (_, tensors) in enumerate(copies):
        origin.update({id(tensor): f"{index}.{name}" for name, tensor in tensors.items()})
    kept = {}
    for name, tensor in (*made.named_parameters(), *made.named_buffers()):
        if id(tensor) in origin:
            kept[name] = origin[id(tensor)]
    persistent = saved_tensors(made)
    computed = [name for name, _ in made.named_buffers() if name not in persistent and name not in kept]
    for path, module in made.named_modules():
        computed += [_join(path, name) for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
    return Made(made, kept, tuple(computed), call)


def _construction(
    layout: type[nn.Module], copies: Sequence[nn.Module], original: type[nn.Module], arguments: Arguments | None
) -> _Construction:
    if len(copies) > 1:
        return _Construction(layout, tuple(copies), {})
    if hasattr(layout, "from_module"):
        return _Construction(layout, tuple(copies), {}, from_module=True)
    if arguments is None:
        raise PlanError(
            f"{layout.__name__} wants what {original.__name__}.__init__ got, and that was not recorded for this "
            f"module. Build the model inside `with kernelgraft.recorded():`, or give {layout.__name__} a "
            f"`from_module(cls, module)` classmethod."
        )
    args, kwargs = bind_arguments(layout, arguments, original)
    return _Construction(layout, args, kwargs)


def _on_meta(member: nn.Module) -> tuple[nn.Module, dict[str, torch.Tensor]]:
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
    named = [*copy.named_parameters(), *copy.named_buffers()]
    return copy, dict(named)


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


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _named(value: Any) -> str:
    return type(value).__name__ if isinstance(value, nn.Module) else repr(value)[:60]
