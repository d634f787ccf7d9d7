"""Which modules of a model an entry of a `KernelConfig` names.

Claims are collected on the untouched model: exact instances, by path, with class names and paths both checked.
Nothing here knows what a kernel is; `plan.py` decides which claims become sites.
"""

import difflib
import functools
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from kernelgraft.errors import PlanError
from kernelgraft.tree import ancestors

Pair = tuple[str, str]

_FAMILY_ENDINGS = ("Config", "PreTrainedModel", "PretrainedModel", "Model")
# A segment that is a number, and can be had back from it: "01" is a name.
_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]*)(?![^.])")


@dataclass(frozen=True)
class Claim:
    """The modules that one kernel would take over: `paths`, in the order of the config."""

    paths: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def is_fusion(self) -> bool:
        """Whether several modules become one."""
        return len(self.paths) > 1


@dataclass(frozen=True)
class NearMiss:
    """A module whose name suggests a kernel, and why it was not taken."""

    path: str
    class_name: str
    wanted: str
    reason: str


def answers_to(cls: type, name: str) -> bool:
    """Whether modules of class `cls` are what a config means by `name`.

    They are if the class carries `kernel_layer_name == name`, is called `name` or inherits from a class so called, or
    if its name is a model family's name followed by `name`: `Qwen3RMSNorm` is an `RMSNorm` because the module that
    defines it also defines `Qwen3Config`.
    """
    if getattr(cls, "kernel_layer_name", None) == name:
        return True
    if any(base.__name__ == name for base in cls.__mro__):
        return True
    prefix = cls.__name__.removesuffix(name)
    return prefix != cls.__name__ and any(_starts(family, prefix) for family in _families(cls))


class _Answers:
    """`answers_to`, asked once about each class and name."""

    def __init__(self) -> None:
        self._known: dict[tuple[type, str], bool] = {}

    def __call__(self, cls: type, name: str) -> bool:
        if (cls, name) not in self._known:
            self._known[cls, name] = answers_to(cls, name)
        return self._known[cls, name]


def names_of(cls: type) -> list[str]:
    """The names under which a config can ask for modules of class `cls`, the most general first."""
    names = [getattr(cls, "kernel_layer_name", None)]
    words = re.findall(r"[A-Z0-9][a-z0-9]*|[A-Z]+(?![a-z])", cls.__name__)
    for cut in range(len(words) - 1, 0, -1):
        prefix = "".join(words[:cut])
        suffix = cls.__name__.removeprefix(prefix)
        if suffix != cls.__name__ and any(_starts(family, prefix) for family in _families(cls)):
            names.append(suffix)
            break
    names.append(cls.__name__)
    return list(dict.fromkeys(name for name in names if name))


def _families(cls: type) -> list[str]:
    module = sys.modules.get(cls.__module__)
    return [name for name in vars(module) if name.endswith(_FAMILY_ENDINGS)] if module else []


def _starts(family: str, prefix: str) -> bool:
    rest = family[len(prefix) :]
    return bool(prefix) and family.startswith(prefix) and rest[:1].isupper()


def path_matches(pattern: str, path: str) -> bool:
    """Whether a path fits a pattern: `*` is one segment, `**` any number, none included; the rest is literal."""
    return bool(_path_regex(pattern).fullmatch(f"{path}." if path else ""))


@functools.lru_cache(maxsize=256)
def _path_regex(pattern: str) -> re.Pattern[str]:
    """The expression for a path that has a dot after each of its segments."""
    parts = {"*": r"[^.]+\.", "**": r"(?:[^.]+\.)*"}
    return re.compile("".join(parts.get(part, re.escape(part) + r"\.") for part in pattern.split(".")))


def find_modules(modules: Mapping[str, nn.Module], name: str) -> list[Claim]:
    """One claim for each module whose class answers to `name`."""
    answers = _Answers()
    return [Claim((path,), (name,)) for path, module in modules.items() if path and answers(type(module), name)]


def find_placed(modules: Mapping[str, nn.Module], pairs: Sequence[Pair], prefix: str) -> list[Claim]:
    """One claim for each parent that has all modules of a fusion, or the one that is named alone.

    Args:
        modules: The model's modules by path.
        pairs: `(class name, path pattern)` of each module; the patterns share their parent.
        prefix: The model's `base_model_prefix`, with and without which patterns are tried; "" for none.

    Raises:
        PlanError: No place matches; a parent lacks one of the children; or a module is there and its class does not
            answer to the name. The error lists what is there.
    """
    parent_pattern = pairs[0][1].rpartition(".")[0]
    children = tuple(pattern.rpartition(".")[2] for _, pattern in pairs)
    holders = _holders(modules, parent_pattern, children, prefix)
    if not holders:
        raise PlanError(_nothing_matches(modules, pairs))
    claims = []
    answers = _Answers()
    for parent in holders:
        paths = tuple(_join(parent, child) for child in children)
        for path, (name, pattern) in zip(paths, pairs, strict=True):
            if path not in modules or not answers(type(modules[path]), name):
                raise PlanError(_no_member(modules, path, name, pattern, pairs))
        claims.append(Claim(paths, tuple(name for name, _ in pairs)))
    return claims


def _holders(modules: Mapping[str, nn.Module], pattern: str, children: Sequence[str], prefix: str) -> list[str]:
    """The modules that the parents' pattern names and that have one of the children at least."""
    spellings = [pattern]
    if prefix:
        spellings.append(_join(prefix, pattern) if pattern else prefix)
        if pattern == prefix or pattern.startswith(prefix + "."):
            spellings.append(pattern[len(prefix) + 1 :])
    for spelling in spellings:
        parents = [path for path in modules if path_matches(spelling, path)] if spelling else [""]
        holders = [parent for parent in parents if any(_join(parent, child) in modules for child in children)]
        if holders:
            return holders
    return []


