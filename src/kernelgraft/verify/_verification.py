"""One run of a verification: activations captured, each kind of site tried, then the whole model."""

import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kernelgraft.errors import VerificationError
from kernelgraft.graft import Graft, Installed
from kernelgraft.slot import Site
from kernelgraft.verify._calls import SiteCall, run_towers, watch
from kernelgraft.verify._cases import leading_dims
from kernelgraft.verify._drawing import Drawing, ModelInputs, base_inputs, following, one_of_batch
from kernelgraft.verify._kinds import Kind, forwards_of, kinds_of
from kernelgraft.verify._site import BASE, Findings, SiteTrials
from kernelgraft.verify._whole import WholeModel
from kernelgraft.verify.report import WHOLE_MODEL, Check, KindReport, Report

MOST_DIFFERENT = 4
"""Sites of a kind on which all is tried, where they differ in their attributes; others run on the activations alone."""

ROOM = 2**28
"""Bytes of activations that are kept at a time. What does not fit is taken from another forward of the model."""


Progress = Callable[[str, int, int], None]
"""Is told what comes next, how many parts are done, and how many there are."""


@dataclass(frozen=True)
class Options:
    """What is asked for; see `Graft.verify`."""

    every_site: bool
    whole_model: bool
    gradients: bool
    dtypes: Sequence[torch.dtype] | None
    seed: int


