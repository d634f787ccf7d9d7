"""Absorbed outputs as witnesses: tensors that report every use of them except by the next member of the chain."""

import functools
import re
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kernelgraft.soundness._copying import wrap_forward
from kernelgraft.soundness._sites import FusionSite, Verdict, first_parameter, mapped, relative, scope, tensors

_NUM_REASONS_SHOWN = 3
# What may be asked of an absorbed output: the fused kernel's own has it too. Of shapes that is checked.
_METADATA = re.compile(
    "device|dtype|element_size|get_device|grad_fn|is_(complex|contiguous|cpu|cuda|floating_point|leaf|meta|mps|nested"
    "|quantized|sparse|tensor|xpu)|itemsize|layout|requires_grad|__hash__"
)
_SHAPE = re.compile("dim|ndim|ndimension|nelement|numel|shape|size|stride|nbytes|__len__")


class Witness(torch.Tensor):
    """An absorbed output that reports to its site whatever is done with it."""

    site_trace: "Trace"
    member: int
    num_taken: int

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)

        def testify(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(tensor, Witness):
                if _SHAPE.fullmatch(name):
                    tensor.site_trace.read_shape(tensor)
                elif not _METADATA.fullmatch(name):
                    tensor.site_trace.used(tensor, name)
            return plain(tensor)

        return func(*mapped(tuple(args), testify), **mapped(kwargs or {}, testify))


def plain(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, Witness):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


@dataclass
class Round:
    """One forward of the parent."""

    num_calls: list[int]
    witnesses: list[Witness] = field(default_factory=list)
    shapes_read: list[tuple[int, torch.Size]] = field(default_factory=list)
    input_shape: torch.Size | None = None
    output_shape: torch.Size | None = None


class Trace:
    """What one site's members and parent did while the model ran."""

    def __init__(self, model: nn.Module, site: FusionSite, paths: dict[int, str]) -> None:
        self.site, self.paths = site, paths
        self.names = [relative(path, site.parent) for path in site.members]
        self.host = site.members.index(site.host)
        self.reasons: list[str] = []
        self.unseen: list[str] = []
        self.ran_in: set[bool] = set()
        self.called_outside = False
        self.rounds: list[Round] = []
        self.witnessed: list[tuple[weakref.ref[torch.Tensor], int]] = []
        self.scope = model.get_submodule(scope(model, site.parent))
        members = [model.get_submodule(path) for path in site.members]
        for index, member in enumerate(members):
            wrap_forward(member, functools.partial(self.call_member, index))
        wrap_forward(self.scope, self.call_scope)

    def refuse(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)

    def output(self, member: int) -> str:
        return f"the output of {self.names[member]!r}"

    def used(self, witness: Witness, function: str) -> None:
        user = self.running()
        by = f"{user!r} ({function})" if user else f"{function} in the forward of {type(self.scope).__name__}"
        self.refuse(f"{self.output(witness.member)} is also used by {by}")

    def running(self) -> str | None:
        """The innermost module that is running, if it is not the parent itself."""
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code is nn.Module._call_impl.__code__:
                module = frame.f_locals["self"]
                path = self.paths.get(id(module))
                return None if module is self.scope or path is None else relative(path, self.site.parent)
            frame = frame.f_back
        return None

    def read_shape(self, witness: Witness) -> None:
        if self.rounds:
            self.rounds[-1].shapes_read.append((witness.member, plain(witness).shape))

    def call_scope(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        this = Round([0] * len(self.names))
        self.rounds.append(this)
        try:
            output = forward(*args, **kwargs)
        finally:
            self.rounds.pop()
        if any(this.num_calls):
            self.ran_in.add(self.scope.training)
            self.judge(this)
        for tensor in tensors(output):
            if self.is_own(tensor):
                self.refuse(f"{self.output(tensor.member)} is returned by {type(self.scope).__name__}")
        return output

    def judge(self, this: Round) -> None:
        for name, count in zip(self.names, this.num_calls, strict=True):
            if count > 1:
                self.refuse(f"{name!r} is called {count} times")
            if not count:
                self.refuse(
                    f"{name!r} does not run, while {self.names[this.num_calls.index(max(this.num_calls))]!r} does"
                )
        for member in range(len(self.names) - 1):
            taken = [witness.num_taken for witness in this.witnesses if witness.member == member]
            if this.num_calls[member] == 1 and this.num_calls[member + 1] == 1 and sum(taken) > 1:
                self.refuse(f"{self.output(member)} is taken by {self.names[member + 1]!r} {sum(taken)} times")
        for member, shape in this.shapes_read:
            # Before the host, an absorbed member hands on its input; from the host on, what the kernel returned.
            will_be = this.input_shape if member < self.host else this.output_shape
            if will_be is not None and shape != will_be:
                change = f"it is {tuple(shape)}, and would become {tuple(will_be)}"
                self.refuse(f"the shape of {self.output(member)} is read: {change}")
        this.witnesses.clear()

    def call_member(
        self, index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not self.rounds:
            self.called_outside = True
            return forward(*args, **kwargs)
        this, name = self.rounds[-1], self.names[index]
        this.num_calls[index] += 1
        expected = False
        for tensor in tensors((args, kwargs)):
            if not self.is_own(tensor):
                continue
            if tensor.member == index - 1:
                tensor.num_taken += 1
                expected = True
            else:
                self.refuse(f"{self.output(tensor.member)} is also used by {name!r}")
        if index and not expected:
            self.refuse(f"{name!r} does not take {self.output(index - 1)}")
        first = args[0] if args else kwargs.get(first_parameter(forward), next(iter(kwargs.values()), None))
        if index and expected and index != self.host and not self.is_own(first):
            self.refuse(f"{name!r} takes {self.output(index - 1)}, but not as its first argument")
        more = any(tensor is not first for tensor in tensors((args, kwargs)))
        if more and index != self.host and name not in self.unseen:
            self.unseen.append(name)
        if index == 0:
            this.input_shape = plain(first).shape if isinstance(first, torch.Tensor) else None
        args = mapped(args, self.unwrapped)
        kwargs = mapped(kwargs, self.unwrapped)
        inputs = [plain(tensor) for tensor in tensors((args, kwargs))]
        versions = [tensor._version for tensor in inputs]
        output = forward(*args, **kwargs)
        if index == 0 and versions != [tensor._version for tensor in inputs]:
            self.refuse(f"{name!r} writes into its input in place")
        if index == len(self.names) - 1:
            this.output_shape = next((tensor.shape for tensor in tensors(output)), None)
            return output
        given = {id(tensor) for tensor in inputs}

        def witness(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in given and not isinstance(tensor, nn.Parameter):
                self.witnessed.append((weakref.ref(tensor), index))
            made = tensor.as_subclass(Witness)
            made.site_trace, made.member, made.num_taken = self, index, 0
            this.witnesses.append(made)
            self.witnessed.append((weakref.ref(made), index))
            return made

        return mapped(output, witness)

    def is_own(self, value: Any) -> bool:
        return isinstance(value, Witness) and getattr(value, "site_trace", None) is self

    def unwrapped(self, tensor: torch.Tensor) -> torch.Tensor:
        return plain(tensor) if self.is_own(tensor) else tensor

    def has_living(self) -> bool:
        return any(ref() is not None for ref, _ in self.witnessed)

    def refuse_kept(self) -> None:
        for ref, member in self.witnessed:
            if ref() is not None:
                self.refuse(f"{self.output(member)} is kept somewhere after the forward")

    def verdict(self, how: str, *, complete: bool) -> Verdict | None:
        """`None` where the run did not get far enough to tell."""
        if self.reasons:
            more = len(self.reasons) - _NUM_REASONS_SHOWN
            shown = "; ".join(self.reasons[:_NUM_REASONS_SHOWN])
            return Verdict(False, f"{shown}; and {more} more" if more > 0 else shown)
        if not complete:
            return None
        if self.called_outside:
            return Verdict(None, f"not checked: a member runs outside the forward of {self.site.parent!r}")
        if not self.ran_in:
            return Verdict(None, "not checked: did not run")
        if self.ran_in != {False, True}:
            return Verdict(None, f"not checked: did not run in {'eval' if True in self.ran_in else 'train'}")
        reason = f"each output goes to the next member only, in eval and in train ({how})"
        for name in self.unseen:
            reason += f"; {name!r} takes more tensors, which a kernel at {self.names[self.host]!r} does not see"
        return Verdict(True, reason)
