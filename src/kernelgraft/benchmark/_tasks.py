"""What is timed, for the original and for the kernel: one kind of site, or the whole model."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from kernelgraft.benchmark._clock import Call
from kernelgraft.benchmark._originals import original_of, originals_in, originals_of
from kernelgraft.benchmark.report import BACKWARD, FORWARD, TRAINING_STEP
from kernelgraft.errors import VerificationError
from kernelgraft.graft import Graft, Installed
from kernelgraft.verify._calls import SiteCall
from kernelgraft.verify._cases import leading_dims
from kernelgraft.verify._drawing import ModelInputs, cache_name, following
from kernelgraft.verify._replica import Replica
from kernelgraft.verify._values import copied, direct, named, spelt
from kernelgraft.verify._verification import set_training
from kernelgraft.verify._whole import _labels
from kernelgraft.verify.report import WHOLE_MODEL

Side = Callable[[], AbstractContextManager[Call]]
"""Makes everything ready for one run, and gives what is timed."""


@dataclass(frozen=True)
class Task:
    """One row to be.

    Attributes:
        kind: As in `Row`.
        site: As in `Row`.
        case: As in `Row`.
        tokens: As in `Row`.
        input: As in `Row`.
        original: The original's side.
        grafted: The kernel's.
        given: Bytes that the call reads, each once; what it gives comes on top.
        counts: How often kernels ran so far, and originals in their place.
        with_host: Whether the time that the host takes to launch kernels counts.
    """

    kind: str
    site: str
    case: str
    tokens: int | None
    input: str
    original: Side
    grafted: Side
    given: int
    counts: Callable[[], tuple[int, int]]
    with_host: bool

    @property
    def title(self) -> str:
        """The task as a note calls it."""
        tokens = "" if self.tokens is None else f", tokens: {self.tokens}"
        return f"{self.kind}, {self.case}{tokens}"

    def counted(self) -> tuple[int, int]:
        """Bytes that are read and written, and operations in products of matrices, both of the original."""
        with self.original() as call, FlopCounterMode(display=False, custom_mapping=ATTENTIONS) as counter:
            result = call()
        return self.given + num_bytes(tensor for _, tensor in direct(result, "")), int(counter.get_total_flops())


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Operations of an attention whose key heads may be shared, which torch 2.11 does not count."""
    return _count(sdpa_flop_count, query, _for_all_heads(query, key), _for_all_heads(query, value))


def _attention_backward(
    grad: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    return _count(sdpa_backward_flop_count, grad, query, _for_all_heads(query, key), _for_all_heads(query, value))


def _count(count: Callable[..., Any], *shapes: Sequence[int]) -> int:
    return int(count(*shapes))


def _for_all_heads(query: Sequence[int], shared: Sequence[int]) -> tuple[int, ...]:
    return (shared[0], query[1], *shared[2:])


ATTENTIONS: dict[Any, Callable[..., int]] = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}{end}"): count
    for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    for end, count in (("", _attention), ("_backward", _attention_backward))
}
"""How operations of torch's attentions are counted."""


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of tensors, each once."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def _weights(modules: Sequence[nn.Module]) -> int:
    return num_bytes(each for module in modules for each in (*module.parameters(), *module.buffers()))


def _trained(modules: Sequence[nn.Module]) -> list[torch.Tensor]:
    found = {id(each): each for module in modules for each in module.parameters() if each.requires_grad}
    return list(found.values())


# --- sites


class SiteTasks:
    """Tasks of one site, outside of its model.

    Args:
        kind: The title of its kind.
        site: The site.
    """

    def __init__(self, kind: str, site: Installed) -> None:
        self.kind, self.host = kind, site.site.host
        self.replica = Replica(site.modules)
        # As it was verified: an original that draws random numbers cannot be compared.
        self.replica.without_dropout()
        self.originals = [original_of(module) for module in self.replica.members]

    def forward(self, call: SiteCall, tokens: int | None, training: bool) -> Task:
        """The forward without gradients."""
        given = _weights(self.originals) + num_bytes(call.inputs().values())
        return self._task(FORWARD, call, tokens, training, given, _forward)

    def backward(self, call: SiteCall, tokens: int | None, training: bool) -> Task:
        """The gradients of the inputs and of every weight, after a forward that is not timed."""
        self._set(training)
        with _forward(call, self.originals) as run:
            upstream = num_bytes(each for _, each in direct(run(), "") if each.is_floating_point())
        given = _weights(self.originals) + num_bytes(call.inputs().values()) + upstream
        return self._task(BACKWARD, call, tokens, training, given, _backward)

    def _task(
        self,
        case: str,
        call: SiteCall,
        tokens: int | None,
        training: bool,
        given: int,
        side: Callable[[SiteCall, Sequence[nn.Module]], AbstractContextManager[Call]],
    ) -> Task:
        self._set(training)
        return Task(
            kind=self.kind,
            site=self.host,
            case=case,
            tokens=tokens,
            input=spelt(call.inputs()),
            original=lambda: side(call, self.originals),
            grafted=lambda: side(call, self.replica.members),
            given=given,
            counts=self._counts,
            with_host=False,
        )

    def _set(self, training: bool) -> None:
        self.replica.refresh(training=training, use_reference=False)
        for module in self.originals:
            for each in module.modules():
                each.training = training

    def _counts(self) -> tuple[int, int]:
        sites = self.replica.sites
        return sum(site.kernel_calls for site in sites), sum(site.reference_calls for site in sites)


