"""One run of a benchmark: what verification has passed is measured, row by row."""

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from kernelgraft.benchmark._clock import Clock, clock_on, timing
from kernelgraft.benchmark._tasks import SiteTasks, Task, WholeTasks, with_tokens
from kernelgraft.benchmark.report import Report, Row
from kernelgraft.errors import VerificationError
from kernelgraft.graft import Graft, Installed
from kernelgraft.soundness._inputs import _device, _floating_dtype
from kernelgraft.verify import Report as Verified
from kernelgraft.verify._calls import SiteCall, run_towers, watch
from kernelgraft.verify._drawing import Drawing, ModelInputs, base_inputs, cache_name
from kernelgraft.verify._kinds import Kind, forwards_of, kinds_of
from kernelgraft.verify._site import Findings, SiteTrials
from kernelgraft.verify._verification import Progress, _device_name, _versions, undisturbed
from kernelgraft.verify.report import WHOLE_MODEL

WARMUP = 3
"""Runs of each side before those that count: kernels compile, and pick their settings, in the first ones."""

_EVERYTHING = 2**62


@dataclass(frozen=True)
class Options:
    """What is asked for; see `Graft.benchmark`."""

    tokens: tuple[int, ...]
    whole_model: bool
    repeats: int
    seed: int
    look_again: bool


