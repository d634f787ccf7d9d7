"""All that is tried at one site: real activations first, then what is made of them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch

from kernelgraft.graft import Installed
from kernelgraft.verify._calls import SiteCall
from kernelgraft.verify._cases import (
    LARGE,
    LARGE_WHERE_MIXED,
    SIZES,
    SMALL,
    Case,
    first_of_batch,
    leading_dims,
    odd_shapes,
    odd_strides,
    of_all_sizes,
    reversed_rows,
    scaled,
)
from kernelgraft.verify._kinds import Pass, keys_of
from kernelgraft.verify._running import How, Ran, run
from kernelgraft.verify._trial import Seen, Trial
from kernelgraft.verify._values import copied, spelt
from kernelgraft.verify.report import Check

BASE = "activations of the model"
ALL_CALLS = "all calls together"
CHANGED = "after the weights changed"
IN_OTHER_DTYPES = ("a batch of 131 tokens", "large numbers", "numbers of all sizes", *SMALL)
"""What is tried besides the activations in a dtype that is not the one in use."""


@dataclass
class Findings:
    """What was found about a kind of site besides its checks; `KindReport` says what it means.

    Attributes:
        wrote: Whether a kernel wrote into weights or buffers.
    """

    kernel_calls: int = 0
    original_calls: int = 0
    batch_invariant: bool | None = None
    original_batch_invariant: bool | None = None
    deterministic: bool | None = None
    wrote: bool = False
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a note once."""
        if text not in self.notes:
            self.notes.append(text)

    def count(self, trial: Trial) -> None:
        """Add what a trial has counted."""
        self.kernel_calls += trial.kernel_calls
        self.original_calls += trial.original_calls
        self.wrote |= trial.wrote
        if trial.inexact:
            self.note(f"{trial.inexact}, so it served as the truth itself where it did not")


