"""A layout's rules: read from its class, and run on the parameters of a site, lazy or not.

Two forms are read: `packing`, plain data, and `conversion_mapping`, Transformers' own rule objects (`mapping.py`).
Where a layout has both, `packing` wins.
"""

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kernelgraft.conversion.operations import OPERATIONS, Tensors, read_operation, run_operation
from kernelgraft.errors import ConversionError


@dataclass(frozen=True)
class Converted:
    """What rules made of a site's parameters.

    Attributes:
        packed: Packed name, relative to the host, to tensor: lazy, or plain if an operation had to compute it.
        untouched: The originals that no rule changed, under the keys they came with.
        origins: Packed name to the keys of the originals that went into it.
        unmatched: Indices of the rules that matched nothing.
    """

    packed: dict[str, torch.Tensor] = field(default_factory=dict)
    untouched: dict[str, torch.Tensor] = field(default_factory=dict)
    origins: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unmatched: tuple[int, ...] = ()


class Rules(ABC):
    """The rules of one layout."""

    @abstractmethod
    def run(
        self,
        originals: Mapping[str, torch.Tensor],
        paths: Sequence[str],
        host: str,
        *,
        prefix: str = "",
        model: Any = None,
        config: Any = None,
        packed_names: Collection[str] | None = None,
    ) -> Converted:
        """Converts the parameters of one site.

        Args:
            originals: Tensors by `"{i}.{name}"`: the index of the member, and the name within it.
            paths: The full path of each member in its model.
            host: The path at which the layout will stand.
            prefix: The model's `base_model_prefix`, tried before (or off) the full names where nothing matches as is.
            model: What operations of Transformers get as `model`.
            config: What operations of Transformers get as `config`.
            packed_names: Names of the layout's parameters and buffers, for checking names that do not exist.

        Raises:
            ConversionError: If a rule cannot be applied, naming the rule and the parameter.
        """

    @abstractmethod
    def describe(self) -> str:
        """All rules in short, for messages."""


def read_rules(layout: type, arguments: tuple[str, ...] = ()) -> Rules:
    """Reads the rules of a layout class.

    Args:
        layout: The class.
        arguments: For a fusion the names of the arguments of its `__init__` that take the members, in their order; for
            a single module nothing.

    Raises:
        ConversionError: If the rules cannot be read.
    """
    packing = getattr(layout, "packing", None)
    if packing is not None:
        return read_packing(packing, f"{layout.__name__}.packing", arguments)
    mapping = getattr(layout, "conversion_mapping", None)
    if mapping is not None:
        from kernelgraft.conversion.mapping import read_mapping  # it takes Rules and Converted from here

        return read_mapping(mapping, f"{layout.__name__}.conversion_mapping")
    return Packing(f"{layout.__name__} (no rules)", arguments, ())


@dataclass(frozen=True)
class Entry:
    """One entry of a `packing`: what is packed, and the steps from its sources to it."""

    packed: str
    sources: tuple[str, ...]
    operations: tuple[tuple[str, tuple[Any, ...]], ...]
    where: str

    def describe(self) -> str:
        """The entry in short."""
        steps = "".join(f" -> {name}{arguments}" for name, arguments in self.operations)
        return f"{self.packed} <- {', '.join(self.sources)}{steps}"


@dataclass(frozen=True)
class Packing(Rules):
    """Rules given as plain data."""

    where: str
    arguments: tuple[str, ...]
    entries: tuple[Entry, ...]

    def run(
        self,
        originals: Mapping[str, torch.Tensor],
        paths: Sequence[str],
        host: str,
        *,
        prefix: str = "",
        model: Any = None,
        config: Any = None,
        packed_names: Collection[str] | None = None,
    ) -> Converted:
        """See `Rules.run`; plain data speaks of the members by name, so that paths, model and config play no part."""
        del paths, host, prefix, model, config
        names = {self._written(key): key for key in originals}
        packed, origins, unmatched = {}, {}, []
        for i, entry in enumerate(self.entries):
            groups = [_matching(source, names) for source in entry.sources]
            missing = [source for source, group in zip(entry.sources, groups, strict=True) if not group]
            # A bias, say, that neither this site nor the layout built for it has.
            if len(missing) == len(groups) and entry.packed not in (packed_names or ()):
                unmatched.append(i)
                continue
            if missing:
                raise ConversionError(_missing(entry, missing, list(names)))
            with torch.no_grad():
                packed[entry.packed] = _run(entry, [[originals[names[name]] for name in group] for group in groups])
            origins[entry.packed] = tuple(names[name] for group in groups for name in group)
        used = {key for keys in origins.values() for key in keys}
        untouched = {key: tensor for key, tensor in originals.items() if key not in used}
        return Converted(packed, untouched, origins, tuple(unmatched))

    def describe(self) -> str:
        """All entries in short, for messages."""
        return f"{self.where}: " + "; ".join(entry.describe() for entry in self.entries)

    def _written(self, key: str) -> str:
        """The name by which plain data calls an original: `norm.weight` for `0.weight` where member 0 is `norm`."""
        index, _, local = key.partition(".")
        return f"{self.arguments[int(index)]}.{local}" if self.arguments else local


