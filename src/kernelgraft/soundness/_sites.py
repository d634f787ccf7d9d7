"""A fusion in a model, what is found about it, and the paths and containers that the check goes through."""

import copy
import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kernelgraft.errors import PlanError

Run = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class FusionSite:
    """One fusion in one model.

    Attributes:
        parent: Path of the module that holds the members, `""` for the model itself.
        members: Paths of the members in the order in which data flows through them.
        host: The path among them where the fused kernel will stand.
    """

    parent: str
    members: tuple[str, ...]
    host: str


@dataclass(frozen=True)
class Verdict:
    """Whether a fusion is sound; `None` is "not checked", and `reason` says why.

    A reason names members and other modules relative to the parent.
    """

    sound: bool | None
    reason: str


def validate(model: nn.Module, sites: Sequence[FusionSite]) -> None:
    taken: dict[str, FusionSite] = {}
    for site in sites:
        if len(site.members) < 2 or len(set(site.members)) != len(site.members) or site.host not in site.members:
            raise PlanError(
                f"{site} is no fusion: it takes two or more different members, and the host is one of them. "
                "Name the members in the order in which data flows through them."
            )
        for path in (site.parent, *site.members):
            try:
                model.get_submodule(path)
            except AttributeError as error:
                raise PlanError(
                    f"{site} names {path!r}, which {type(model).__name__} does not have: {error}."
                ) from error
            if path in site.members and taken.setdefault(path, site) is not site:
                raise PlanError(f"{path!r} is in two fusions, {taken[path]} and {site}. Leave one of them out.")


def scope(model: nn.Module, parent: str) -> str:
    """The nearest module at or above `parent` that has a forward; a list of modules has none."""
    while parent and isinstance(model.get_submodule(parent), (nn.ModuleList, nn.ModuleDict)):
        parent = parent.rpartition(".")[0]
    return parent


def prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def below(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}.")


def relative(path: str, parent: str) -> str:
    return path[len(parent) + 1 :] if parent and path.startswith(f"{parent}.") else path


def first_parameter(forward: Callable[..., Any]) -> str:
    return next(iter(inspect.signature(forward).parameters), "")


def mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with the tensors in its tuples, lists and dicts changed; what holds none stays the same object."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple) or type(value) is list:
        items = [mapped(item, change) for item in value]
        if all(map(operator.is_, items, value)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        changed = {key: new for key, item in value.items() if (new := mapped(item, change)) is not item}
        if changed:
            value = copy.copy(value)
            for key, item in changed.items():
                value[key] = item
    return value


def tensors(value: Any) -> list[Any]:
    found: list[Any] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    mapped(value, keep)
    return found