class SiteTrials:
    """Tries one site.

    Args:
        kind: The index of its kind.
        site: The site.
        seed: What is drawn is drawn with it.
        findings: What is found about its kind is put in here.
    """

    def __init__(self, kind: int, site: Installed, seed: int, findings: Findings) -> None:
        self.kind, self.site, self.seed, self.findings = kind, site, seed, findings

    def glance(self, call: SiteCall, each: Pass) -> Iterator[Check]:
        """The model's activations alone, without gradients."""
        trial = self._trial(None, replace(each, gradients=False))
        seen, used = trial.check(Case(BASE, call))
        self.findings.count(trial)
        yield self._said(trial, BASE, used, seen)

    def all(self, call: SiteCall, others: Mapping[str, SiteCall], each: Pass) -> Iterator[Check]:
        """Everything, in the dtype in use.

        Args:
            call: The model's activations.
            others: Activations for odd inputs of the model, for a site whose call cannot be made odd by itself.
            each: The mode.
        """
        trial = self._trial(None, each)
        if each.training and not self._is_settled(trial, call):
            yield self._skipped(trial, BASE, call, "the original draws random numbers in training")
            return
        seen, used = trial.check(Case(BASE, call), thorough=True)
        self._observe(trial, used, seen)
        base = self._said(trial, BASE, used, seen)
        if trial.entered.count:
            what = f"the kernel calls the forward of the original that it replaces, {trial.entered.count} times"
            base = replace(base, faults=(*base.faults, what))
        yield base
        if seen.skipped or not each.complete:
            self.findings.count(trial)
            return
        for case in self._cases(trial, call, others):
            seen, used = trial.check(case)
            yield self._said(trial, case.name, used, seen)
        yield from self._with_other_weights(trial, call)
        self.findings.count(trial)

    def in_dtype(
        self, dtype: torch.dtype, call: SiteCall, others: Mapping[str, SiteCall], each: Pass
    ) -> Iterator[Check]:
        """The activations and some of the odd inputs, with weights and inputs cast."""
        trial = self._trial(dtype, each)
        cases = [Case(BASE, call), *(c for c in self._cases(trial, call, others) if c.name in IN_OTHER_DTYPES)]
        for case in cases:
            seen, used = trial.check(case)
            hint = f"; if it takes no {str(dtype).removeprefix('torch.')}, let its supports() say so"
            seen.faults = [f"{fault}{hint if fault.startswith('the kernel raises') else ''}" for fault in seen.faults]
            yield self._said(trial, case.name, used, seen)
            if case.name == BASE and (seen.skipped or not seen.kernel):
                break
        self.findings.count(trial)

    def input_of(
        self, case: str, dtype: torch.dtype | None, call: SiteCall, others: Mapping[str, SiteCall], each: Pass
    ) -> SiteCall | None:
        """What the site is called with in one case, before it is cast; `None` if there is no such case."""
        if case in (BASE, ALL_CALLS, CHANGED):
            return call
        cases = self._cases(self._trial(dtype, each), call, others)
        return next((made.call for made in cases if made.name == case), None)

    def again(
        self, case: str, dtype: torch.dtype | None, call: SiteCall, before: SiteCall | None, each: Pass
    ) -> Iterator[Check]:
        """One case on its own input; where the calls before it matter, those come first.

        Args:
            case: Its name.
            dtype: What weights and inputs are cast to.
            call: Its input.
            before: An input on which the kernel runs first: it may keep something of it.
            each: The mode.
        """
        if dtype is None and case in (BASE, ALL_CALLS, CHANGED):
            yield from (check for check in self.all(call, {}, each) if check.case == case)
            return
        trial = self._trial(dtype, each)
        if before is not None:
            with suppress(Exception):  # the case says what is wrong
                run(trial.replica, before.cast(dtype), How(kernel=True, training=each.training), {}, self.seed)
        seen, used = trial.check(Case(case, call))
        yield self._said(trial, case, used, seen)

    # --- parts

    def _trial(self, dtype: torch.dtype | None, each: Pass) -> Trial:
        trial = Trial(
            self.site.modules,
            keys_of(self.site),
            dtype,
            training=each.training,
            gradients=each.gradients,
            seed=self.seed,
        )
        if each.training and trial.replica.without_dropout():
            self.findings.note("dropout is 0 in what is tried in training")
        return trial

    def _is_settled(self, trial: Trial, call: SiteCall) -> bool:
        """Whether the original answers the same whatever the random state."""
        how = How(kernel=False, training=True)
        runs = [run(trial.replica, call, how, {}, seed) for seed in (self.seed, self.seed + 1)]
        return all(torch.equal(tensor, runs[1].outputs[name]) for name, tensor in runs[0].outputs.items())

    def _cases(self, trial: Trial, call: SiteCall, others: Mapping[str, SiteCall]) -> Iterator[Case]:
        generator = torch.Generator().manual_seed(self.seed)
        yield from odd_shapes(call, generator)
        yield from (Case(name, other) for name, other in others.items())
        yield from odd_strides(call)
        data = trial.data(call)
        for name, size in SMALL.items():
            yield Case(name, scaled(call, None, size, only=data))
        mixes = leading_dims(call) is None or _mixes_rows(trial, call, data)
        if mixes:
            made = {"large numbers": lambda shrunk: scaled(call, LARGE_WHERE_MIXED * shrunk, 0.0, only=data)}
        else:
            made = {
                "large numbers": lambda shrunk: scaled(call, None, LARGE * shrunk, only=data),
                "numbers of all sizes": lambda shrunk: of_all_sizes(call, max(SIZES * shrunk, 2.0), generator),
            }
        for name, make in made.items():
            large = self._large(trial, data, make)
            if large is not None:
                yield Case(name, large)

    def _large(self, trial: Trial, data: frozenset[str], make: Callable[[float], SiteCall]) -> SiteCall | None:
        """The largest numbers, up to those wanted, at which what the original gives is finite."""
        how = How(kernel=False, training=trial.training)
        if trial.gradients:
            how = replace(how, inputs=data, weights=True)
        for halvings in range(0, 12, 2):
            large = make(2.0**-halvings)
            try:
                ran = run(trial.replica, large.cast(trial.dtype), how, {}, self.seed)
            except Exception:
                return large  # the check says so
            if _is_finite(ran):
                return large
        return None

    def _observe(self, trial: Trial, call: SiteCall, seen: Seen) -> None:
        """Properties, and whether what the kernel returned stays what it was when it is called again."""
        if not seen.kernel or seen.original is None:
            return
        data = trial.data(call)
        how = How(kernel=True, training=trial.training)
        first, last = seen.kernel[0], seen.kernel[-1]
        self.findings.deterministic = all(torch.equal(t, last.outputs[name]) for name, t in first.outputs.items())
        try:
            mine = run(trial.replica, call, how, {}, self.seed)
            kept = {name: tensor.clone() for name, tensor in mine.outputs.items()}
            run(trial.replica, reversed_rows(call, data), how, {}, self.seed)
        except Exception as error:
            seen.faults.append(f"called once more, the kernel raises {type(error).__name__}: {error}")
            return
        for name, tensor in mine.outputs.items():
            if not torch.equal(tensor.nan_to_num(), kept[name].nan_to_num()):
                seen.faults.append(f"{name} of one call changes when the kernel is called again")
        alone = first_of_batch(call)
        if alone is not None:
            self.findings.batch_invariant = _same_alone(trial, call, alone, how)
            self.findings.original_batch_invariant = _same_alone(trial, call, alone, replace(how, kernel=False))

    def _with_other_weights(self, trial: Trial, call: SiteCall) -> Iterator[Check]:
        if trial.weights_differ():
            fault = "the kernel has written into its weights"
            yield replace(self._skipped(trial, ALL_CALLS, call, ""), faults=(fault,))
        trial.change_weights(torch.Generator().manual_seed(self.seed))
        seen, used = trial.check(Case(CHANGED, call))
        yield self._said(trial, CHANGED, used, seen)

    def _said(self, trial: Trial, case: str, call: SiteCall, seen: Seen) -> Check:
        made = self._skipped(trial, case, call, seen.skipped)
        return replace(made, faults=tuple(seen.faults), figures=tuple(seen.figures))

    def _skipped(self, trial: Trial, case: str, call: SiteCall, why: str) -> Check:
        inputs = call.inputs()
        floating = [tensor.dtype for tensor in inputs.values() if tensor.is_floating_point()]
        dtype = str(floating[0] if floating else trial.dtype or "").removeprefix("torch.")
        mode = "train" if trial.training else "eval"
        return Check(self.kind, self.site.site.host, case, mode, dtype, spelt(inputs), skipped=why)