class Verification:
    """Verifies one graft once."""

    def __init__(self, graft: Graft, inputs: Any, options: Options, progress: Progress | None = None) -> None:
        self.graft, self.model, self.options = graft, graft.model, options
        self.progress = progress or (lambda *_: None)
        self.drawing = Drawing(self.model, options.seed)
        self.wrote: list[str] = []
        self.lost: list[Site] = []
        self.inputs_are = "drawn" if inputs is None else "given"
        if graft._installed:
            self.inputs = base_inputs(self.model, inputs, self.drawing)

    def report(self) -> Report:
        """Try everything."""
        start = time.perf_counter()
        kinds = kinds_of(self.graft)
        self.lost = [site.site for kind in kinds if kind.lost for site in kind.sites]
        checks: list[Check] = []
        reports = []
        with undisturbed(self.graft):
            parts = len(kinds) + self.options.whole_model
            for index, kind in enumerate(kinds):
                self.progress(kind.title, index, parts)
                found, report = self._kind(index, kind)
                checks += found
                reports.append(report)
            if kinds and self.options.whole_model:
                self.progress(WHOLE_MODEL, len(kinds), parts)
                checks += self._whole()
        parameter = next(self.model.parameters(), torch.empty(0))
        return Report(
            model=type(self.model).__name__,
            device=_device_name(parameter.device),
            inputs=self.inputs_are,
            seed=self.options.seed,
            versions=_versions(),
            seconds=round(time.perf_counter() - start, 2),
            kinds=tuple(reports),
            checks=tuple(checks),
        )

    # --- one kind

    def _kind(self, index: int, kind: Kind) -> tuple[list[Check], KindReport]:
        findings = Findings()
        passes, gradients = kind.passes(self.options.gradients)
        checks: list[Check] = []
        tried: list[str] = []
        different = kind.different()[:MOST_DIFFERENT]
        hosts = {each.site.host for each in different}
        others = [each for each in kind.sites if each.site.host not in hosts] if self.options.every_site else []
        if kind.compiled:
            findings.note(f"not verified: {', '.join(kind.compiled)}, which runs under torch.compile alone")
        first = True
        for site, call in self.captured([*different, *others]) if not kind.lost else ():
            tried.append(site.site.host)
            if _is_offloaded(site):
                checks.append(_fault(index, site, "its weights are offloaded, so it cannot be tried alone"))
                continue
            trials = SiteTrials(index, site, self.options.seed, findings)
            if site.site.host not in hosts:
                checks += trials.glance(call, passes[0])
                continue
            odd = self.odd_calls(site, findings) if leading_dims(call) is None else {}
            for each in passes:
                checks += trials.all(call, odd, each)
            if first:
                for dtype in self.other_dtypes(kind, call):
                    checks += trials.in_dtype(dtype, call, odd, passes[0])
            first = False
        if not passes:
            checks.append(
                _fault(index, kind.sites[0], "no kernel of this kind runs eagerly here, so none was verified")
            )
        elif kind.lost:
            fault = f"its originals cannot be had back from the packed parameters ({kind.lost}), so nothing is compared"
            checks.append(_fault(index, kind.sites[0], fault))
        elif not tried:
            checks.append(
                _fault(index, kind.sites[0], "no forward reached any of these sites: give inputs that reach them")
            )
        elif checks and all(check.skipped for check in checks) and not _may_refuse(kind):
            checks.append(_fault(index, kind.sites[0], f"nothing could be tried: {checks[0].skipped}"))
        if findings.wrote:
            self.wrote += kind.names
        missed = len(different) + len(others) - len(tried)
        if missed and tried:
            findings.note(f"{missed} sites were not reached by these inputs")
        return checks, KindReport(
            title=kind.title,
            kernels=kind.names,
            sites=tuple(each.site.host for each in kind.sites),
            tried=tuple(tried),
            gradients=gradients,
            kernel_calls=findings.kernel_calls,
            original_calls=findings.original_calls,
            batch_invariant=findings.batch_invariant,
            original_batch_invariant=findings.original_batch_invariant,
            deterministic=findings.deterministic,
            notes=tuple(findings.notes),
        )

    def other_dtypes(self, kind: Kind, call: SiteCall) -> list[torch.dtype]:
        """The dtypes to try besides the one in use: float32, and those that a kernel's `supports` answers for."""
        floating = [tensor.dtype for tensor in call.inputs().values() if tensor.is_floating_point()]
        claims = any(kernel.supports for kernels in kind.kernels.values() for kernel in kernels)
        claimed = (torch.bfloat16, torch.float16) if claims else ()
        asked = self.options.dtypes
        wanted = asked if asked is not None else (torch.float32, *claimed)
        return [dtype for dtype in dict.fromkeys(wanted) if dtype not in floating[:1]]

    # --- activations

    def captured(self, sites: Sequence[Installed]) -> Iterator[tuple[Installed, SiteCall]]:
        """The calls of sites, as many at a time as there is room for."""
        pending = {tuple(site.modules): site for site in sites}
        inputs = self.inputs.without_cache(self.model)
        while pending:
            found = self._watched(pending, inputs.run)
            if not found:
                return
            for paths, call in found.items():
                yield pending.pop(paths), call

    def odd_calls(self, site: Installed, findings: Findings) -> dict[str, SiteCall]:
        """What the site is called with for odd inputs of the model."""
        made: dict[str, Callable[[], ModelInputs | None] | None] = {}
        if self.inputs_are == "drawn" or self.drawing.draws_tokens:
            made |= dict(self.drawing.odd())
        if self.inputs_are == "given":
            made["the first of the batch"] = lambda: one_of_batch(self.inputs)
        found: dict[str, SiteCall] = {}
        for name, make in made.items():
            if make is None:
                findings.note(f"not tried: {name}: the model has positions for {self.drawing.longest}")
                continue
            inputs = make()
            if inputs is not None:
                self._note_call(found, findings, name, site, inputs.without_cache(self.model).run)
        for name, prompt, more in self.drawing.after_a_cache():
            with self._originals():
                out = prompt.having(use_cache=True).run(self.model)
            kwargs = dict(more.kwargs)
            tokens = kwargs.pop("input_ids")

            def go_on(model: nn.Module, out: Any = out, tokens: torch.Tensor = tokens, kwargs: Any = kwargs) -> None:
                following(model, out, tokens, **kwargs).run(model)

            self._note_call(found, findings, name, site, go_on)
        return found

    def _note_call(
        self,
        found: dict[str, SiteCall],
        findings: Findings,
        name: str,
        site: Installed,
        run: Callable[[nn.Module], Any],
    ) -> None:
        paths = tuple(site.modules)
        try:
            call = self._watched({paths: site}, run).get(paths)
        except VerificationError as error:
            findings.note(f"not tried: {name}: {error}")
            return
        if call is None:
            findings.note(f"not tried: {name}: this input does not reach {site.site.host}")
        else:
            found[name] = call

    def _watched(
        self, sites: Mapping[tuple[str, ...], Installed], run: Callable[[nn.Module], Any]
    ) -> dict[tuple[str, ...], SiteCall]:
        def run_all(model: nn.Module) -> None:
            run(model)
            run_towers(model, self._run_tower)

        wanted = [(paths, forwards_of(site)) for paths, site in sites.items()]
        with self._originals():
            try:
                return watch(self.model, wanted, run_all, room=ROOM)
            except Exception as error:
                raise VerificationError(
                    f"{type(self.model).__name__} on its originals does not run on the {self.inputs_are} inputs: "
                    f"{type(error).__name__}: {error}"
                ) from error

    def _originals(self) -> AbstractContextManager[None]:
        """Inside, every site runs its originals, where they can be had."""
        return self.graft.reference([each.site.host for each in self.graft._installed if each.site not in self.lost])

    def _run_tower(self, tower: nn.Module) -> None:
        drawn = self.drawing.inputs(model=tower)
        if drawn is not None:
            drawn.run(tower)

    # --- the whole model

    def _whole(self) -> Iterator[Check]:
        why = ""
        if self.wrote:
            # What it wrote into was a replica's; in the model it would stay there.
            why = f"{', '.join(self.wrote)} writes into weights or buffers"
        elif self.lost:
            why = "not all originals can be had back from the packed parameters"
        if why:
            yield Check(-1, WHOLE_MODEL, "outputs", "eval", "", "", skipped=why)
            return
        with self.whole_model() as whole:
            yield from whole.checks()

    @contextmanager
    def whole_model(self) -> Iterator[WholeModel]:
        """Inside, the whole model can be checked, in the mode in which its kernels run, as often as need be."""
        sites = [each.site for each in self.graft._installed]
        training = not all((False, False) in site.modes or site.may_run_originals(False) for site in sites)
        set_training(self.graft, training)
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()] if training else []
        try:
            yield WholeModel(self.graft, self.inputs, self.drawing, self._originals, training, self.options.seed)
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)


