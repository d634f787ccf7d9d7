"""Layers that equal each other: two of them run, and the others hand their input on in the form that these returned."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kernelgraft.soundness._copying import wrap_forward
from kernelgraft.soundness._sites import FusionSite, Verdict, below, mapped, prefixes, tensors

_INDEX_NAMES = ("layer_id", "layer_number", "block_id", "idx", "index")


@dataclass
class EqualLayers:
    """Layers of one list that differ in their index only: two run, the others hand their input on.

    They do it in the form that the first one returned, and are judged as the two that ran.
    """

    run: tuple[str, str]
    left_out: list[str]
    form: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None = None
    seen: dict[str, set[bool]] = field(default_factory=dict)

    def install(self, model: nn.Module) -> None:
        self.form, self.seen = None, {path: set() for path in self.left_out}
        wrap_forward(model.get_submodule(self.run[0]), self.learn)
        for path in self.left_out:
            layer = model.get_submodule(path)
            wrap_forward(layer, functools.partial(self.hand_on, path, layer))

    def learn(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = forward(*args, **kwargs)
        described = next(((each.shape, each.dtype) for each in tensors((args, kwargs))), None)

        def form(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            handed: Any = next(iter(tensors((args, kwargs))), None)

            def like(tensor: torch.Tensor) -> torch.Tensor:
                is_handed_on = handed is not None and (tensor.shape, tensor.dtype) == described
                return handed if is_handed_on else torch.zeros_like(tensor)

            return mapped(output, like)

        self.form = form
        return output

    def hand_on(
        self, path: str, layer: nn.Module, _: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.form is None:
            raise RuntimeError(f"{path!r} was to be left out, and runs before {self.run[0]!r}, which it equals")
        self.seen[path].add(layer.training)
        return self.form(args, kwargs)

    def verdict(self, site: FusionSite, verdicts: dict[FusionSite, Verdict | None]) -> Verdict | None:
        path = next(path for path in self.left_out if below(site.parent, path))
        twins = [verdicts.get(moved(site, path, runner)) for runner in self.run]
        if twins[0] is None or twins[0] != twins[1]:
            return None
        if twins[0].sound and self.seen[path] != {False, True}:
            return Verdict(None, "not checked: did not run")
        return twins[0]


def moved(site: FusionSite, old: str, new: str) -> FusionSite:
    def moved(path: str) -> str:
        return new + path[len(old) :]

    return FusionSite(moved(site.parent), tuple(map(moved, site.members)), moved(site.host))


def equal_layers(model: nn.Module, sites: Sequence[FusionSite]) -> list[EqualLayers]:
    groups: list[EqualLayers] = []
    by_layer: dict[str, set[FusionSite]] = {}
    per_layer: dict[int, Any] = {}
    cut: set[str] = set()  # what lies between a site's parent and its members
    for site in sites:
        for path in prefixes(site.parent):
            by_layer.setdefault(path, set()).add(site)
        cut.update(path for member in site.members for path in prefixes(member) if not below(site.parent, path))

    def visit(module: nn.Module, path: str) -> None:
        num_before = len(groups)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 2:
            equal: dict[Any, list[str]] = {}
            for name, child in module.named_children():
                child_path = f"{path}.{name}" if path else name
                if child_path in cut:
                    continue
                inside = frozenset(moved(site, child_path, "") for site in by_layer.get(child_path, ()))
                equal.setdefault((likeness(child, per_layer), inside), []).append(child_path)
            # The last one runs too, since it is the other one that a model treats apart.
            groups.extend(EqualLayers((paths[0], paths[-1]), paths[1:-1]) for paths in equal.values() if len(paths) > 2)
        if len(groups) == num_before:
            for name, child in module.named_children():
                visit(child, f"{path}.{name}" if path else name)

    visit(model, "")
    return groups


_INTERNAL = frozenset(nn.Module().__dict__)
_ATOMS = (int, float, str, bool, type(None))


def likeness(module: nn.Module, per_layer: dict[int, Any]) -> Any:
    """Equal for modules of the same class, attributes and shapes all the way down, the layer's index left out.

    Args:
        module: The module.
        per_layer: The lists of the configs that were met so far, by the configs' identities.
    """
    index, attributes = None, []
    for name, value in module.__dict__.items():
        if type(value) is int and name.endswith(_INDEX_NAMES):
            index = value if index is None else index
        elif name not in _INTERNAL:
            attributes.append((name, _comparable(value)))
    said = None if index is None else _said_of_layer(module.__dict__.get("config"), index, per_layer)
    tensors = [(name, _comparable(value)) for name, value in module._parameters.items()]
    buffers = [(name, _comparable(value)) for name, value in module._buffers.items()]
    children = [(n, None if child is None else likeness(child, per_layer)) for n, child in module._modules.items()]
    return type(module), tuple(attributes), said, tuple(tensors), tuple(buffers), tuple(children)


def _said_of_layer(config: Any, index: int, per_layer: dict[int, Any]) -> Any:
    """What the module's config says about the layer of its index, which a forward may look up."""
    if id(config) not in per_layer:
        values = vars(config) if hasattr(config, "__dict__") else {}
        # One entry (`architectures`) says nothing about the first layer alone.
        lists = [(n, value) for n, value in values.items() if type(value) in (list, tuple) and len(value) > 1]
        per_layer[id(config)] = lists
    return tuple([(n, _comparable(value[index])) for n, value in per_layer[id(config)] if index < len(value)])


def _comparable(value: Any) -> Any:
    kind = type(value)
    if kind in _ATOMS:
        return kind, value
    if issubclass(kind, torch.Tensor):
        return torch.Tensor, value.shape, value.dtype, value.requires_grad
    if kind in (tuple, list):
        return kind, tuple(map(_comparable, value))
    if kind in (dict, OrderedDict):
        return kind, tuple((key, _comparable(item)) for key, item in value.items())
    return kind, id(value)  # a function, a config: the same one or another one
