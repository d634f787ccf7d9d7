"""Where every packed parameter comes from: a layout's rules run on names and shapes alone.

Names of originals are `<member's index>.<name>` here, so that one program serves all sites of a kind.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from kernelgraft.contents import Contents
from kernelgraft.conversion.lazy import LazyTensor, TensorSource
from kernelgraft.conversion.program import Program
from kernelgraft.conversion.rules import Converted, Rules
from kernelgraft.errors import PlanError
from kernelgraft.layouts import Made


def argument_names(layout: type[nn.Module], count: int) -> tuple[str, ...]:
    """The names by which plain-data rules call the members: the first `count` arguments of the layout's `__init__`.

    Raises:
        PlanError: `__init__` takes fewer.
    """
    if count == 1:
        return ("",)
    code = layout.__init__.__code__
    names = code.co_varnames[1 : code.co_argcount]
    if len(names) < count:
        raise PlanError(
            f"{layout.__name__}.__init__({', '.join(names)}) takes {len(names)} modules, and the fusion has {count}. "
            f"It gets the member modules in the order of the config's tuple."
        )
    return names[:count]


def trace_program(
    rules: Rules,
    made: Made,
    paths: Sequence[str],
    members: Sequence[Contents],
    host: int,
    model: nn.Module,
    prefix: str,
) -> tuple[Program, tuple[str, ...]]:
    """Run a layout's rules on names and shapes, and prove that they fill it and lose nothing.

    Args:
        rules: The layout's rules.
        made: The layout, on the meta device.
        paths: The members' paths in the model.
        members: The original modules and what is in them.
        host: Index of the member where the layout will stand.
        model: The model, which operations of Transformers may ask for shapes.
        prefix: The model's `base_model_prefix`.

    Returns:
        Where each packed parameter comes from, and the originals that the layout drops by name.

    Raises:
        PlanError: A packed parameter is not filled exactly once, an original is lost, or a shape does not fit.
    """
    originals = originals_of(members)
    lazies = {name: LazyTensor.of(TensorSource(name, tensor)) for name, tensor in originals.items()}
    converted = rules.run(
        lazies,
        paths,
        paths[host],
        prefix=prefix,
        model=model,
        config=getattr(model, "config", None),
        packed_names=[name for name, _ in made.contents.shapes],
    )
    outputs = _assign_targets(converted, made, lazies, paths, host)
    used = _used(outputs, lazies, converted.origins)
    program = Program.trace(outputs, {name: lazies[name] for name in used}, converted.origins)
    program.check_filled()
    layout = type(made.layout)
    dropped = tuple(getattr(layout, "dropped", ()))
    parameters = {f"{index}.{name}" for index, member in enumerate(members) for name in member.parameters}
    unused = [name for name in originals if name in parameters and name not in program.sources]
    known = {name for name in unused if _spellings(name, argument_names(layout, len(members))) & set(dropped)}
    lost = [name for name in unused if name not in known]
    if lost:
        spelt = ", ".join(full_name(name, paths) for name in lost)
        raise PlanError(
            f"{spelt} would be lost: no rule of {layout.__name__} uses it. Add a rule, or list it: dropped = "
            f"({', '.join(repr(_spelt(name, argument_names(layout, len(members)))) for name in lost)},)."
        )
    return program, tuple(name for name in unused if name in known)


def _assign_targets(
    converted: Converted, made: Made, lazies: Mapping[str, torch.Tensor], paths: Sequence[str], host: int
) -> dict[str, torch.Tensor]:
    """A value for every parameter and persistent buffer of the layout: by rule, by being a member's own, by name."""
    layout = made.layout
    names = argument_names(type(layout), len(paths))
    by_name: dict[str, str] = {}
    for key in converted.untouched:
        for spelling in _spellings(key, names):
            by_name.setdefault(spelling, key)
    wanted: dict[str, torch.Tensor] = dict(made.contents.parameters)
    wanted |= {name: buffer for name, buffer in made.contents.buffers.items() if name in made.contents.saved}
    extra = [name for name in converted.packed if name not in wanted]
    if extra:
        raise PlanError(
            f"The rules of {type(layout).__name__} make {', '.join(extra)} at {paths[host]!r}, which it does not have. "
            f"It has: {', '.join(wanted)}."
        )
    outputs: dict[str, torch.Tensor] = {}
    for name, target in wanted.items():
        if name in converted.packed:
            outputs[name] = converted.packed[name]
        elif name in made.kept and made.kept[name] in converted.untouched:
            outputs[name] = lazies[made.kept[name]]
        elif name in by_name and lazies[by_name[name]].shape == target.shape:
            outputs[name] = lazies[by_name[name]]
        else:
            left = ", ".join(f"{_spelt(key, names)} {list(lazies[key].shape)}" for key in converted.untouched)
            raise PlanError(
                f"Nothing fills {type(layout).__name__}.{name} {list(target.shape)} at {paths[host]!r}: no rule makes "
                f"it and no parameter of that name and shape is left. Left are: {left or 'none'}. Add a rule to its "
                f"packing or conversion_mapping."
            )
        if outputs[name].shape != target.shape:
            raise PlanError(
                f"{type(layout).__name__}.{name} at {paths[host]!r} has shape {list(target.shape)}, and its rule makes "
                f"{list(outputs[name].shape)}. Correct the rule, or the shape in the layout's __init__."
            )
    return outputs


def _used(
    outputs: Mapping[str, torch.Tensor], lazies: Mapping[str, torch.Tensor], origins: Mapping[str, Sequence[str]]
) -> list[str]:
    used = {source.name for output in outputs.values() if isinstance(output, LazyTensor) for source in output.sources}
    used |= {name for target in outputs for name in origins.get(target, ())}
    return [name for name in lazies if name in used]


def names_places(layout: type[nn.Module]) -> bool:
    """Whether a rule names a certain layer (`model.layers.0.`), so that sites of one kind may convert differently."""
    rules = getattr(layout, "conversion_mapping", None) or ()
    patterns = [pattern for rule in rules for pattern in getattr(rule, "source_patterns", ())]
    return any(re.search(r"\.\d", pattern) for pattern in patterns)


def originals_of(members: Sequence[Contents]) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of the members, by `<member's index>.<name>`."""
    return {f"{index}.{name}": tensor for index, member in enumerate(members) for name, tensor in member.saved.items()}


def _spellings(key: str, names: Sequence[str]) -> set[str]:
    """How an original may be called inside its layout: `norm.weight` or `weight`."""
    index, _, local = key.partition(".")
    name = names[int(index)]
    return {local, f"{name}.{local}"} if name else {local}


def _spelt(key: str, names: Sequence[str]) -> str:
    index, _, local = key.partition(".")
    return f"{names[int(index)]}.{local}" if names[int(index)] else local


def full_name(key: str, paths: Sequence[str]) -> str:
    """The name in the model of the original called `key`."""
    index, _, local = key.partition(".")
    return f"{paths[int(index)]}.{local}"
