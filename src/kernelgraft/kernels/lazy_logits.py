"""Logits that are computed when somebody reads them.

A model hands its logits to its loss and to its caller. `LazyLogits` stands for them: a tensor with their shape, dtype,
device and place in autograd's graph, and without their memory. On the way to a loss it is followed through what
Transformers' losses and models do (views, slices, `.float()`, scaling by a number, `tanh`), and `cross_entropy` of it
is `linear_cross_entropy` of what it would be computed from. Anything else computes the logits, once, and goes on with
them; from then on all that shares their memory is them, and nothing of it is skipped any more.

Steps are recorded below autograd, in `__torch_dispatch__`, so the graph is the one that the logits would have, and what
torch does behind the back of `__torch_function__` (an `autograd.Function`, an extension in C++) is right too.
"""

import functools
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .cross_entropy import loss_of
from .cross_entropy_rows import Formula, wide

aten = torch.ops.aten
Tensor = torch.Tensor
Step = tuple[Any, ...]
"""`("mul", number)`, `("div", number)`, `("tanh",)` or `("to", dtype)`."""
View = tuple[Callable[..., Tensor], tuple[Any, ...]]
"""An operator of torch and its arguments after the tensor; it leaves the last dimension alone."""


class Operands:
    """What logits are computed from, and the proof that it is still what it was.

    Attributes:
        hidden: (..., H).
        weight: (V, H).
        bias: (V), or `None`.
        skipped: Whether a loss was computed without the logits, so that its gradient does not pass through them.
        watched: Whether somebody waits for the logits' own gradient, so that no loss may be computed so.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.skipped = self.watched = False
        self._found = self._state()

    def _state(self) -> list[tuple[int, int]]:
        tensors = [each for each in (self.hidden, self.weight, self.bias) if each is not None]
        return [(each.data_ptr(), 0 if each.is_inference() else each._version) for each in tensors]

    def check(self) -> None:
        """Refuse to compute logits of other weights than those of the forward.

        Raises:
            RuntimeError: An operand has changed since, or is gone.
        """
        if self._state() != self._found:
            raise RuntimeError(
                "These logits were not computed in the forward (LinearCrossEntropy), and what they are computed from "
                "has changed since: by a step of the optimizer, by new weights, or by a shard that was given back. "
                "Read them before that: outputs.logits.detach() computes them."
            )


class Source:
    """Logits with memory of their own, once they are computed; every `LazyLogits` of it is a view of that memory.

    Attributes:
        operands: What they are computed from.
        views: Which rows: what was done to the logits of all of them before they were copied.
        steps: What was done to the numbers, in order.
        value: The logits, or `None`.
    """

    def __init__(self, operands: Operands, views: tuple[View, ...] = (), steps: tuple[Step, ...] = ()) -> None:
        self.operands, self.views, self.steps = operands, views, steps
        self.value: Tensor | None = None

    def computed(self) -> Tensor:
        """The logits, without a graph."""
        if self.value is None:
            operands = self.operands
            operands.check()
            # Those of a forward outside of inference mode may be used in training, wherever they are first read.
            with torch.inference_mode(operands.hidden.is_inference()), torch.no_grad(), _no_autocast(operands.hidden):
                bias = None if operands.bias is None else operands.bias.detach()
                hidden = rows_of(operands.hidden.detach(), self.views)
                value = nn.functional.linear(hidden, operands.weight.detach(), bias)
                for step in self.steps:
                    value = _done(value, step)
                self.value = value
        return self.value


def _no_autocast(tensor: Tensor) -> Any:
    return torch.autocast(tensor.device.type, enabled=False)


def _done(value: Tensor, step: Step) -> Tensor:
    kind, *number = step
    if kind == "to":
        return value.to(*number)
    return value.tanh() if kind == "tanh" else value * number[0] if kind == "mul" else value / number[0]


def rows_of(hidden: Tensor, views: tuple[View, ...]) -> Tensor:
    """The hidden states of the rows that are left after `views` of the logits."""
    for function, arguments in views:
        if function is aten.slice.Tensor:
            hidden = function(hidden, *arguments)
        else:
            hidden = hidden.reshape(*arguments[0][:-1], hidden.shape[-1])
    return hidden


def _out_of_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a function out of what `torch.compile` traces: code that is compiled gets the logits, computed before it."""
    disabled: list[Any] = []

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if (
            "torch._dynamo" not in sys.modules
        ):  # to disable it imports it, for a second: where nobody has, nobody traces
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return called