class Benchmark:
    """Measures one graft once.

    Args:
        graft: The graft.
        inputs: What the activations come from.
        verified: The verification, which has passed.
        options: What is asked for.
        progress: Is told what comes next, how many rows are done, and about how many there are.
    """

    def __init__(
        self, graft: Graft, inputs: object, verified: Verified, options: Options, progress: Progress | None = None
    ) -> None:
        self._progress, self._done = progress or (lambda *_: None), 0
        self.graft, self.model, self.verified, self.options = graft, graft.model, verified, options
        self.drawing = Drawing(self.model, options.seed)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.inputs_are = "drawn" if inputs is None else "given"
        self.inputs = base_inputs(self.model, inputs, self.drawing)
        self.notes: list[str] = []
        self.clock: Clock

    def report(self) -> Report:
        """Measure everything."""
        device, dtype = _device(self.model), _floating_dtype(self.model)
        with undisturbed(self.graft), clock_on(device) as self.clock:
            machine = self.clock.machine(dtype)
            rows = list(self._sites())
            if self.options.whole_model:
                rows += self._whole()
        self._general_notes()
        return Report(
            model=type(self.model).__name__,
            device=_device_name(device),
            dtype=str(dtype).removeprefix("torch."),
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            inputs=self.inputs_are,
            seed=self.options.seed,
            repeats=self.options.repeats,
            versions=_versions(),
            machine=machine,
            rows=tuple(rows),
            notes=tuple(self.notes),
        )

    def _general_notes(self) -> None:
        if self.clock.is_cuda:
            self._note("of sites the device's time is measured, of the whole model that of the host too")
        else:
            self._note("peak memory is not measured on the CPU")
        if any(vars(module).get("_compiled_call_impl") is not None for module in self.model.modules()):
            self._note("what is compiled in the model ran eagerly")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    # --- one row

    def _row(self, title: str, make: Callable[[], Task]) -> Iterator[Row]:
        """The row of a task, or a note of why there is none."""
        rows = len(self.verified.kinds) * 2 + self.options.whole_model * 3
        self._progress(title, self._done, max(len(self.options.tokens) * rows, self._done + 1))
        self._done += 1
        try:
            yield self._measured(make())
        except Exception as error:  # one refusal, or one size that has no room, takes no other row away
            said = str(error) if isinstance(error, VerificationError) else f"{type(error).__name__}: {error}"
            self._note(f"not timed: {title}: {said}")

    def _measured(self, task: Task) -> Row:
        num_bytes, operations = task.counted()
        sides = (task.original, task.grafted)
        peaks, writes = [], []
        for side in sides:
            for _ in range(WARMUP):
                with side() as call:
                    call()
            with side() as call:
                writes.append(0 if task.with_host else self.clock.writes_ahead_of(call))
            with side() as call:
                peaks.append(self.clock.peak(call))
        before = task.counts()
        times: tuple[list[float], list[float]] = [], []
        for _ in range(self.options.repeats):
            for found, side in zip(times, sides, strict=True):
                with side() as call:
                    found.append(self.clock.milliseconds(call, max(writes)))
        kernel_calls, original_calls = (now - then for now, then in zip(task.counts(), before, strict=True))
        if not kernel_calls:
            raise VerificationError("no kernel ran")
        return Row(
            kind=task.kind,
            site=task.site,
            case=task.case,
            tokens=task.tokens,
            input=task.input,
            original=timing(times[0], peaks[0]),
            grafted=timing(times[1], peaks[1]),
            bytes=num_bytes,
            operations=operations,
            kernel_calls=kernel_calls,
            original_calls=original_calls,
        )

    # --- sites

    def _sites(self) -> Iterator[Row]:
        chosen = []
        for kind, found in zip(kinds_of(self.graft), self.verified.kinds, strict=True):
            chosen.append((kind, found, next(each for each in kind.sites if each.site.host in found.tried)))
        calls = self._captured([site for _, _, site in chosen], self.inputs)
        if self.options.look_again:
            self._look_again([(index, site) for index, (_, _, site) in enumerate(chosen)], calls)
        for kind, found, site in chosen:
            call = calls.get(tuple(site.modules))
            if call is None:
                self._note(f"not timed: {kind.title}: these inputs do not reach {site.site.host}")
                continue
            yield from self._kind(kind, found.gradients, site, call)

    def _look_again(self, sites: Sequence[tuple[int, Installed]], calls: Mapping[tuple[str, ...], SiteCall]) -> None:
        """Refuse kernels that are wrong with the weights that there are now, whatever was verified before."""
        kinds = kinds_of(self.graft)
        for index, site in sites:
            call, kind = calls.get(tuple(site.modules)), kinds[index]
            if call is None:
                continue
            trials = SiteTrials(index, site, self.options.seed, Findings())
            for check in trials.glance(call, kind.passes(False)[0][0]):
                if check.faults:
                    raise VerificationError(
                        f"{kind.title} is not timed: the report handed in says that it passed, and with the weights "
                        f"that are in the model now it does not, at {check.site}, {check.case}: {check.faults[0]}",
                        self.verified,
                    )

    def _kind(self, kind: Kind, gradients: str, site: Installed, call: SiteCall) -> Iterator[Row]:
        passes, _ = kind.passes(True)
        training = next((each.training for each in passes if each.gradients), None)
        checked = gradients == "checked" and training is not None
        if not checked:
            self._note(f"not timed: {kind.title}, backward: verification says: {gradients}")
        tasks = SiteTasks(kind.title, site)
        for tokens, sized in self._sized(kind, site, call):
            lead = kind.title if tokens is None else f"{kind.title}, tokens: {tokens}"
            yield from self._row(
                f"{lead}, forward",
                lambda n=tokens, c=sized: tasks.forward(c, n, passes[0].training),  # type: ignore[misc]
            )
            if checked:
                yield from self._row(
                    f"{lead}, backward",
                    lambda n=tokens, c=sized: tasks.backward(c, n, bool(training)),  # type: ignore[misc]
                )

    def _sized(self, kind: Kind, site: Installed, call: SiteCall) -> Iterator[tuple[int | None, SiteCall]]:
        """The call for each number of tokens, or as it is for a model that does not say how to make others."""
        for tokens in self.options.tokens:
            sized = with_tokens(call, tokens, self.generator)
            if sized is None and not self.drawing.draws_tokens:
                self._note(f"{kind.title}: timed on the {self.inputs_are} inputs alone, since no others can be made")
                yield None, call
                return
            if sized is None:
                drawn = self._drawn(tokens)
                found = self._captured([site], drawn) if drawn is not None else {}
                sized = found.get(tuple(site.modules))
            if sized is not None:
                yield tokens, sized

    def _drawn(self, tokens: int) -> ModelInputs | None:
        """A batch of one, or `None` and a note if the model has not so many positions."""
        if tokens > self.drawing.longest:
            self._note(
                f"not timed: {tokens} tokens in one sequence: the model has positions for {self.drawing.longest}"
            )
            return None
        return self.drawing.inputs(1, tokens)

    def _captured(self, sites: Sequence[Installed], inputs: ModelInputs) -> dict[tuple[str, ...], SiteCall]:
        plain = inputs.without_cache(self.model)

        def run(model: torch.nn.Module) -> None:
            plain.run(model)
            run_towers(model, self._run_tower)

        wanted = [(tuple(site.modules), forwards_of(site)) for site in sites]
        with self.graft.reference():
            return watch(self.model, wanted, run, room=_EVERYTHING)

    def _run_tower(self, tower: torch.nn.Module) -> None:
        drawn = self.drawing.inputs(model=tower)
        if drawn is not None:
            drawn.run(tower)

    # --- the whole model

    def _whole(self) -> Iterator[Row]:
        why = self._no_whole_model()
        if why:
            self._note(f"not timed: {WHOLE_MODEL}: {why}")
            return
        sites = [each.site for each in self.graft._installed]
        training = not all((False, False) in site.modes or site.may_run_originals(False) for site in sites)
        untrained = self._no_training_step()
        if untrained:
            self._note(f"not timed: {WHOLE_MODEL}, training step: {untrained}")
        tasks = WholeTasks(self.graft)
        has_cache = bool(cache_name(self.model)) and self.drawing.draws_tokens and not training
        with self._buffers_kept():
            for tokens, inputs in self._grid():
                lead = f"{WHOLE_MODEL}{'' if tokens is None else f', tokens: {tokens}'}"
                yield from self._row(
                    f"{lead}, forward",
                    lambda n=tokens, i=inputs: tasks.forward(i, n, training, fills_cache=has_cache),  # type: ignore[misc]
                )
                if has_cache and tokens is not None:
                    token = self.drawing.inputs(1, 1)
                    assert token is not None
                    yield from self._row(
                        f"{lead}, decode",
                        lambda n=tokens, i=inputs, t=token: tasks.decode(i, t.kwargs["input_ids"], n),  # type: ignore[misc]
                    )
                if not untrained:
                    yield from self._row(
                        f"{lead}, training step",
                        lambda n=tokens, i=inputs: tasks.training_step(i, n),  # type: ignore[misc]
                    )

    def _grid(self) -> Iterator[tuple[int | None, ModelInputs]]:
        if not self.drawing.draws_tokens:
            yield None, self.inputs
            return
        for tokens in self.options.tokens:
            inputs = self._drawn(tokens)
            if inputs is not None:
                yield tokens, inputs

    def _no_whole_model(self) -> str:
        if not any(check.kind < 0 and not check.skipped for check in self.verified.checks):
            return "the verification did not try it"
        modules = {path: module for each in self.graft._installed for path, module in each.modules.items()}
        if "" in modules:
            return "the kernel stands in the model's own forward"
        hooked = [path for path, module in modules.items() if "_hf_hook" in vars(module)]
        return f"a hook of accelerate stands at {hooked[0]}" if hooked else ""

    def _no_training_step(self) -> str:
        for kind, found in zip(kinds_of(self.graft), self.verified.kinds, strict=True):
            originals = all(
                (True, False) not in each.site.modes and each.site.may_run_originals(True) for each in kind.sites
            )
            if found.gradients != "checked" and not originals:
                return f"{kind.title}: verification says of gradients: {found.gradients}"
        return ""

    @contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        """Afterwards buffers that a run wrote into (statistics of a batch) are as they were."""
        kept = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            yield
        finally:
            for buffer, value in kept:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
