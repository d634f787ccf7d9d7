"""One site in one dtype and mode: its kernel, its originals and the truth run on the same input, and are compared."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from kernelgraft.binding import ClassKey
from kernelgraft.verify._calls import SiteCall
from kernelgraft.verify._cases import Case, neighbour, odd_upstream
from kernelgraft.verify._replica import Replica
from kernelgraft.verify._running import Entered, How, InDouble, Ran, run, without_autocast
from kernelgraft.verify._tolerance import distance, rounding
from kernelgraft.verify.report import Figure

NEIGHBOURS = (3, 15)
"""Inputs that differ by a rounding, on which the original shows its noise before a kernel is blamed.

Most kernels that seem to be wrong on one input are not on three. Of some million rows that a verification may see, a
few of right kernels stray further than three runs show; what is wrong strays further than any number of runs."""


@dataclass
class Seen:
    """What the calls of a case showed, for who goes on with it."""

    kernel: list[Ran] = field(default_factory=list)
    original: Ran | None = None
    faults: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    skipped: str = ""


class Trial:
    """Runs a site's kernel beside its originals.

    Attributes:
        replica: The site, in the dtype in which it is tried.
        training: The mode.
        gradients: Whether gradients are compared.
        entered: Counts calls of originals' forwards while the kernel runs.
        kernel_calls: How often the kernel ran.
        original_calls: How often the originals ran where the kernel was asked for.
        wrote: Whether the kernel wrote into weights or buffers that the original leaves alone.
        inexact: Why the original itself had to serve as the truth, or "".
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        keys: dict[str, ClassKey],
        dtype: torch.dtype | None,
        *,
        training: bool,
        gradients: bool,
        seed: int,
    ) -> None:
        self._modules = modules
        self.dtype = dtype
        self.replica = Replica(modules, dtype)
        self.training, self.gradients, self.seed = training, gradients, seed
        self.entered = Entered(keys)
        self.kernel_calls = self.original_calls = 0
        self.wrote = False
        self.inexact = ""
        self._exact: dict[torch.dtype, Replica] = {}
        self._length = max((max(t.shape, default=1) for t in self.replica.tensors), default=1)

    def data(self, call: SiteCall) -> frozenset[str]:
        """The inputs that gradients flow to: those of the model, and the first in any case."""
        floating = [name for name, tensor in call.inputs().items() if tensor.is_floating_point()]
        return frozenset(floating[:1]) | (call.data & frozenset(floating))

    def check(self, case: Case, *, thorough: bool = False) -> tuple[Seen, SiteCall]:
        """Try one input.

        Args:
            case: The input.
            thorough: Whether calls are repeated, other ones come between, and the entries of originals are counted.
        """
        call = case.call.cast(self.dtype)
        inputs = self.data(call) if self.gradients else frozenset[str]()
        how = How(kernel=False, training=self.training, inputs=inputs, weights=self.gradients)
        seen = Seen()
        try:
            original = seen.original = run(self.replica, call, how, {}, self.seed)
        except Exception as error:
            seen.skipped = f"the original raises {_said(error)}"
            return seen, call
        if self.gradients and not _all_finite(original.gradients):
            # Too large or too small for gradients of this dtype: what the original gives says nothing then.
            how = replace(how, inputs=frozenset(), weights=False)
        truth = self._truth(call, how, original)
        with self.entered.counting():
            first = self._kernel(seen, call, replace(how, kernel=True, poisoned=True), original, "")
        if first is None or not self._judge(seen, first, original, truth, call, how, ""):
            return seen, call
        for name, ways in self._ways(how, thorough):
            again = self._kernel(seen, call, ways, original, name)
            if again is None or not self._judge(seen, again, original, truth, call, how, name):
                return seen, call
        return seen, call

    def _ways(self, how: How, thorough: bool) -> Iterator[tuple[str, How]]:
        kernel = replace(how, kernel=True)
        if how.gradients:
            yield "without gradients", replace(kernel, inputs=frozenset(), weights=False)
        if thorough:
            yield "a second time", kernel
        if thorough and how.gradients:
            yield "with an upstream gradient that is not contiguous", replace(kernel, upstream=odd_upstream)
            yield "with frozen weights", replace(kernel, weights=False)
            yield "with weights alone trained", replace(kernel, inputs=frozenset())

    def _kernel(self, seen: Seen, call: SiteCall, how: How, original: Ran, said: str) -> Ran | None:
        lead = f"{said}: " if said else ""
        before = self._counts()
        try:
            ran = run(self.replica, call, how, original.upstream, self.seed)
        except Exception as error:
            seen.faults.append(f"{lead}the kernel raises {_said(error)}")
            return None
        finally:
            kernels, originals = self._counts()
            self.kernel_calls += kernels - before[0]
            self.original_calls += originals - before[1]
        if ran.lost:
            seen.faults.append(f"{lead}{ran.lost}; say has_backward = False, or use it for inference alone")
            return None
        if ran.refused:
            seen.skipped = ran.refused
            return None
        if kernels == before[0]:
            seen.faults.append(f"{lead}no kernel ran")
            return None
        seen.kernel.append(ran)
        return ran

    def _counts(self) -> tuple[int, int]:
        sites = self.replica.sites
        return sum(site.kernel_calls for site in sites), sum(site.reference_calls for site in sites)

    def _truth(self, call: SiteCall, how: How, original: Ran) -> Ran:
        """The originals in float64, or, where their code does not run so, in float32; else what they gave."""
        device = next((tensor.device for tensor in call.inputs().values()), torch.device("cpu"))
        for dtype in (torch.float64, torch.float32):
            upstream = {name: each.to(dtype) for name, each in original.upstream.items()}
            try:
                if dtype not in self._exact:
                    self._exact[dtype] = Replica(self._modules, dtype)
                    self._exact[dtype].take(self.replica)
                exact = self._exact[dtype]
                with without_autocast(device), InDouble() if dtype == torch.float64 else nullcontext():  # type: ignore[no-untyped-call]
                    return run(exact, call.cast(dtype), how, upstream, self.seed)
            except Exception as error:
                self.inexact = f"the original does not run in a wider dtype ({_said(error)})"
        return original

    def change_weights(self, generator: torch.Generator) -> None:
        """Other weights, written in place where the kernel finds them."""
        self.replica.change_weights(generator)
        for exact in self._exact.values():
            exact.take(self.replica)

    def weights_differ(self) -> bool:
        """Whether the calls so far wrote into the weights."""
        differ = any(self.replica.differs(exact) for exact in self._exact.values())
        self.wrote |= differ
        return differ

    # --- judging

    def _judge(self, seen: Seen, kernel: Ran, original: Ran, truth: Ran, call: SiteCall, how: How, said: str) -> bool:
        lead = f"{said}: " if said else ""
        count = len(seen.faults)
        seen.faults += [lead + fault for fault in _effects(kernel, original)]
        noise = _Noise(self, call, how, original)
        self.wrote |= any(name in self.replica.originals for name in kernel.changed.keys() - original.changed.keys())
        for what in ("outputs", "gradients", "states"):
            ours, theirs = getattr(kernel, what), getattr(original, what)
            exact = getattr(truth, what)
            noise.around = _usual_size(exact) if what == "gradients" else 0.0
            for name, expected in theirs.items():
                if what == "gradients" and name not in ours:
                    continue
                if said and _is_same(ours.get(name), getattr(seen.kernel[0], what).get(name)):
                    continue  # what the first call gave has passed
                fault, figure = self._compare(what, name, ours.get(name), expected, exact.get(name), noise)
                if figure is not None and (not said or fault):
                    seen.figures.append(figure)
                if fault:
                    seen.faults.append(lead + fault)
                    self.wrote |= name in self.replica.buffers
        return len(seen.faults) == count

    def _compare(
        self,
        what: str,
        name: str,
        found: torch.Tensor | None,
        expected: torch.Tensor | None,
        exact: torch.Tensor | None,
        noise: "_Noise",
    ) -> tuple[str, Figure | None]:
        if expected is None or exact is None:
            if found is not None and not torch.equal(found, torch.zeros_like(found)):
                return f"{name} is there, and the original has none", None
            return "", None
        if found is None:
            if what == "gradients" and float(exact.abs().max()) <= rounding(expected.dtype, 1) * noise.around:
                return "", None
            return f"there is no {name}", None
        if (found.shape, found.dtype, found.device) != (expected.shape, expected.dtype, expected.device):
            return f"{name} is {_kind(found)}, and the original's {_kind(expected)}", None
        if not found.is_floating_point():
            wrong = (found != expected) & (found != exact)
            return (f"{name}: {int(wrong.sum())} of {wrong.numel()} values are others" if wrong.any() else ""), None
        if not found.numel():
            return "", None
        known = exact.isfinite()
        lost = known & ~found.isfinite()
        if lost.any():
            first = [int(index) for index in lost.nonzero()[0]]
            theirs = int((lost & ~expected.isfinite()).sum())
            also = f"; of the original's {theirs} of these" if theirs else ""
            return (
                f"{name}: {int(lost.sum())} of {lost.numel()} values are not finite, the first at {first}{also}",
                None,
            )
        if not known.any():
            return f"{name}: the original gives no finite value, so nothing can be compared", None
        dtype = self._dtype_of(expected)
        # The gradient of a parameter is a sum over the rows too.
        is_sum = what == "gradients" and name.removeprefix("gradient of ") in self.replica.originals
        length = max(self._length, exact.shape[-1] if exact.ndim else 1, noise.tokens if is_sum else 1)
        draws = noise.tokens if is_sum else None
        measured = distance(found, [expected], exact, dtype, length, draws, noise.around)
        for count in NEIGHBOURS:
            if measured.is_close:
                break
            others = [getattr(ran, what)[name] for ran in noise.runs(count) if getattr(ran, what).get(name) is not None]
            measured = distance(found, [expected, *others], exact, dtype, length, draws, noise.around)
        figure = Figure.of(name, measured, exact.ndim > 1)
        return ("" if measured.is_close else str(figure)), figure

    def _dtype_of(self, expected: torch.Tensor) -> torch.dtype:
        """The narrowest dtype that takes part: an output in float32 of weights in bfloat16 is no better for it."""
        dtypes = [expected.dtype, *(t.dtype for t in self.replica.tensors if t.is_floating_point())]
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


