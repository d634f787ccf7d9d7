"""`kernelgraft bench`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kernelgraft.cli._model import AsJson, Device, Dtype, Kernels, Model
from kernelgraft.cli._output import FOUND_A_FAULT, print_json
from kernelgraft.cli._verifying import (
    Inputs,
    NoWholeModel,
    Save,
    Seed,
    check_writable,
    load_graft,
    read_inputs,
    show,
    timed,
    verified,
)
from kernelgraft.errors import ConfigError

if TYPE_CHECKING:
    from kernelgraft.verify import Report

Verified = Annotated[
    Path | None,
    typer.Option(
        "--verified",
        metavar="FILE",
        help="What verify --save wrote of the same model and kernels; it is not run again.",
    ),
]
Tokens = Annotated[
    str, typer.Option("--tokens", "-t", metavar="LIST", help="Numbers of tokens to time, in a batch of one.")
]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Timed runs of each side.")]


def command(
    model: Model,
    kernels: Kernels,
    inputs: Inputs = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    tokens: Tokens = "1,32,512",
    repeats: Repeats = 20,
    seed: Seed = 0,
    verified_file: Verified = None,
    no_whole_model: NoWholeModel = False,
    as_json: AsJson = False,
    save: Save = None,
) -> None:
    """Time kernels and what they replace in turn: each kind of site, and the whole model.

    What verification has not passed is not timed: it runs first, and the exit code is 1 if it fails.

    [bold]Examples[/]

    kernelgraft bench Qwen/Qwen3-0.6B --kernels kernels.toml --device cuda --tokens 1,128,4096

    kernelgraft bench ./my-model -k kernels.toml --verified verified.json --save timed.json

    kernelgraft bench ./my-model -k kernels.toml --no-whole-model --json | jq '.rows[].speedup'
    """
    from kernelgraft.report import read_verification

    grid = read_tokens(tokens)
    check_writable(save)
    given = read_inputs(inputs)
    known = None if verified_file is None else read_verification(verified_file)
    if known is not None and not known.passed:
        _fail(known, as_json)
    graft = load_graft(model, kernels, device=device, dtype=dtype)
    known = known or verified(graft, given, whole_model=not no_whole_model, seed=seed)
    if not known.passed:
        _fail(known, as_json)
    report = timed(
        graft, given, tokens=grid, whole_model=not no_whole_model, repeats=repeats, seed=seed, verified=known
    )
    if save is not None:
        save.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(report.to_json())
    else:
        show(str(report))


def read_tokens(text: str) -> list[int]:
    """Numbers of tokens in a list with commas.

    Raises:
        ConfigError: One is no number from 1 on.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--tokens is {text!r}. Write numbers from 1 on, as in --tokens 1,32,512.")
    return [int(part) for part in parts]


def _fail(report: "Report", as_json: bool) -> None:
    """Show what verification found, and end."""
    if as_json:
        print_json({"timed": False, "verification": report.to_json()})
    else:
        show(f"Not timed, since verification failed.\n\n{report.summary()}")
    raise typer.Exit(FOUND_A_FAULT)
