"""`kernelgraft new`."""

from pathlib import Path
from typing import Annotated

import typer

from kernelgraft.cli._model import AsJson, skeleton_of
from kernelgraft.cli._output import console, print_json, working

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="my-kernel or MyKernel: of the repository, or of the kernel.")
]
Replaces = Annotated[
    str | None, typer.Option("--replaces", metavar="CLASS", help="The class of the modules that it replaces.")
]
Fuses = Annotated[
    str | None,
    typer.Option("--fuses", metavar="CLASS,CLASS", help="The classes that it fuses, in the order of the data."),
]
Model = Annotated[
    str | None, typer.Option("--model", "-m", metavar="MODEL", help="A model that has them: a folder, or a Hub id.")
]
At = Annotated[
    str | None,
    typer.Option("--at", metavar="CHILD,CHILD", help="What their parent calls the fused modules, if that is unclear."),
]
Into = Annotated[Path, typer.Option("--into", metavar="DIR", help="The folder in which the repository is made.")]
Triton = Annotated[bool, typer.Option("--triton", help="Begin with a Triton kernel; on a CPU torch computes the same.")]
Merge = Annotated[
    bool, typer.Option("--merge/--no-merge", help="Whether gate and up of a gated MLP become one parameter.")
]


def command(
    name: Name,
    replaces: Replaces = None,
    fuses: Fuses = None,
    model: Model = None,
    at: At = None,
    into: Into = Path("."),
    triton: Triton = False,
    merge: Merge = True,
    as_json: AsJson = False,
) -> None:
    """Write a kernel repository that works at once: kernel, layout, rules, plain-torch reference, tests and card.

    What the modules compute is found by trying them on random numbers. Nothing is downloaded of a model's weights.

    [bold]Examples[/]

    kernelgraft new fast-norm --replaces RMSNorm

    kernelgraft new norm-mlp --fuses RMSNorm,MLP --model Qwen/Qwen3-0.6B --triton
    """
    from kernelgraft.authoring.new import new

    with working("writing the kernel"):
        made = new(
            name,
            replaces=replaces,
            fuses=_split(fuses),
            model=None if model is None else skeleton_of(model),
            folder=into,
            at=_split(at) or (),
            triton=triton,
            merge=merge,
        )
    if as_json:
        print_json(made.to_json())
        return
    folder, given = made.folder, model or "MODEL"
    lines = [f"{made.kernel}, in the place of {', then '.join(made.replaces)}, is in {folder}", ""]
    lines += [f"  {file}" for file in made.files if not file.startswith("build/")]
    lines += ["  build/ (what is published)", "", "Next:"]
    lines += [f"  {each}" for each in _next(folder, given)]
    console().print("\n".join(lines), markup=False, soft_wrap=True)


def _next(folder: str, model: str) -> list[str]:
    commands = [
        (f"pytest {folder}/tests", "against plain torch"),
        (f"kernelgraft check {folder} --model {model}", "all that is wrong with it"),
        (f"kernelgraft verify {model} --kernels {folder}/kernels.toml", "equality, on the model's activations"),
        (f"kernelgraft export {folder}", "after an edit: writes build/ anew"),
    ]
    width = max(len(each) for each, _ in commands)
    return [f"{each:<{width}}  # {why}" for each, why in commands]


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [each.strip() for each in text.split(",") if each.strip()]
