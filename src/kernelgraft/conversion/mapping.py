r"""Transformers' rule objects as rules of a layout.

They are read by their attributes, so that Transformers need not be installed. Their meaning is kept: regular
expressions that are searched for over full parameter names; renamings chained in their order; then the first converter
that matches; the matched text replaced once by the target. Beyond it, a target may use every group of its source,
`\1` to `\9`, where Transformers fills only `\1`.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kernelgraft.conversion.rules import Converted, Rules, natural
from kernelgraft.errors import ConversionError


@dataclass(frozen=True)
class Rule:
    """One rule object, and the place at which it is written."""

    index: int
    spec: Any
    where: str

    @property
    def converts(self) -> bool:
        """Whether it runs operations, and does not only rename."""
        return hasattr(self.spec, "operations")

    @property
    def sources(self) -> list[str]:
        """Its source patterns."""
        return _listed(self.spec.source_patterns)

    @property
    def targets(self) -> list[str]:
        """Its target patterns."""
        return _listed(self.spec.target_patterns)

    def describe(self) -> str:
        """The rule in short."""
        return f"{self.where}[{self.index}] ({', '.join(self.sources)} -> {', '.join(self.targets)})"

    def rename(self, name: str) -> "Match | None":
        """What the rule makes of a name, None if it does not match it."""
        if self._has_own_way():
            renamed, pattern = self.spec.rename_source_key(name)
            return None if pattern is None else Match(renamed, pattern, self.targets)
        compiled = getattr(self.spec, "compiled_sources", None) or _compile(self.sources)
        match = compiled.search(name)
        if match is None:
            return None
        branch = next(group for group, text in match.groupdict().items() if text is not None)
        pattern = self.sources[int(branch[1:])]
        groups = _groups(match, branch, pattern)
        targets = [self._filled(target, groups, name) for target in self.targets]
        return Match(name.replace(match.group(0), targets[0], 1), pattern, targets)

    def _has_own_way(self) -> bool:
        """Whether a subclass renames in a way of its own, or only under a scope; then its method is asked."""
        if not hasattr(self.spec, "rename_source_key"):
            return False
        owner = next(cls for cls in type(self.spec).__mro__ if "rename_source_key" in vars(cls))
        return owner.__name__ != "WeightTransform" or getattr(self.spec, "scope_prefix", None) is not None

    def _filled(self, target: str, groups: Sequence[str], name: str) -> str:
        def group(reference: re.Match[str]) -> str:
            number = int(reference.group(1))
            if number > len(groups):
                raise ConversionError(
                    f"{self.describe()} uses \\{number} in {target!r}, and the pattern that matched {name} has "
                    f"{len(groups)} groups; put what is to be kept in parentheses."
                )
            return groups[number - 1]

        return re.sub(r"\\([1-9])", group, target)


@dataclass(frozen=True)
class Match:
    """A name after a rule: the new name, the source pattern that matched, and the targets with their groups filled."""

    renamed: str
    pattern: str
    targets: list[str]


@dataclass
class Gathered:
    """What one converter runs on: tensors by source pattern, on their way to one name."""

    rule: Rule
    name: str
    targets: list[str]
    tensors: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    keys: list[str] = field(default_factory=list)


def _listed(patterns: Any) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _compile(sources: list[str]) -> re.Pattern[str]:
    """One expression of all source patterns, as Transformers builds it."""
    branches = []
    for i, source in sorted(enumerate(sources), key=lambda item: -len(item[1])):
        pattern = source.replace("*.", r".*\.")
        # A pattern that ends on a letter or digit ends on a name boundary.
        boundary = r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", pattern) else ""
        branches.append(f"(?P<g{i}>{pattern}{boundary})")
    return re.compile("|".join(branches))


def _groups(match: re.Match[str], branch: str, pattern: str) -> list[str]:
    """The texts of a source pattern's own groups, which follow the group of its branch."""
    first = match.re.groupindex[branch] + 1
    return [match.group(first + k) or "" for k in range(re.compile(pattern.replace("*.", r".*\.")).groups)]


def read_mapping(mapping: Any, where: str) -> "RuleObjects":
    """Reads a `conversion_mapping`.

    Raises:
        ConversionError: If it is no list, or an entry is no rule object.
    """
    if not isinstance(mapping, (list, tuple)):
        raise ConversionError(
            f"{where} is a {type(mapping).__name__}; write a list of WeightRenaming and WeightConverter objects, "
            "or plain data in `packing`."
        )
    for i, spec in enumerate(mapping):
        if spec is None:
            raise ConversionError(
                f"{where}[{i}] is None: the import of Transformers' rule classes most likely failed where the layout "
                "is defined. Install transformers, or write the rules as plain data in `packing`."
            )
        if isinstance(spec, type) or not (hasattr(spec, "source_patterns") and hasattr(spec, "target_patterns")):
            raise ConversionError(
                f"{where}[{i}] is {spec!r}, which has no source_patterns and target_patterns; write a WeightRenaming "
                "or WeightConverter object, or plain data in `packing`."
            )
    return RuleObjects(where, tuple(mapping))


