"""`kernelgraft export`."""

from pathlib import Path
from typing import Annotated

import typer

from kernelgraft.cli._model import AsJson
from kernelgraft.cli._output import console, print_json, working

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The kernel repository.")]


def command(folder: Folder, as_json: AsJson = False) -> None:
    """Write build/torch-*/ with metadata.json and digests, as the kernel hub has it and the kernels library loads it.

    For kernels in pure Python and Triton. What has to be compiled is built by kernel-builder.

    [bold]Examples[/]

    kernelgraft export ./my-kernel
    """
    from kernelgraft.authoring.export import export

    with working("exporting"):
        done = export(folder)
    if as_json:
        print_json(done.to_json())
        return
    lines = [f"{done.folder}/{name}: {len(done.digests[name])} files with their digests" for name in done.variants]
    console().print("\n".join(lines), markup=False, soft_wrap=True)
