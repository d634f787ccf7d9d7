"""`kernelgraft lock`."""

from pathlib import Path
from typing import Annotated

import typer

from kernelgraft.cli._model import AsJson
from kernelgraft.cli._output import console, print_json, working

Config = Annotated[Path, typer.Argument(metavar="FILE", help="The kernel config, a TOML file.")]


def command(config: Config = Path("kernels.toml"), as_json: AsJson = False) -> None:
    """Pin every Hub kernel of a config to a commit and to its files' hashes, in FILE.lock beside it.

    Where a lock is, a load of anything else is refused: another commit, another content, a kernel that is not in it.
    Run it again to take newer commits. Nothing of the kernels is imported.

    [bold]Examples[/]

    kernelgraft lock kernels.toml
    """
    from kernelgraft.lock import lock

    with working("asking the Hub"):
        made = lock(config)
    if as_json:
        print_json(made.to_json())
        return
    lines = [
        f"{each.repository} at {each.revision}: commit {each.commit[:12]}, {len(each.files)} files"
        for each in made.kernels
    ]
    lines = lines or ["no kernel of the Hub in it: nothing else will be loaded from there"]
    console().print("\n".join([*lines, f"written to {made.path}"]), markup=False, soft_wrap=True)