class LazyLogits(torch.Tensor):
    """Logits that nobody has read yet; see above."""

    _source: Source
    _views: tuple[View, ...]

    @staticmethod
    def __new__(cls, source: Source, views: tuple[View, ...], like: Tensor) -> "LazyLogits":
        """Logits of the metadata of `like`, without a graph."""
        made = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), storage_offset=like.storage_offset(), dtype=like.dtype,
            device=source.operands.hidden.device,
        )  # fmt: skip
        made._source, made._views = source, views
        return made

    @classmethod
    @_out_of_graphs
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The calls of Python: what is recorded or asked of the tensor goes on, the rest goes to the logits."""
        kwargs = kwargs or {}
        if func is nn.functional.cross_entropy:
            loss = _loss(*args, **kwargs)
            if loss is not None:
                return loss
        elif func in _FOLLOWED or (func is Tensor.__getitem__ and _only_slices(args[1])):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        elif _changes_itself(func) and isinstance(args[0], LazyLogits):
            if func in _GRADIENTS and args[0]._source.operands.skipped:
                _tell_of_skipped(func)
            args[0]._source.operands.watched = True
            args[0]._source.computed()
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        stands: dict[int, LazyLogits] = {}

        def plain(lazy: LazyLogits) -> Tensor:
            # A view of it in autograd's eyes: what is written into the one is written into the other.
            with torch._C.DisableTorchFunctionSubclass():
                made: Tensor = aten.alias.default(lazy)
            stands[id(made)] = lazy
            return made

        args, kwargs = tree_map_only(LazyLogits, plain, (args, kwargs))
        out = func(*args, **kwargs)
        # What works in place gives back what it was given.
        return tree_map_only(Tensor, lambda each: stands.get(id(each), each), out)

    @classmethod
    @_out_of_graphs
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operators, below autograd: what can be recorded is, the rest has the logits computed."""
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is not None and isinstance(args[0], LazyLogits):
            recorded = rule(args[0], func, args[1:], kwargs)
            if recorded is not None:
                return recorded
        stands: dict[int, LazyLogits] = {}

        def value(lazy: LazyLogits) -> Tensor:
            found = lazy._source.computed()
            for function, arguments in lazy._views:
                found = function(found, *arguments)
            stands[id(found)] = lazy
            return found

        args, kwargs = tree_map_only(LazyLogits, value, (args, kwargs))
        out = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda each: stands.get(id(each), each), out)


class _Product(torch.autograd.Function):
    """hidden @ weight^T + bias, not computed, and its backward."""

    @staticmethod
    def forward(ctx: Any, source: Source, hidden: Tensor, weight: Tensor, *_: Any) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        shape = (*hidden.shape[:-1], weight.shape[0])
        return LazyLogits(source, (), torch.empty(shape, dtype=hidden.dtype, device="meta"))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        rows = grad.reshape(-1, grad.shape[-1])
        grad_hidden = grad @ weight if needs[0] else None
        grad_weight = rows.t() @ hidden.reshape(-1, hidden.shape[-1]) if needs[1] else None
        return None, grad_hidden, grad_weight, rows.sum(0) if needs[2] else None


