"""`kernelgraft check`."""

from pathlib import Path
from typing import Annotated

import typer

from kernelgraft.cli._model import AsJson, read_config, skeleton_of
from kernelgraft.cli._output import FOUND_A_FAULT, console, print_json, working

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The kernel repository.")]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="MODEL", help="A model that has the modules: a folder, or a Hub id."),
]
Kernels = Annotated[
    Path | None,
    typer.Option("--kernels", "-k", metavar="FILE", help="What the kernels replace; by default DIR/kernels.toml."),
]


def command(folder: Folder, model: Model = None, kernels: Kernels = None, as_json: AsJson = False) -> None:
    """Say all that is wrong with a kernel repository at once, each with its fix.

    Its code, classes and metadata are looked at, and with a model also signatures, keywords that are dropped, rules,
    torch.compile, fake tensors and backward. Exit code 1 if there is an error; a warning is none.

    [bold]Examples[/]

    kernelgraft check ./my-kernel

    kernelgraft check ./my-kernel --model Qwen/Qwen3-0.6B --json | jq .findings
    """
    from kernelgraft.authoring.check import check

    config = None if kernels is None else read_config(kernels)
    with working("checking"):
        report = check(folder, None if model is None else skeleton_of(model), config)
    if as_json:
        print_json(report.to_json())
    else:
        console().print(str(report), markup=False, soft_wrap=True)
    if not report.passed:
        raise typer.Exit(FOUND_A_FAULT)
