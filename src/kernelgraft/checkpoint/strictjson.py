"""JSON of files that others wrote, read without trust: what is not right is a `CheckpointError` that names the file."""

import json
import reprlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernelgraft.errors import CheckpointError


def decoded(data: bytes, path: Path) -> str:
    """Text that was written as UTF-8.

    Raises:
        CheckpointError: It is not.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: its JSON is not UTF-8: {error}.") from None


def parsed(text: str, path: Path) -> dict[str, Any]:
    """The JSON object in a text, in which no name may stand twice.

    Raises:
        CheckpointError: It is not JSON, or no object.
    """
    try:
        found = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer if "-0" in text else None,  # a call per number, so only where it can matter
        )
        if "\\u" in text:
            _check_surrogates(found)
    except RecursionError:
        raise CheckpointError(f"{path}: its JSON is nested too deeply.") from None
    except ValueError as error:  # not JSON, a name twice, half a character, or a number too long for `int`
        raise CheckpointError(f"{path}: its JSON is not right: {error}.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: its JSON must be an object of names, not {shown(found)}.")
    return found


def texts(found: Any, path: Path, what: str) -> dict[str, str]:
    """An object whose values are texts, called `what` in the file.

    Raises:
        CheckpointError: It is something else.
    """
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: {what} must be an object of texts, not {shown(found)}.")
    for name, value in found.items():
        if not isinstance(value, str):
            raise CheckpointError(f"{path}: {what} has {shown(value)} under {shown(name)}, where a text must be.")
    return found


def shown(value: Any) -> str:
    """A value from a file for a message: quoted, and short whatever the file holds."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 200
    short.maxlist, short.maxlong, short.maxlevel = 16, 60, 3
    return short.repr(value)


def listed(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, number in Counter(name for name, _ in pairs).items() if number > 1)
        raise ValueError(f"{shown(twice)} stands twice in one object")
    return found


def _integer(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)  # no whole number to other JSON readers


def _check_surrogates(found: Any) -> None:
    """Refuses text that only JSON's escapes can write: half a character, which nothing else can read or write."""
    waiting = [found]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value)
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{shown(value)} has half a character") from None