@dataclass(frozen=True)
class RuleObjects(Rules):
    """Rules given as Transformers' `WeightRenaming` and `WeightConverter` objects."""

    where: str
    specs: tuple[Any, ...]

    def describe(self) -> str:
        """All rules in short, for messages."""
        return "; ".join(rule.describe() for rule in self._rules())

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
        """See `Rules.run`; a pattern may match nothing, so that `packed_names` plays no part."""
        del packed_names
        names = {key: _full_name(key, paths) for key in originals}
        runs: list[tuple[_Run, str]] = []
        for added, removed in _prefixes(prefix, names.values()):
            seen = {key: added + name.removeprefix(removed) for key, name in names.items()}
            run = _Run(self._rules(), originals, seen)
            runs.append((run, added + (f"{host}.".removeprefix(removed) if host else "")))
        # A rule over an ending matches with and without the prefix, one over a whole path in one of the two only.
        run, seen_host = max(runs, key=lambda each: len(each[0].matched))
        return run.result(seen_host, model, config)

    def _rules(self) -> list[Rule]:
        # Some rules keep state while they rename; those of the layout are left as they are.
        return [Rule(i, copy.deepcopy(spec), self.where) for i, spec in enumerate(self.specs)]


def _full_name(key: str, paths: Sequence[str]) -> str:
    index, _, local = key.partition(".")
    path = paths[int(index)]
    return f"{path}.{local}" if path else local


def _prefixes(prefix: str, names: Collection[str]) -> list[tuple[str, str]]:
    """What to put before the names and what to take off, in the order in which it is tried."""
    tried = [("", "")]
    if prefix:
        tried.append((f"{prefix}.", ""))
        if all(name.startswith(f"{prefix}.") for name in names):
            tried.append(("", f"{prefix}."))
    return tried


class _Run:
    """The rules at work on one site: every name renamed, every converter's tensors gathered."""

    def __init__(self, rules: list[Rule], originals: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> None:
        self.rules = rules
        self.matched: set[int] = set()
        self.untouched: dict[str, torch.Tensor] = {}
        self.renamed: dict[str, tuple[str, Rule, torch.Tensor]] = {}
        self.gathered: dict[tuple[int, str], Gathered] = {}
        self.names = names
        # Lists of modules come in their numeric order, as Transformers reads a checkpoint.
        for key in sorted(originals, key=lambda key: natural(names[key])):
            self._take(key, names[key], originals[key])

    def _take(self, key: str, name: str, tensor: torch.Tensor) -> None:
        renamed, last = name, None
        for rule in self.rules:
            match = None if rule.converts else rule.rename(renamed)
            if match is not None:
                self.matched.add(rule.index)
                renamed, last = match.renamed, rule
        for rule in self.rules:
            match = rule.rename(renamed) if rule.converts else None
            if match is not None:
                self.matched.add(rule.index)
                new = Gathered(rule, match.renamed, match.targets)
                group = self.gathered.setdefault((rule.index, match.renamed), new)
                group.tensors[match.pattern].append(tensor)
                group.keys.append(key)
                return
        if last is None or renamed == name:
            self.untouched[key] = tensor
        else:
            self.renamed[key] = (renamed, last, tensor)

    def result(self, host: str, model: Any, config: Any) -> Converted:
        """Runs the converters, and makes the names relative to the host (which ends with a dot)."""
        converted = Converted(untouched=self.untouched, unmatched=self._unmatched())
        for key, (name, rule, tensor) in self.renamed.items():
            self._put(converted, host, name, tensor, rule, (key,))
        for group in self.gathered.values():
            with torch.no_grad():
                made = _convert(group, model, config)
            for name, tensor in made.items():
                self._put(converted, host, name, tensor, group.rule, tuple(group.keys))
        return converted

    def _unmatched(self) -> tuple[int, ...]:
        return tuple(rule.index for rule in self.rules if rule.index not in self.matched)

    def _put(
        self, converted: Converted, host: str, name: str, tensor: torch.Tensor, rule: Rule, keys: tuple[str, ...]
    ) -> None:
        from_names = ", ".join(self.names[key] for key in keys)
        if not name.startswith(host):
            raise ConversionError(
                f"{rule.describe()} makes {name!r} of {from_names}, and the layout stands at {host.rstrip('.')!r}; "
                f"write a target that begins with that path, such as {host}weight."
            )
        local = name.removeprefix(host)
        if local in converted.packed:
            before = ", ".join(self.names[key] for key in converted.origins[local])
            raise ConversionError(
                f"{rule.describe()} makes {name!r} of {from_names}, which is also made of {before}; "
                "write patterns of which only one leads to each name."
            )
        converted.packed[local] = tensor
        converted.origins[local] = keys


def _convert(group: Gathered, model: Any, config: Any) -> dict[str, torch.Tensor]:
    """Runs a converter's operations as `WeightConverter.convert` does; results by full name."""
    collected: dict[str, Any] = dict(group.tensors)
    for op in group.rule.spec.operations:
        try:
            collected = op.convert(
                collected,
                source_patterns=group.rule.sources,
                target_patterns=group.targets,
                full_layer_name=group.name,
                model=model,
                config=config,
                missing_keys=None,
            )
        except Exception as error:
            raise ConversionError(
                f"{group.rule.describe()}: the operation {op!r} failed on the way to {group.name}: "
                f"{type(error).__name__}: {error}. Correct the rule or its operations."
            ) from error
    full_name = group.name.replace("*.", "0.")
    expanding = next((target for target in collected if target in full_name), None)
    before, _, after = full_name.partition(expanding) if expanding is not None else ("", "", "")
    return {f"{before}{target}{after}": _single(value, group) for target, value in collected.items()}


def _single(value: Any, group: Gathered) -> torch.Tensor:
    tensors = value if isinstance(value, (list, tuple)) else [value]
    if len(tensors) != 1 or not isinstance(tensors[0], torch.Tensor):
        raise ConversionError(
            f"{group.rule.describe()} gives {len(tensors)} tensors for {group.name}, and one is packed; "
            "add an operation that merges them, such as Concatenate(dim=0)."
        )
    return tensors[0]