@contextmanager
def _forward(call: SiteCall, modules: Sequence[nn.Module]) -> Iterator[Call]:
    ready = call.rebuilt(lambda _, tensor: copied(tensor))
    yield lambda: ready.play(modules)


@contextmanager
def _backward(call: SiteCall, modules: Sequence[nn.Module]) -> Iterator[Call]:
    floating = [name for name, tensor in call.inputs().items() if tensor.is_floating_point()]
    data = {*floating[:1], *(call.data & set(floating))}
    starts = _trained(modules)

    def hand_over(name: str, tensor: torch.Tensor) -> torch.Tensor:
        leaf = copied(tensor)
        if name not in data:
            return leaf
        starts.append(leaf.requires_grad_(True))
        return leaf.clone()  # activations are computed, so they may be written into; a leaf may not

    with torch.enable_grad():
        out = call.rebuilt(hand_over).play(modules)
    ends = [tensor for _, tensor in direct(out, "") if tensor.requires_grad]
    upstream = [torch.randn_like(tensor) for tensor in ends]
    yield lambda: torch.autograd.grad(ends, starts, upstream, allow_unused=True)


def with_tokens(call: SiteCall, tokens: int, generator: torch.Generator) -> SiteCall | None:
    """The call with as many rows, drawn from its own; `None` if it takes more than tensors of the same rows."""
    leading = leading_dims(call)
    if leading is None or 0 in leading:
        return None
    count = min(len(leading), 2)
    shape = (1, tokens)[-count:]
    chosen = torch.randint(torch.Size(leading[:count]).numel(), (tokens,), generator=generator)

    def drawn(_: str, tensor: torch.Tensor) -> torch.Tensor:
        rows = tensor.flatten(0, count - 1)[chosen.to(tensor.device)]
        return rows.reshape(*shape, *tensor.shape[count:])

    return call.rebuilt(drawn)


# --- the whole model


class WholeTasks:
    """Tasks of the whole model, in which originals stand for the time that they are timed."""

    def __init__(self, graft: Graft) -> None:
        self.graft, self.model = graft, graft.model
        self.originals = originals_of(graft)

    def forward(self, inputs: ModelInputs, tokens: int | None, training: bool, *, fills_cache: bool) -> Task:
        """One forward; of a language model the one that fills its cache."""
        inputs = inputs.having(use_cache=True) if fills_cache else inputs.without_cache(self.model)
        case = "prefill" if fills_cache else FORWARD
        return self._task(case, inputs, tokens, training, lambda: lambda: inputs.run(self.model))

    def decode(self, prompt: ModelInputs, token: torch.Tensor, tokens: int) -> Task:
        """One token after a cache of others."""
        set_training(self.graft, False)
        with self.graft.reference():
            out = prompt.having(use_cache=True).run(self.model)
        name = cache_name(self.model)

        def prepare() -> Call:
            inputs = following(self.model, out, token)
            return lambda: inputs.run(self.model)

        cached = num_bytes(named(getattr(out, name), name).values())
        return self._task("decode", ModelInputs((), {"input_ids": token}), tokens, False, prepare, cached)

    def training_step(self, inputs: ModelInputs, tokens: int | None) -> Task:
        """Forward, loss and backward, in training; without a loss of the model's own, the mean square of outputs.

        Raises:
            VerificationError: There is nothing to train.
        """
        labels = _labels(self.model, inputs)
        if tokens == 1 and labels is not None:
            raise VerificationError("a single token has none after it that could be predicted")
        if not _trained([self.model]):
            raise VerificationError("no parameter of the model requires a gradient")
        inputs = inputs.without_cache(self.model)
        inputs = inputs if labels is None else inputs.having(labels=labels)

        def step() -> tuple[torch.Tensor | None, ...]:
            with torch.enable_grad():
                out = inputs.run(self.model)
                loss = out.loss if labels is not None else _mean_square(out)
            return torch.autograd.grad(loss, _trained([self.model]), allow_unused=True)

        return self._task(TRAINING_STEP, inputs, tokens, True, lambda: step)

    def _task(
        self,
        case: str,
        inputs: ModelInputs,
        tokens: int | None,
        training: bool,
        prepare: Callable[[], Call],
        cached: int = 0,
    ) -> Task:
        set_training(self.graft, training)
        for module in self.originals.values():
            for each in module.modules():
                each.training = training

        @contextmanager
        def original() -> Iterator[Call]:
            with originals_in(self.model, self.originals):
                yield prepare()

        @contextmanager
        def grafted() -> Iterator[Call]:
            yield prepare()

        arguments = (*((f"args[{index}]", value) for index, value in enumerate(inputs.args)), *inputs.kwargs.items())
        tensors = dict(each for name, value in arguments for each in direct(value, name))
        given = _weights([self.model]) + num_bytes(tensors.values()) + cached
        return Task(
            kind=WHOLE_MODEL,
            site="",
            case=case,
            tokens=tokens,
            input=spelt(tensors),
            original=original,
            grafted=grafted,
            given=given,
            counts=self._counts,
            with_host=True,
        )

    def _counts(self) -> tuple[int, int]:
        calls = self.graft.calls
        return calls.kernel, calls.reference


def _mean_square(out: Any) -> torch.Tensor:
    found = [tensor for _, tensor in direct(out, "") if tensor.is_floating_point()]
    return torch.stack([tensor.float().square().mean() for tensor in found]).sum()