def read_packing(packing: Any, where: str, arguments: tuple[str, ...]) -> Packing:
    """Reads plain-data rules.

    Raises:
        ConversionError: If they are not written as they must be, or name a member that the layout does not take.
    """
    if not isinstance(packing, Mapping):
        raise ConversionError(
            f"{where} is a {type(packing).__name__}; write a dict such as "
            '{"gate_up_proj.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"]}.'
        )
    return Packing(where, arguments, tuple(_read_entry(k, v, f"{where}[{k!r}]", arguments) for k, v in packing.items()))


def _read_entry(packed: Any, value: Any, where: str, arguments: tuple[str, ...]) -> Entry:
    sources, operations = (value, None) if not isinstance(value, Mapping) else _read_mapping(value, where)
    sources = [sources] if isinstance(sources, str) else sources
    listed = isinstance(sources, (list, tuple)) and len(sources) > 0
    if not isinstance(packed, str) or not listed or not all(isinstance(source, str) for source in sources):
        raise ConversionError(
            f"{where} is {value!r}; write the packed name and one original name, a list of names, or "
            '{"sources": names, "operations": [["transpose", 0, 1]]}.'
        )
    if "*" in packed:
        raise ConversionError(f"{where} has a * in the packed name; only the original names may have one.")
    for source in sources:
        if arguments and source.partition(".")[0] not in arguments:
            raise ConversionError(
                f"{where} names {source!r}, and the layout's __init__ takes {', '.join(arguments)}; "
                f"write <argument>.<name in that module>, such as {arguments[0]}.weight."
            )
    several = len(sources) > 1 or "*" in sources[0]
    if operations is None:
        operations = [["concatenate", 0]] if several else []
    return Entry(packed, tuple(sources), tuple(read_operation(op, where) for op in operations), where)


def _read_mapping(value: Mapping[str, Any], where: str) -> tuple[Any, Any]:
    unknown = [key for key in value if key not in ("sources", "operations")]
    if unknown or "sources" not in value:
        raise ConversionError(f"{where} has the keys {list(value)}; it takes 'sources' and 'operations'.")
    operations = value.get("operations")
    if operations is not None and not isinstance(operations, (list, tuple)):
        raise ConversionError(f'{where} has operations {operations!r}; write a list of lists, [["transpose", 0, 1]].')
    return value["sources"], operations


def _matching(source: str, names: Collection[str]) -> list[str]:
    """The names that a source names, in natural numeric order if it has a `*` (one segment)."""
    if "*" not in source:
        return [source] if source in names else []
    pattern = re.compile(re.escape(source).replace(r"\*", r"[^.]+"))
    return sorted(filter(pattern.fullmatch, names), key=natural)


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key by which `experts.2` comes before `experts.10`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _missing(entry: Entry, missing: list[str], names: list[str]) -> str:
    near = list(dict.fromkeys(close for source in missing for close in difflib.get_close_matches(source, names, 2)))
    hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(names) or 'no parameters'}."
    return f"{entry.where} asks for {', '.join(missing)}, which this site does not have; {hint}"


def _run(entry: Entry, groups: list[Tensors]) -> torch.Tensor:
    """Runs the operations of an entry; with a `*` the first merge is of what each name stands for, then of these."""
    nested = any("*" in source for source in entry.sources)
    for name, arguments in entry.operations:
        if OPERATIONS[name].merges and not nested:
            groups = [[tensor for group in groups for tensor in group]]
        groups = [run_operation(name, arguments, group, entry.where) for group in groups]
        nested = nested and not OPERATIONS[name].merges
    # Left out operations mean one concatenation of everything.
    tensors = [tensor for group in groups for tensor in group]
    if len(tensors) > 1 and entry.operations == (("concatenate", (0,)),):
        tensors = run_operation("concatenate", (0,), tensors, entry.where)
    if len(tensors) != 1:
        raise ConversionError(
            f"{entry.where} leaves {len(tensors)} tensors after its operations, and one is packed; "
            'add ["concatenate", 0] or ["stack", 0].'
        )
    return tensors[0]
