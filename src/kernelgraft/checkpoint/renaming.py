"""Transformers' rules for the names of one checkpoint, and whether they care which numbers are in a name."""

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

# What in a pattern can tell one number from others: a digit that is not part of a word such as `fc1`, a class that has
# digits, what stands for one character where a number can be, and several such things in a row.
_DIGITS = r"(?<!(?<!\\)[A-Za-z_0-9])[0-9]+|\[[^\]]*[0-9][^\]]*\]"
_CHARACTER = r"\\[dwS]|\[\^[^\]]*\]"
_SENSITIVE = re.compile(
    rf"(?:{_DIGITS}|{_CHARACTER})(?:[+*?]?(?:{_DIGITS}|{_CHARACTER}))+|{_DIGITS}|(?:{_CHARACTER})(?![+*])"
    r"|(?<=\.)\.(?![+*?])"
)
_NUMBER = re.compile(r"[0-9]+")


class Renaming:
    """Where the tensors of a checkpoint go in a model.

    Transformers' own code runs its rules, on copies: a rule notes down what it has met.

    Attributes:
        state: What the model has, by name.
        converters: The rules that make something of tensors, by their patterns.
        order: The key by which Transformers sorts names.
    """

    def __init__(self, model: Any, rules: list[Any], state: Mapping[str, torch.Tensor]) -> None:
        from transformers import core_model_loading as loading

        self.state = state
        self.order = loading.dot_natural_key
        self._prefix = model.base_model_prefix
        self._rename = loading.rename_source_key
        self._by_pattern = loading.WeightTransform.rename_source_key
        self._given = rules
        self._copies = copy.deepcopy(rules)
        self._renamings = [rule for rule in self._copies if isinstance(rule, loading.WeightRenaming)]
        self._converters = [rule for rule in self._copies if isinstance(rule, loading.WeightConverter)]
        self.converters = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        probes = copy.deepcopy([*self._renamings, *self._converters])
        self._probes = [(rule, _would_match_some_number(rule)) for rule in probes]

    def used(self) -> list[Any]:
        """The rules that met a name that they are for."""
        return [given for given, copied in zip(self._given, self._copies, strict=True) if copied.was_used()]

    def target(self, name: str) -> tuple[str, str | None]:
        """Where a tensor goes, and the pattern of the converter that takes it there, if one does."""
        found = self._renamed(name, self._renamings, self._converters)
        if found[0] not in self.state and name in self.state:
            return self._renamed(name, [], [])
        return found

    def _renamed(self, name: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        found: tuple[str, str | None] = self._rename(name, renamings, converters, self._prefix, self.state)
        return found

    def is_settled(self, name: str) -> bool:
        """Whether a name stays as it is if it is handed over once more, without the rules."""
        return self._renamed(name, [], [])[0] == name

    def is_blind_to_numbers(self, name: str) -> bool:
        """Whether the rules do to a name what they do to all names that differ from it in numbers alone.

        Then no rule that could be for one of them asks which number it sees, or knows more than its pattern says; and
        the text that a rule finds does not stand further in front, be it with other numbers: there it is replaced.
        """
        for rule, would_match in self._probes:
            before, found = name, rule._scoped_match(name)
            name, pattern = rule.rename_source_key(before)
            is_more = type(rule).rename_source_key is not self._by_pattern and (found is not None or name != before)
            if is_more or would_match(before) or (found is not None and _is_in_front(*found[1:])):
                return False
            if pattern is not None and hasattr(rule, "operations"):
                return True
        return True


def _is_in_front(text: str, found: re.Match[str]) -> bool:
    """Whether what was found stands before that place too, if numbers were others; text without numbers does not."""
    alike, numbers = _NUMBER.subn("[0-9]+", re.escape(found[0]))
    first = re.search(alike, text)
    return numbers > 0 and first is not None and first.start() < found.start()


def _would_match_some_number(rule: Any) -> Callable[[str], bool]:
    """Says of a name whether a rule that asks for certain numbers is for it, or would be if it had others."""
    scope = f"{rule.base_model_prefix or ''}.{rule.scope_prefix or ''}"
    patterns = [pattern.replace("*.", r".*\.") for pattern in rule.source_patterns]
    asking = [pattern for pattern in patterns if "{" in pattern or _SENSITIVE.search(pattern)]
    if not asking and not _SENSITIVE.search(scope):
        return lambda _: False
    # What is not to match says nothing when it is made to match more.
    beyond = [
        pattern
        for pattern in asking
        if re.search(r"\{|\(\?<?!|\\[0-9]", pattern) or (rule.scope_prefix and "^" in pattern)
    ]
    try:
        general = [_SENSITIVE.sub(lambda found: f"(?:{found[0]}|[0-9]+)", pattern) for pattern in asking]
        search = re.compile("|".join(f"(?:{pattern})" for pattern in general)).search
    except re.error:
        return lambda _: True
    return lambda name: bool(beyond) or search(name) is not None
