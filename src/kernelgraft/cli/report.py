"""`kernelgraft report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kernelgraft.cli._model import AsJson, Device, Dtype, Kernels, Model, load_model, read_config, skeleton_of
from kernelgraft.cli._output import FOUND_A_FAULT, console, print_json, working
from kernelgraft.cli._verifying import timed as timed_with_a_bar
from kernelgraft.cli._verifying import verified as verified_with_a_bar
from kernelgraft.errors import ConfigError

if TYPE_CHECKING:
    from kernelgraft.graft import Graft

_Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", dir_okay=False, help="The HTML file to write.")
]
_Verification = Annotated[
    Path | None,
    typer.Option("--verification", metavar="FILE", help="What graft.verify() found earlier, as JSON; it is not run."),
]
_Benchmark = Annotated[
    Path | None,
    typer.Option("--benchmark", metavar="FILE", help="What graft.benchmark() found earlier, as JSON; it is not run."),
]
_Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Whether to run the verification.")]
_Bench = Annotated[bool, typer.Option("--bench", help="Run the benchmark too, if verification passes.")]


def command(
    model: Model,
    kernels: Kernels,
    output: _Output = Path("report.html"),
    verification: _Verification = None,
    benchmark: _Benchmark = None,
    verify: _Verify = True,
    bench: _Bench = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Write one HTML file that shows what kernels do to a model: places, parameters, errors, speed and memory.

    The file needs nothing beside it and no network. The exit code is 1 if verification failed; the file is there all
    the same, and says where.

    [bold]Examples[/]

    kernelgraft report Qwen/Qwen3-0.6B --kernels kernels.toml -o report.html --bench

    kernelgraft report ./my-model -k kernels.toml --verification verified.json --benchmark timed.json

    kernelgraft report ./my-model -k kernels.toml --no-verify
    """
    from kernelgraft.api import plan
    from kernelgraft.report import read_benchmark, read_verification, write

    if bench and not verify and verification is None:
        raise ConfigError("--bench times only what verification has passed: leave --no-verify out, or give its file.")
    verified = None if verification is None else read_verification(verification)
    timed = None if benchmark is None else read_benchmark(benchmark)
    skeleton = skeleton_of(model)
    runs_verify, runs_bench = verify and verified is None, bench and timed is None
    if runs_verify or runs_bench:
        graft = _loaded(model, kernels, device, dtype)
        the_plan = graft.plan
        if runs_verify:
            verified = verified_with_a_bar(graft, None)
        if runs_bench and verified is not None and verified.passed:
            timed = timed_with_a_bar(graft, None, verified=verified)
    else:
        with working("planning"):
            the_plan = plan(skeleton, read_config(kernels), device=device)
    written = write(output, the_plan, skeleton, verification=verified, benchmark=timed)
    passed = None if verified is None else verified.passed
    if as_json:
        print_json({"report": str(written), "plan": the_plan.summary(), "passed": passed, "timed": timed is not None})
    else:
        console().print(f"{written}: {the_plan.summary()}; {_said(passed)}", markup=False, soft_wrap=True)
    if passed is False:
        raise typer.Exit(FOUND_A_FAULT)


def _loaded(model: str, kernels: Path, device: str, dtype: str) -> "Graft":
    """The graft of the model with its weights."""
    from kernelgraft.graft import graft_of

    graft = graft_of(load_model(model, kernels, device=device, dtype=dtype))
    if graft is None:
        raise ConfigError(f"{kernels} puts no kernel into {model}, so there is nothing to verify. Use --no-verify.")
    return graft


def _said(passed: bool | None) -> str:
    if passed is None:
        return "not verified"
    return "verification passed" if passed else "verification FAILED"
