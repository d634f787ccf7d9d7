"""What the modules of a site are called with in a forward of the whole model, and how that is called again.

The members of a fusion hand their outputs on: what one returned is looked for among what the next one gets, and stands
there as a link. So the same call runs the originals one after the other, or the slots of a graft, of which one runs the
kernel and the others pass on what they get.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from kernelgraft.verify._values import Change, Rebuilder, copied, direct


@dataclass(frozen=True, slots=True)
class Link:
    """Stands for what the member before returned under this name."""

    name: str


@dataclass(frozen=True)
class MemberCall:
    """The arguments of one member, with the names of those given by their place."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...]
    prefix: str

    def items(self) -> Iterable[tuple[str, Any]]:
        """The arguments by name; of later members of a fusion, by the member's name too."""
        yield from zip((self.prefix + name for name in self.names), self.args, strict=True)
        yield from ((self.prefix + name, value) for name, value in self.kwargs.items())

    def rebuilt(self, rebuilder: Rebuilder) -> "MemberCall":
        """The same call with other tensors."""
        values = [rebuilder.copy(value, name) for name, value in self.items()]
        count = len(self.args)
        return replace(self, args=tuple(values[:count]), kwargs=dict(zip(self.kwargs, values[count:], strict=True)))


@dataclass(frozen=True)
class SiteCall:
    """One call of a site.

    Attributes:
        members: The arguments of each member, in the order in which data flows.
        data: Names of the tensors to which gradients flow when the model is trained.
    """

    members: tuple[MemberCall, ...]
    data: frozenset[str] = frozenset()

    def inputs(self) -> dict[str, torch.Tensor]:
        """The tensors that come from outside, by name; those that an object holds are left out."""
        return dict(each for member in self.members for name, value in member.items() for each in direct(value, name))

    def objects(self) -> dict[str, Any]:
        """All arguments by name."""
        return dict(each for member in self.members for each in member.items())

    def rebuilt(self, change: Change, dtype: torch.dtype | None = None) -> "SiteCall":
        """The same call with other tensors, and with copies of the objects that it hands over."""
        rebuilder = Rebuilder(change, dtype)
        return replace(self, members=tuple(member.rebuilt(rebuilder) for member in self.members))

    def cast(self, dtype: torch.dtype | None) -> "SiteCall":
        """The same call on tensors of their own, the floating ones in `dtype`."""
        return self.rebuilt(lambda _, tensor: copied(tensor, dtype), dtype)

    def play(self, modules: Sequence[nn.Module]) -> Any:
        """Call the modules one after the other, and give what the last one returns."""
        out: Any = None
        for module, member in zip(modules, self.members, strict=True):
            before = dict(direct(out, "output"))
            args = _joined(member.args, before)
            kwargs = _joined(member.kwargs, before)
            out = module.forward(*args, **kwargs)
        return out


def _joined(value: Any, before: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, Link):
        if value.name not in before:
            have = ", ".join(before) or "no tensor"
            raise TypeError(f"the next module of the fusion takes {value.name}, and there is {have}")
        return before[value.name]
    if type(value) in (tuple, list):
        return type(value)(_joined(item, before) for item in value)
    if type(value) is dict:
        return {key: _joined(item, before) for key, item in value.items()}
    return value


# --- watching


