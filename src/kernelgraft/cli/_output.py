"""What the commands print: results to stdout, for people or as JSON; progress and errors to stderr."""

import json
import sys
from collections.abc import Callable, Iterator
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
    """Shows a bar on a terminal, for what cannot say how much of it is done."""
    with progressing(what):
        yield


@contextmanager
def progressing(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Shows a bar on a terminal; gives what is to be told what comes next, how much is done, and of how much."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    shown = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(20), TimeElapsedColumn())
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda part, done, total: bar.update(task, description=f"{what}: {part}", completed=done, total=total)


def _plain(text: str) -> str:
    """Text in which brackets are no markup."""
    return text.replace("[", r"\[")
