"""`kernelgraft verify`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kernelgraft.cli._model import AsJson, Device, Dtype, Kernels, Model
from kernelgraft.cli._output import FOUND_A_FAULT, print_json, progressing
from kernelgraft.cli._verifying import (
    Inputs,
    NoWholeModel,
    Save,
    Seed,
    check_writable,
    load_graft,
    read_dtypes,
    read_inputs,
    show,
    verified,
)
from kernelgraft.errors import ConfigError, GraftError, VerificationError

if TYPE_CHECKING:
    from kernelgraft.graft import Graft
    from kernelgraft.verify import Bisection, Report, Repro

REPRO = Path("kernelgraft-repro")
"""Where `--bisect` writes a repro if no other folder is named."""

Dtypes = Annotated[
    str | None,
    typer.Option(
        "--dtypes",
        metavar="LIST",
        help="What to try besides the dtype in use, as in float32,bfloat16; by default float32, and bfloat16 and "
        "float16 where a kernel's supports() takes them.",
        show_default=False,
    ),
]
OneSite = Annotated[bool, typer.Option("--one-site-of-each-kind", help="Leave all other sites of a kind out.")]
NoGradients = Annotated[bool, typer.Option("--no-gradients", help="Compare outputs alone.")]
Bisect = Annotated[
    bool,
    typer.Option(
        "--bisect",
        help="If the whole model fails, find the first site whose kernel breaks it, and write a repro of it.",
    ),
]
ReproFolder = Annotated[
    Path | None,
    typer.Option(
        "--repro",
        metavar="FOLDER",
        help="If a site fails, write its weights, the input and a script that shows the fault without the model.",
    ),
]
Full = Annotated[bool, typer.Option("--full", help="Every case that was tried, not only a line for each kind.")]


def command(
    model: Model,
    kernels: Kernels,
    inputs: Inputs = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    dtypes: Dtypes = None,
    seed: Seed = 0,
    one_site_of_each_kind: OneSite = False,
    no_gradients: NoGradients = False,
    no_whole_model: NoWholeModel = False,
    bisect: Bisect = False,
    repro: ReproFolder = None,
    full: Full = False,
    as_json: AsJson = False,
    save: Save = None,
) -> None:
    """Prove that kernels answer, and train, as what they replace does; or name the site where one does not.

    Each kind of site runs on the model's own activations and on odd inputs made of them, the kernel and the original
    each against the original in float64; then the whole model. The exit code is 1 if a fault was found.

    [bold]Examples[/]

    kernelgraft verify Qwen/Qwen3-0.6B --kernels kernels.toml --device cuda

    kernelgraft verify ./my-model -k kernels.toml --one-site-of-each-kind --no-whole-model

    kernelgraft verify ./my-model -k kernels.toml --bisect --repro fault && echo right

    kernelgraft verify ./my-model -k kernels.toml --save verified.json
    """
    from kernelgraft.verify import check_folder

    if bisect and no_whole_model:
        raise ConfigError("--bisect looks for what breaks the whole model: leave --no-whole-model out.")
    folder = repro or (REPRO if bisect else None)
    if folder is not None:
        check_folder(folder)
    check_writable(save)
    given, wanted = read_inputs(inputs), read_dtypes(dtypes)
    graft = load_graft(model, kernels, device=device, dtype=dtype)
    report = verified(
        graft,
        given,
        every_site=not one_site_of_each_kind,
        whole_model=not no_whole_model,
        gradients=not no_gradients,
        dtypes=wanted,
        seed=seed,
    )
    found = _bisected(graft, given, report) if bisect and not report.passed else (None, "")
    written = _repro(graft, given, report, folder, found[0]) if folder and not report.passed else (None, "")
    if save is not None:
        save.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(_json(report, found, written))
    else:
        show("\n".join(_lines(report, full, found, written)))
    if not report.passed:
        raise typer.Exit(FOUND_A_FAULT)


def _bisected(graft: "Graft", inputs: Any, report: "Report") -> "tuple[Bisection | None, str]":
    """What a bisection found, or why it found nothing."""
    from kernelgraft.verify import bisect

    try:
        with progressing("bisecting") as progress:
            found = bisect(graft, inputs, seed=report.seed, report=report, progress=progress)
    except VerificationError as error:
        return None, f"Not bisected: {error}"
    return found, "" if found else "Not bisected: the whole model passes with all kernels."


def _repro(
    graft: "Graft", inputs: Any, report: "Report", folder: Path, found: "Bisection | None"
) -> "tuple[Repro | None, str]":
    """The repro that was written, or why there is none."""
    from kernelgraft.verify import write_repro

    try:
        with progressing("writing a repro"):
            return write_repro(graft, report, folder, inputs, site=found.site if found else None), ""
    except (VerificationError, GraftError) as error:
        return None, f"No repro was written: {error}"


def _lines(
    report: "Report", full: bool, found: "tuple[Bisection | None, str]", written: "tuple[Repro | None, str]"
) -> list[str]:
    lines = [str(report) if full else report.summary()]
    for said in (str(found[0] or found[1]), written[1]):
        lines += ["", said] if said else []
    if written[0] is not None:
        about = written[0].about
        lines += ["", f"A repro of {about['kernel']['name']} at {about['site']}, {about['case']}: "]
        lines[-1] += f"python {written[0].folder / 'repro.py'}"
    return lines


def _json(
    report: "Report", found: "tuple[Bisection | None, str]", written: "tuple[Repro | None, str]"
) -> dict[str, Any]:
    data = report.to_json()
    if found[0] or found[1]:
        data["bisection"] = found[0].to_json() if found[0] else {"site": None, "why": found[1]}
    if written[0] or written[1]:
        data["repro"] = {"folder": str(written[0].folder)} if written[0] else {"folder": None, "why": written[1]}
    return data
