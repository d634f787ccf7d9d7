"""`kernelgraft plan`."""

from kernelgraft.cli._model import AsJson, Kernels, Model, read_config, skeleton_of
from kernelgraft.cli._output import console, print_json, working


def command(model: Model, kernels: Kernels, as_json: AsJson = False) -> None:
    """Show which modules of a model kernels would take over, and what is left as it is, and why.

    Nothing is downloaded of the weights, and nothing runs: the plan is made on names and shapes.

    [bold]Examples[/]

    kernelgraft plan Qwen/Qwen3-0.6B --kernels kernels.toml

    kernelgraft plan ./my-model -k kernels.toml --json | jq .sites
    """
    from kernelgraft.api import plan

    with working("planning"):
        found = plan(skeleton_of(model), read_config(kernels))
    if as_json:
        print_json(found.to_json())
    else:
        console().print(str(found), markup=False, soft_wrap=True)