@dataclass
class _Watch:
    """One site during one forward."""

    paths: tuple[str, ...]
    forwards: tuple[Callable[..., Any], ...]
    room: "_Room"
    calls: list[MemberCall] = field(default_factory=list)
    data: set[str] = field(default_factory=set)
    before: dict[int, str] = field(default_factory=dict)
    kept: list[torch.Tensor] = field(default_factory=list)
    skips: bool = False

    def enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if index == 0 and len(self.calls) < len(self.paths):
            self.calls, self.data, self.skips = [], set(), self.room.is_full()
        if self.skips or index != len(self.calls):
            return
        prefix = f"{self.paths[index].rpartition('.')[2]}." if index else ""
        call = MemberCall(args, kwargs, _names(self.forwards[index], len(args)), prefix)
        self.calls.append(call.rebuilt(Rebuilder(self._taken)))
        self.before, self.kept = {}, []

    def _taken(self, name: str, tensor: torch.Tensor) -> Any:
        if id(tensor) in self.before:
            return Link(self.before[id(tensor)])
        if tensor.requires_grad:
            self.data.add(name)
        self.room.used += tensor.nbytes
        return copied(tensor)

    def leave(self, index: int, output: Any) -> None:
        if index == len(self.calls) - 1 and len(self.calls) < len(self.paths):
            found = dict(direct(output, "output"))
            self.before = {id(tensor): name for name, tensor in found.items()}
            self.kept = list(found.values())

    def call(self) -> SiteCall | None:
        if len(self.calls) < len(self.paths):
            return None
        linked = all(any(isinstance(leaf, Link) for leaf in _leaves(call)) for call in self.calls[1:])
        return SiteCall(tuple(self.calls), frozenset(self.data)) if linked else None


@dataclass
class _Room:
    bytes: int
    used: int = 0

    def is_full(self) -> bool:
        return self.used > self.bytes


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, MemberCall):
        yield from _leaves(list(value.args) + list(value.kwargs.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _names(forward: Callable[..., Any], count: int) -> tuple[str, ...]:
    names = [p.name for p in inspect.signature(forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    return tuple(names[index] if index < len(names) else f"args[{index}]" for index in range(count))


def watch(
    model: nn.Module,
    sites: Sequence[tuple[tuple[str, ...], tuple[Callable[..., Any], ...]]],
    run: Callable[[nn.Module], Any],
    *,
    room: int,
) -> dict[tuple[str, ...], SiteCall]:
    """Run the model once and note what sites are called with first.

    Args:
        model: The model, whose sites run their originals.
        sites: The paths of each site's members, and the originals' forwards.
        run: Does one forward of the model.
        room: Bytes of tensors to keep; when they are used up, the sites that come after are left for another time.

    Returns:
        The calls by the sites' paths. Sites that the forward does not reach are left out.
    """
    shared = _Room(room)
    watches = [_Watch(paths, forwards, shared) for paths, forwards in sites]
    with ExitStack() as stack:
        for each in watches:
            for index, path in enumerate(each.paths):
                module = model.get_submodule(path)
                handles = (
                    module.register_forward_pre_hook(_entering(each, index), with_kwargs=True),
                    module.register_forward_hook(_leaving(each, index)),
                )
                for handle in handles:
                    stack.callback(handle.remove)
        _run_for_flags(model, run, watches)
    found = {each.paths: each.call() for each in watches}
    return {paths: call for paths, call in found.items() if call is not None}


def _run_for_flags(model: nn.Module, run: Callable[[nn.Module], Any], watches: Sequence[_Watch]) -> None:
    """One forward in which tensors say whether gradients flow to them, as in training; nothing is kept for that."""
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_nothing, _nothing):
            run(model)
    except Exception:
        # Code that is written for inference alone. What it is called with then is known, if not where gradients flow.
        for each in watches:
            each.calls.clear()
        with torch.no_grad():
            run(model)


def _nothing(_: Any) -> Any:
    """What is kept of a tensor that a backward would need."""


def _entering(watch: _Watch, index: int) -> Callable[..., None]:
    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch.enter(index, args, kwargs)

    return enter


def _leaving(watch: _Watch, index: int) -> Callable[..., None]:
    def leave(_: nn.Module, __: Any, output: Any) -> None:
        watch.leave(index, output)

    return leave


def run_towers(model: nn.Module, run: Callable[[nn.Module], Any]) -> None:
    """Run the models inside a model that take another kind of input (a vision tower) on their own."""
    main = getattr(model, "main_input_name", None)
    for module in model.modules():
        if getattr(module, "main_input_name", main) != main and hasattr(module, "config"):
            with suppress(Exception):  # what does not run so is not reached, and said to be so
                run(module)