def lazy_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear(hidden, weight, bias)`, computed when it is read; of plain tensors of one dtype."""
    made: Tensor = _Product.apply(Source(Operands(hidden, weight, bias)), hidden, weight, bias)
    return made


# --- what is recorded: rules give `None` where the logits have to be computed


def _viewed(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    if lazy._source.value is not None or kwargs:
        return None
    like = func(_like(lazy), *args)  # raises what it would raise of the logits
    if like.dim() < 2 or like.shape[-1] != lazy.shape[-1]:
        return None
    if func is aten.slice.Tensor:
        if (args[0] if args else 0) % lazy.dim() == lazy.dim() - 1:
            return None
        return LazyLogits(lazy._source, (*lazy._views, (func, tuple(args))), like)
    return LazyLogits(lazy._source, (*lazy._views, (func, (list(like.shape),))), like)


def _detached(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> LazyLogits:
    # Autograd keeps outputs so, and does not read them.
    return LazyLogits(lazy._source, lazy._views, _like(lazy))


def _copied(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    dtype = kwargs.get("dtype") or lazy.dtype
    usual: dict[str, Any] = {
        "dtype": (dtype,),
        "device": (None, lazy.device),
        "layout": (None, torch.strided),
        "pin_memory": (None, False),
        "non_blocking": (None, False, True),
        "memory_format": (None, torch.contiguous_format, torch.preserve_format),
    }
    if args or any(value not in usual.get(name, ()) for name, value in kwargs.items()):
        return None
    if dtype not in (lazy.dtype, wide(lazy.dtype)):
        return None
    return _stepped(lazy, () if dtype == lazy.dtype else (("to", dtype),))


def _scaled(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    number = args[0]
    if kwargs or type(number) not in (int, float) or not math.isfinite(number):
        return None
    return _stepped(lazy, (("mul" if func is aten.mul.Tensor else "div", number),))


def _tanh(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    return _stepped(lazy, (("tanh",),))


def _stepped(lazy: LazyLogits, steps: tuple[Step, ...]) -> LazyLogits | None:
    """Other numbers than those of `lazy`, in memory of their own."""
    source = lazy._source
    if source.value is not None:
        return None
    made = Source(source.operands, (*source.views, *lazy._views), (*source.steps, *steps))
    dtype = steps[0][1] if steps and steps[0][0] == "to" else lazy.dtype
    return LazyLogits(made, (), torch.empty(lazy.shape, dtype=dtype, device="meta"))


def _like(lazy: LazyLogits) -> Tensor:
    """A tensor on the meta device with the metadata of `lazy`."""
    base = torch.empty(0, dtype=lazy.dtype, device="meta")
    return base.as_strided(lazy.shape, lazy.stride(), lazy.storage_offset())


_RULES: dict[Any, Callable[..., LazyLogits | None]] = {
    aten.view.default: _viewed,
    aten._unsafe_view.default: _viewed,
    aten.slice.Tensor: _viewed,
    aten.detach.default: _detached,
    aten.clone.default: _copied,
    aten._to_copy.default: _copied,
    aten.mul.Tensor: _scaled,
    aten.div.Tensor: _scaled,
    aten.tanh.default: _tanh,
}

_RECORDED = """float to view reshape flatten contiguous tanh mul multiply __mul__ __rmul__ div divide true_divide
    __truediv__"""
_ASKED = """size dim ndimension numel nelement stride storage_offset is_contiguous element_size get_device
    is_floating_point is_complex is_inference is_signed __len__"""
_PROPERTIES = """shape dtype device layout ndim nbytes itemsize names requires_grad grad grad_fn is_leaf retains_grad
    output_nr _version is_cuda is_cpu is_meta is_sparse is_quantized is_nested is_mps is_xla is_xpu"""


def _functions(names: str) -> set[Any]:
    return {getattr(place, name) for name in names.split() for place in (Tensor, torch) if hasattr(place, name)}


_FOLLOWED = _functions(_RECORDED) | _functions(_ASKED)
_FOLLOWED |= {getattr(Tensor, name).__get__ for name in _PROPERTIES.split() if hasattr(Tensor, name)}
_GRADIENTS = {Tensor.register_hook, Tensor.retain_grad}
_CHANGING = _GRADIENTS | _functions("register_post_accumulate_grad_hook requires_grad_ detach_ set_ resize_")


def _changes_itself(func: Any) -> bool:
    """Whether a call is about this very tensor and its place in the graph, so that no other can take it."""
    return func in _CHANGING or getattr(func, "__name__", "") == "__set__"


def _only_slices(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is Ellipsis or isinstance(part, slice) for part in parts)


def _tell_of_skipped(func: Any) -> None:
    what = (
        "A loss of these logits was computed without them (LinearCrossEntropy), so its gradient does not pass through "
        "them. Call {} before the loss is computed, in a hook on the head's forward, for the loss to be of the logits."
    )
    if func is Tensor.retain_grad:
        raise RuntimeError(what.format("retain_grad"))
    # What shards a model hooks every output of a forward, and is served by the loss's.
    warnings.warn(what.format("register_hook"), stacklevel=4)


# --- the loss


def _loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """`torch.nn.functional.cross_entropy` without the logits; `None` if it has to be of them."""
    if not isinstance(input, LazyLogits) or input._source.value is not None or input.dim() != 2:
        return None
    operands = input._source.operands
    formula = formula_of(input._source.steps, ignore_index, label_smoothing)
    autocasts = torch.is_autocast_enabled(input.device.type)
    dtype = torch.float32 if autocasts else input.dtype
    if (
        formula is None
        or operands.watched
        or not 0 <= label_smoothing <= 1
        or size_average is not None
        or reduce is not None
        or reduction not in ("mean", "sum", "none")
        or type(target) is not Tensor
        or target.dtype != torch.int64
        or target.shape != input.shape[:1]
        or target.device != input.device
    ):
        return None
    if weight is not None and (
        type(weight) not in (Tensor, nn.Parameter)
        or weight.requires_grad
        or weight.shape != input.shape[1:]
        or weight.device != input.device
        or not (autocasts or weight.dtype == dtype)
    ):
        return None
    operands.check()
    operands.skipped = True
    with torch.set_grad_enabled(torch.is_grad_enabled() and input.requires_grad), _no_autocast(input):
        hidden = rows_of(operands.hidden, (*input._source.views, *input._views))
        loss = loss_of(hidden, operands.weight, operands.bias, target, weight, formula, reduction)
        return loss.to(dtype)


def formula_of(steps: tuple[Step, ...], ignore_index: int = -100, label_smoothing: float = 0.0) -> Formula | None:
    """The loss of logits that went through `steps`, if there is a formula for it: scaled, capped, made float32."""
    left, rounds = list(steps), True
    if left and left[0][0] == "to":
        rounds = False
        del left[0]
    elif left and left[-1][0] == "to":
        del left[-1]
    softcap = None
    if [step[0] for step in left[-3:]] == ["div", "tanh", "mul"] and left[-3][1] == left[-1][1] > 0:
        softcap = float(left[-1][1])
        del left[-3:]
    scale, divides = 1.0, False
    if left and left[0][0] in ("mul", "div"):
        kind, number = left.pop(0)
        scale, divides = float(number), kind == "div"
    if left or (divides and not scale):
        return None
    return Formula(ignore_index, label_smoothing, scale, divides, softcap, rounds)
