"""What `verify` and `bench` have in common: the model with its kernels, its inputs, and a verification with a bar."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kernelgraft.cli._model import load_model
from kernelgraft.cli._output import console, progressing
from kernelgraft.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from kernelgraft.benchmark import Report as Timed
    from kernelgraft.graft import Graft
    from kernelgraft.verify import Report

Inputs = Annotated[
    Path | None,
    typer.Option(
        "--inputs",
        "-i",
        metavar="FILE",
        help="A safetensors file with the tensors that the model's forward takes, under the names of its keywords; "
        "left out, inputs are drawn.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="What is drawn is drawn with it.")]
Save = Annotated[Path | None, typer.Option("--save", metavar="FILE", help="Write the report as JSON here too.")]
NoWholeModel = Annotated[bool, typer.Option("--no-whole-model", help="Leave the whole model out.")]


def load_graft(model: str, kernels: Path, *, device: str, dtype: str) -> "Graft":
    """The graft of a model that was loaded with kernels.

    Raises:
        ConfigError: The config puts none into it.
    """
    from kernelgraft.graft import graft_of

    graft = graft_of(load_model(model, kernels, device=device, dtype=dtype))
    if graft is None or not graft.calls.sites:
        raise ConfigError(
            f"{str(kernels)!r} puts no kernel into {model} on {device}, so there is nothing to try. "
            f"See kernelgraft plan {model} --kernels {kernels}."
        )
    return graft


def read_inputs(file: Path | None) -> "dict[str, torch.Tensor] | None":
    """Keyword tensors of a safetensors file.

    Raises:
        ConfigError: There is none in that place.
    """
    if file is None:
        return None
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"--inputs {file} cannot be read as safetensors: {error}. Write it with "
            f'safetensors.torch.save_file({{"input_ids": tokens}}, {str(file)!r}).'
        ) from error


def read_dtypes(text: str | None) -> "list[torch.dtype] | None":
    """Dtypes in a list with commas.

    Raises:
        ConfigError: One is no floating dtype.
    """
    import torch

    found = []
    for name in text.split(",") if text is not None else ():
        dtype = getattr(torch, name.strip(), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ConfigError(
                f"--dtypes has {name.strip()!r}, which is no floating dtype of torch. Write for example "
                f"--dtypes float32,bfloat16."
            )
        found.append(dtype)
    return found if text is not None else None


def verified(graft: "Graft", inputs: Any, **options: Any) -> "Report":
    """Verify, with a bar on a terminal."""
    from kernelgraft.verify import verify

    with progressing("verifying") as progress:
        return verify(graft, inputs, progress=progress, **options)


def timed(graft: "Graft", inputs: Any, **options: Any) -> "Timed":
    """Benchmark, with a bar on a terminal."""
    from kernelgraft.benchmark import benchmark

    with progressing("timing") as progress:
        return benchmark(graft, inputs, progress=progress, **options)


def check_writable(*files: Path | None) -> None:
    """Look at where results shall go before hours are spent on them.

    Raises:
        ConfigError: A file's folder is not there, or the file is a folder.
    """
    for file in files:
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise ConfigError(
                f"{file} cannot be written: {'it is' if file.is_dir() else 'there is no'} folder. Name another."
            )


def show(text: str) -> None:
    """Text of a report on stdout, its verdicts in colour."""
    from rich.text import Text

    styled = Text(text)
    styled.highlight_regex(r"\bpassed\b", "green")
    styled.highlight_regex(r"\b(FAILED|FAILS|WRONG)\b", "bold red")
    console().print(styled, soft_wrap=True)
