"""The `kernelgraft` command. It has no logic of its own: each command calls the API and prints what that returns.

Exit codes: 0 as asked, 1 a fault was found, 2 wrong use.
"""

import sys

import typer

from kernelgraft.cli import bench, check, export, info, lock, new, plan, report, verify
from kernelgraft.cli._output import FOUND_A_FAULT, WRONG_USE, complain
from kernelgraft.errors import KernelGraftError, VerificationError

app = typer.Typer(
    name="kernelgraft",
    help="Put optimized kernels into existing PyTorch models: exactly, reversibly, and verified.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("plan")(plan.command)
app.command("verify")(verify.command)
app.command("bench")(bench.command)
app.command("report")(report.command)
app.command("new")(new.command)
app.command("check")(check.command)
app.command("export")(export.command)
app.command("lock")(lock.command)
app.command("info")(info.command)


def main() -> None:
    """Run the command line; the process ends with its exit code."""
    try:
        app()
    except KernelGraftError as error:
        complain(str(error))
        sys.exit(FOUND_A_FAULT if isinstance(error, VerificationError) else WRONG_USE)
