"""Transformers' rules for the checkpoints of one model, made without those of all others.

Transformers keeps the rules of every model in one table. The first load of a process makes it, and so compiles 900
regular expressions: 45 ms (AMD EPYC, 2026-11-29), of 100 that a load of a Qwen3-MoE costs beside its bytes. Here too
its own code makes the table, in 1 ms: a rule is made only when something is asked of it.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import cache, partial
from types import FunctionType
from typing import Any

from kernelgraft.errors import PlanError
from kernelgraft.functions import with_globals

# What Transformers' loading calls for its rules: for a model's, for those of one name, for the table; and the table.
_COLLECT = "get_model_conversion_mapping"
_ASK = "get_checkpoint_conversion_mapping"
_BUILD = "_build_checkpoint_conversion_mapping"
_TABLE = "_checkpoint_conversion_mapping_cache"


def with_own_rules(cls: Any) -> Callable[..., Any] | None:
    """A copy of Transformers' `from_pretrained` that makes the rules of its model alone.

    Args:
        cls: A model class.

    Returns:
        A function for a class method; `None` if the table was made before, or `from_pretrained` is not made of the
        functions that are known here.
    """
    method: Any = getattr(cls.from_pretrained, "__func__", None)
    collect: Any = getattr(inspect.unwrap(method), "__globals__", {}).get(_COLLECT) if method else None
    ask: Any = getattr(collect, "__globals__", {}).get(_ASK)
    names = getattr(ask, "__globals__", {})
    known = all(isinstance(each, FunctionType) for each in (method, collect, names.get(_BUILD)))
    if not known or names.get(_TABLE, ()) is not None:
        return None
    table = cache(partial(_table, names))

    def rules_of(name: str) -> Any:
        if names[_TABLE] is not None:  # made meanwhile: somebody has registered rules
            return ask(name)
        try:
            # As Transformers gives them: each time others, which the caller may write into.
            return copy.deepcopy([_made(rule) for rule in table()[name]]) if name in table() else None
        except Exception:  # what another version's code does is anything; with the whole table it only takes longer
            return ask(name)

    try:
        return with_globals(method, {_COLLECT: with_globals(collect, {_ASK: rules_of})})
    except PlanError:  # something around them keeps them out of sight
        return None


def _table(names: Mapping[str, Any]) -> Any:
    """Transformers' table, of rules that are not made yet."""
    from transformers.core_model_loading import WeightTransform

    rules = {name: each for name, each in names.items() if isinstance(each, type) and issubclass(each, WeightTransform)}
    return with_globals(names[_BUILD], {name: partial(_Unmade, rule) for name, rule in rules.items()})()


class _Unmade:
    """A rule that is made when something is asked of it."""

    def __init__(self, rule: type, *args: Any, **kwargs: Any) -> None:
        self._call: Any = rule, args, kwargs
        self._rule: Any = None

    def made(self) -> Any:
        """The rule, the same one each time; not by `functools.cache`, a thousand of which take 3 ms."""
        if self._rule is None:
            rule, args, kwargs = self._call
            self._rule = rule(*args, **kwargs)
        return self._rule

    def __getattr__(self, name: str) -> Any:
        if name in ("_call", "_rule"):  # not set yet, in a copy
            raise AttributeError(name)
        return getattr(self.made(), name)


def _made(rule: Any) -> Any:
    return rule.made() if isinstance(rule, _Unmade) else rule
