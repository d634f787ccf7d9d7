"""Whether a fusion may be made: each absorbed output goes to the next member of the chain, and nowhere else.

A fused kernel computes what its members computed one after the other, so what one member hands to the next is no longer
there for anybody else. Which code of a model looks at it cannot be read off its modules. So the model runs once, on
tensors without data, and each output that would be absorbed is a witness: a tensor that reports every use of it except
by the next member.

What runs is a copy of the module tree (the same objects everywhere but in the tree itself), so nothing of the run, no
hook, no mode and no running statistic, is ever in the model.
"""

import gc
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn

from kernelgraft.soundness._calls import Call, first_calls
from kernelgraft.soundness._copying import Copier, Variant, isolated
from kernelgraft.soundness._inputs import example_runner, forward_runner
from kernelgraft.soundness._layers import EqualLayers, equal_layers
from kernelgraft.soundness._remembering import Remembering
from kernelgraft.soundness._sites import FusionSite, Run, Verdict, below, validate
from kernelgraft.soundness._witness import Trace

__all__ = ["FusionSite", "Run", "Verdict", "calls_of", "check_soundness", "example_runner", "forward_runner"]


def calls_of(model: nn.Module, paths: Collection[str], run: Run) -> dict[str, Call]:
    """What the modules at `paths` are first called with, in one forward on meta tensors.

    Args:
        model: The untouched model, on any device; nothing of it is called.
        paths: The modules to watch; those that the forward does not reach are left out.
        run: As in `check_soundness`.

    Returns:
        `(args, kwargs)` by path. The tensors in them have shapes, dtypes and strides, and no data.
    """
    return first_calls(model, paths, run, list(_variants(model, live=False)))


def check_soundness(
    model: nn.Module, sites: Sequence[FusionSite], run: Run | None, *, live: bool
) -> dict[FusionSite, Verdict]:
    """Proves or refutes for each site that its members are used in a chain only.

    One forward in eval and one in train, on meta tensors; where the model cannot run so, on meta tensors in bfloat16;
    where it cannot run so either and `live`, on its own tensors. The model is left exactly as it was.

    Args:
        model: The untouched model, on any device.
        sites: The fusions to check.
        run: Does one forward of the model that it is given, with inputs on the device of that model's parameters;
            `forward_runner` or `example_runner` make one. Without it nothing can be checked.
        live: Whether the model's own tensors hold values, so that a forward with them is possible.

    Raises:
        PlanError: A site names a module that the model does not have, is no chain, or overlaps another one.
    """
    validate(model, sites)
    if run is None:
        why = "not checked: no forward of this model can be made up; give example inputs"
        return {site: Verdict(None, why) for site in sites}
    if not sites:
        return {}
    decided: dict[FusionSite, Verdict] = {}
    failures: dict[str, str] = {}
    equal = equal_layers(model, sites)
    # Layers that equal others are left out first. Only where that does not work do all of them run.
    for groups in (equal, []) if equal else ([],):
        for variant in _variants(model, live):
            verdicts, failure = _attempt(model, sites, run, variant, groups)
            if failure is None and groups and len(verdicts) < len(sites):
                verdicts, failure = _attempt(model, sites, run, variant, [])
            decided = verdicts | decided
            if failure is None or len(decided) == len(sites):
                return {site: decided[site] for site in sites}
            failures[variant.words] = failure
    why = "; ".join(f"{words}: {failure}" for words, failure in failures.items())
    return {site: decided.get(site, Verdict(None, f"not checked: the model does not run {why}")) for site in sites}


def _variants(model: nn.Module, live: bool) -> Iterator[Variant]:
    def on_meta(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.is_meta else tensor.detach().to("meta")

    def in_bfloat16(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("meta", torch.bfloat16 if tensor.is_floating_point() else None)

    remembering = Remembering()
    yield Variant("on meta tensors", on_meta, on_meta, remembering)
    if any(each.is_floating_point() and each.dtype != torch.bfloat16 for each in model.parameters()):
        yield Variant("on meta tensors in bfloat16", in_bfloat16, in_bfloat16, remembering)
    if live:
        yield Variant("on its own tensors", lambda tensor: tensor, lambda tensor: tensor.detach().clone())


def _attempt(
    model: nn.Module, sites: Sequence[FusionSite], run: Run, variant: Variant, groups: "list[EqualLayers]"
) -> tuple[dict[FusionSite, Verdict], str | None]:
    left_out = {path: group for group in groups for path in group.left_out}
    failure = None
    with isolated(model):
        try:
            twin = Copier(model, variant, set(left_out)).copy()
        except Exception as error:  # a module or tensor that cannot be copied so; the next variant may do
            return {}, f"{type(error).__name__}: {error}"
        paths = {id(module): path for path, module in twin.named_modules()}
        traces = {
            site: Trace(twin, site, paths) for site in sites if not any(below(site.parent, path) for path in left_out)
        }
        for group in groups:
            group.install(twin)
        for training in (False, True):
            for module in twin.modules():
                module.training = training
            try:
                with variant.run_in:
                    run(twin)
            except Exception as error:  # anything that a model's forward raises where it cannot run on these tensors
                failure = f"{type(error).__name__}: {str(error).strip()}"[:400]
                break
        for group in groups:
            group.form = None
        if failure is None and any(trace.has_living() for trace in traces.values()):
            gc.collect()
            for trace in traces.values():
                trace.refuse_kept()
    verdicts = {site: trace.verdict(variant.words, complete=failure is None) for site, trace in traces.items()}
    for site in sites:
        for path, group in left_out.items():
            if below(site.parent, path):
                verdicts[site] = group.verdict(site, verdicts)
    return {site: verdict for site, verdict in verdicts.items() if verdict is not None}, failure
