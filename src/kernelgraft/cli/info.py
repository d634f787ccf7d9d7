"""`kernelgraft info`."""

from kernelgraft.cli._model import AsJson
from kernelgraft.cli._output import console, print_json


def command(as_json: AsJson = False) -> None:
    """Show the versions of what kernelgraft works with, and the devices that it finds.

    [bold]Examples[/]

    kernelgraft info

    kernelgraft info --json
    """
    from rich.table import Table

    from kernelgraft.environment import environment

    found = environment()
    if as_json:
        print_json(found)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in found.items():
        table.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    console().print(table)
