"""What the commands print: results to stdout, for people or as JSON; progress and errors to stderr."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

FOUND_A_FAULT = 1
WRONG_USE = 2


def console() -> Console:
    """The console that results go to; it wraps nothing where stdout is no terminal."""
    return Console(soft_wrap=not sys.stdout.isatty(), highlight=False)


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def complain(message: str) -> None:
    """An error message on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {_plain(message)}")


@contextmanager
def working(what: str) -> Iterator[None]:
    """Shows, on a terminal, that something that may take more than a second goes on."""
    shown = Console(stderr=True, highlight=False)
    if not shown.is_terminal:
        yield
        return
    with shown.status(what):
        yield


def _plain(text: str) -> str:
    """Text in which brackets are no markup."""
    return text.replace("[", r"\[")