def _may_refuse(kind: Kind) -> bool:
    """Whether the originals may run where a kernel refuses: then it is no fault that it refuses all there is."""
    return all(site.site.fallback == "reference" for site in kind.sites)


def _is_offloaded(site: Installed) -> bool:
    return any(each.is_meta for module in site.modules.values() for each in (*module.parameters(), *module.buffers()))


def _fault(index: int, site: Installed, fault: str) -> Check:
    return Check(index, site.site.host, BASE, "eval", "", "", faults=(fault,))


def _device_name(device: torch.device) -> str:
    return f"{device.type} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def _versions() -> dict[str, str]:
    others = {name: sys.modules.get(name) for name in ("torch", "transformers", "triton")}
    return {name: str(module.__version__) for name, module in others.items() if module is not None}


# --- no trace


@contextmanager
def undisturbed(graft: Graft) -> Iterator[None]:
    """Inside, the model is in eval mode and no gradients are kept; afterwards all is as it was.

    Modes, random states, counters and switches of the sites are put back. What is compiled runs eagerly inside if the
    model, or a module in it, was compiled in place.
    """
    numpy_random = sys.modules.get("numpy.random")
    modules = _all_modules(graft)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        devices = {each.device for each in graft.model.parameters() if each.device.type not in ("cpu", "meta")}
        for kind in {device.type for device in devices} or {"cuda"}:
            indices = [device.index for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
        stack.callback(random.setstate, random.getstate())
        if numpy_random is not None:
            stack.callback(numpy_random.set_state, numpy_random.get_state())
        if any(vars(module).get("_compiled_call_impl") is not None for module in modules):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in modules:
            stack.callback(setattr, module, "training", module.training)
        for installed in graft._installed:
            site = installed.site
            kept = {name: getattr(site, name) for name in _KEPT}
            stack.callback(vars(site).update, kept)
            site.use_reference = False
            site.blocks = {**site.blocks, "use_reference": 0}
        set_training(graft, False)
        yield


_KEPT = ("use_reference", "blocks", "kernel_calls", "reference_calls", "has_no_gradient", "declined", "accepted")


def _all_modules(graft: Graft) -> list[nn.Module]:
    modules = list(graft.model.modules())
    skeletons = [slot.skeleton for slot in graft._slots().values()]
    return [*modules, *(inner for skeleton in skeletons for inner in skeleton.modules())]


def set_training(graft: Graft, training: bool) -> None:
    """Set the mode of every module, those behind slots too, without asking the modules."""
    for module in _all_modules(graft):
        module.training = training