class _Noise:
    """What the original gives for inputs that differ by a rounding; run only where it is asked for."""

    def __init__(self, trial: Trial, call: SiteCall, how: How, original: Ran) -> None:
        self.trial, self.call, self.how, self.original = trial, call, how, original
        self.tokens = max((t[..., 0].numel() if t.ndim else 1 for t in call.inputs().values()), default=1)
        self.around = 0.0
        self._generator = torch.Generator().manual_seed(trial.seed)
        self._runs: list[Ran] = []

    def runs(self, count: int) -> list[Ran]:
        trial, names = self.trial, self.trial.data(self.call)
        while len(self._runs) < count:
            call = neighbour(self.call, names, self._generator)
            self._runs.append(run(trial.replica, call, self.how, self.original.upstream, trial.seed))
        return self._runs


def _is_same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


def _usual_size(tensors: dict[str, torch.Tensor | None]) -> float:
    """The largest root mean square of a tensor."""
    found = [t for t in tensors.values() if t is not None and t.numel()]
    return max((float(t.double().nan_to_num(0, 0, 0).square().mean().sqrt()) for t in found), default=0.0)


def _effects(kernel: Ran, original: Ran) -> list[str]:
    faults = []
    for name, how in kernel.changed.items():
        if name not in original.changed:
            faults.append(f"it writes into {name} (told by {how})")
    for name, how in original.changed.items():
        if name not in kernel.changed and how == "its values":
            faults.append(f"it does not write into {name}, as the original does")
    for output, holder in sorted(kernel.shares - original.shares):
        faults.append(f"{output} shares memory with {holder}")
    return faults


def _all_finite(tensors: dict[str, torch.Tensor | None]) -> bool:
    return all(tensor is None or bool(tensor.isfinite().all()) for tensor in tensors.values())


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"


def _said(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