def _no_member(modules: Mapping[str, nn.Module], path: str, name: str, pattern: str, pairs: Sequence[Pair]) -> str:
    module = modules.get(path)
    if module is None:
        parent = path.rpartition(".")[0]
        there = sorted(child for child, _ in modules[parent].named_children())
        return (
            f"{_key(pairs)} asks for {path!r}, and {parent or 'the model'!r} "
            f"({type(modules[parent]).__name__}) has no such child. It has: {', '.join(there)}."
        )
    good = names_of(type(module))[0]
    return (
        f"({name!r}, {pattern!r}) names the path but not the class: at {path!r} stands a "
        f"{type(module).__name__}, which is no {name}. Write ({good!r}, {pattern!r}), or a pattern that leaves "
        f"{path!r} out."
    )


def _nothing_matches(modules: Mapping[str, nn.Module], pairs: Sequence[Pair]) -> str:
    lines = [f"{_key(pairs)} matches no module of the model."]
    for name, pattern in pairs:
        kinds = collapse_kinds(modules)
        near = difflib.get_close_matches(pattern, kinds, n=3, cutoff=0.4)
        near += [kind for kind, cls in kinds.items() if answers_to(cls, name) and kind not in near][:3]
        spelt = ", ".join(f"({names_of(kinds[kind])[0]!r}, {kind!r})" for kind in near) or "none"
        lines.append(f"  For ({name!r}, {pattern!r}) the nearest are: {spelt}.")
    return "\n".join(lines)


def _key(pairs: Sequence[Pair]) -> str:
    return f"The fusion {list(pairs)}" if len(pairs) > 1 else f"The key {pairs[0]}"


def no_module_message(modules: Mapping[str, nn.Module], name: str, functions: Sequence[str]) -> str:
    """The error text for a name to which no module and no function of the model answers."""
    classes = {type(module).__name__: names_of(type(module))[0] for path, module in modules.items() if path}
    known = sorted(set(classes.values()) | set(functions))
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.3)
    return (
        f"{name!r} matches no module of the model, and no function that it uses. "
        f"Nearest: {', '.join(near) or 'none'}. The model has: {', '.join(known)}."
    )


def collapse_kinds(modules: Mapping[str, nn.Module]) -> dict[str, type]:
    """Path patterns with `*` in place of numbers, and a class that stands there."""
    return {_NUMBER.sub("*", path): type(module) for path, module in modules.items() if path}


def near_misses(modules: Mapping[str, nn.Module], name: str, taken: set[str]) -> Iterator[NearMiss]:
    """Modules that a person might think `name` means, with the reason why they were not taken."""
    answers = _Answers()
    for path, module in modules.items():
        class_name = type(module).__name__
        if not path or path in taken or name.lower() not in class_name.lower():
            continue
        if answers(type(module), name):
            yield NearMiss(path, class_name, name, "no path pattern names it")
        elif class_name.endswith(name):
            prefix = class_name.removesuffix(name)
            yield NearMiss(path, class_name, name, f"{prefix!r} is not the start of a model family's name there")
        else:
            yield NearMiss(path, class_name, name, f"its class name does not end in {name!r}")


def check_overlaps(claims: Sequence[Claim], light: Collection[Claim] = ()) -> None:
    """Refuse claims of which one lies in, or is, another.

    Args:
        claims: All claims.
        light: Those of them that leave what is inside their module to itself.

    Raises:
        PlanError: Two claims want the same module, or one wants a module inside another's.
    """
    owner: dict[str, Claim] = {}
    for claim in claims:
        for path in claim.paths:
            if path in owner:
                raise PlanError(
                    f"{path!r} is asked for twice: by {_spelt(owner[path])} and by {_spelt(claim)}. "
                    f"Keep one of the two entries."
                )
            owner[path] = claim
    for path, claim in owner.items():
        for outer in ancestors(path):
            if outer in owner and owner[outer] not in light:
                raise PlanError(
                    f"{path!r}, asked for by {_spelt(claim)}, lies inside {outer!r}, asked for by "
                    f"{_spelt(owner[outer])}. One kernel takes a module over with all that is in it: keep one of the "
                    f"two entries."
                )


def _spelt(claim: Claim) -> str:
    return " + ".join(claim.names)


def _join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child


def collapse_paths(paths: Sequence[str]) -> str:
    """Paths written once with their running numbers as ranges: `model.layers.{0..29}.mlp`."""
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for path in paths:
        literal = tuple(_NUMBER.split(path))
        numbers = tuple(int(number) for number in _NUMBER.findall(path))
        groups.setdefault(literal, []).append(numbers)
    return ", ".join(_spell_group(literal, numbers) for literal, numbers in groups.items())


def _spell_group(literal: tuple[str, ...], numbers: list[tuple[int, ...]]) -> str:
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    size = 1
    for column in columns:
        size *= len(column)
    if size != len(set(numbers)):  # not a full grid: every path by itself
        return ", ".join("".join(_weave(literal, [str(n) for n in row])) for row in numbers)
    return "".join(_weave(literal, [_spell_numbers(column) for column in columns]))


def _weave(literal: Sequence[str], between: Sequence[str]) -> Iterator[str]:
    for index, text in enumerate(literal):
        yield text
        if index < len(between):
            yield between[index]


def _spell_numbers(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs) + "}"