def _is_finite(ran: Ran) -> bool:
    found = [*ran.outputs.values(), *(tensor for tensor in ran.gradients.values() if tensor is not None)]
    return all(bool(tensor.isfinite().all()) for tensor in found if tensor.is_floating_point())


def _mixes_rows(trial: Trial, call: SiteCall, data: frozenset[str]) -> bool:
    """Whether an output of the original depends on more than the row of the input in its place."""

    def with_other_ends(name: str, tensor: torch.Tensor) -> torch.Tensor:
        new = copied(tensor)
        if name in data and new.numel():
            first = last = new
            for _ in range(new.ndim - 1):
                first, last = first[0], last[-1]
            first.neg_()
            last.neg_()
        return new

    how = How(kernel=False, training=trial.training)
    try:
        one, other = (
            run(trial.replica, each.cast(trial.dtype), how, {}, trial.seed).outputs
            for each in (call, call.rebuilt(with_other_ends))
        )
    except Exception:
        return True
    return any(
        tensor.ndim < 2 or not torch.equal(tensor.flatten(0, -2)[1:-1], other[name].flatten(0, -2)[1:-1])
        for name, tensor in one.items()
    )


def _same_alone(trial: Trial, call: SiteCall, alone: SiteCall, how: How) -> bool | None:
    """Whether the first of a batch gives the same bits alone; `None` where that cannot be told."""
    try:
        batch = run(trial.replica, call, how, {}, trial.seed).outputs
        single = run(trial.replica, alone, how, {}, trial.seed).outputs
    except Exception:
        return None
    pairs = [(tensor[:1], single[name]) for name, tensor in batch.items() if name in single and tensor.ndim]
    if not pairs or any(one.shape != other.shape for one, other in pairs):
        return None
    return all(torch.equal(one, other) for one, other in pairs)
