"""Cross entropy of a language-model head: the product with the head's weight and the loss, a chunk of rows at a time.

logits = hidden @ weight^T + bias; what the loss of a row of them is, `cross_entropy_rows` says.

Shapes: hidden (N, H), weight (V, H), bias (V), target (N), class_weight (V), loss (N) or (); N rows, V classes.

Only one chunk of logits (n, V) is ever there. Its gradient takes its place, and the gradients of hidden and weight are
made of that while it is: one product per row more than a loss alone, and none again in the backward. They are those of
the sum of the losses; the backward multiplies them by what comes from above and by 1 / N, known on the device only. In
float16 that keeps small ones, which a division before the products would flush to zero and no loss scaling brings back.
"""

from typing import Any

import torch

from . import compiling, device
from .cross_entropy_rows import Formula, launch_rows, reference_rows, wide

BUFFER = 1 << 29
"""Bytes that a chunk of logits may take. Each chunk reads and writes the weight's gradient once, 8 * V * H bytes beside
a product of 2 * n * V * H operations for it: at 700 TFLOP/s and 3.5 TB/s that costs 267 / n of the three products'
time, so 16% for the 1680 rows that fit at V 151936 in bfloat16. Loss and gradients of 8192 rows, H 1024 take 13.6 ms
on an H200 (torch 2.11, 2026-11-29), with a quarter of the bytes 19.6, half 15.0, twice as many 13.0, four times 12.5.
"""


def chunk_rows(num_rows: int, num_columns: int, itemsize: int, most: int) -> int:
    """How many rows of logits are there at once: what `most` bytes hold, in chunks of about the same size."""
    fitting = max(most // max(num_columns * itemsize, 1), 1)
    chunks = max(-(-num_rows // fitting), 1)
    rows = -(-num_rows // chunks)
    even = -(-rows // 128) * 128  # whole tiles of a matrix product
    return max(even if even <= fitting else rows, 1)


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def run(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    upstream: torch.Tensor | None,
    formula: Formula,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, Gradients]:
    """Losses and gradients, chunk by chunk.

    Args:
        hidden: (N, H).
        weight: (V, H).
        bias: (V).
        target: (N), int64.
        class_weight: (V).
        upstream: (N), by which each row's gradient is multiplied.
        formula: What the loss is.
        needs: Which gradients are wanted: of hidden, of weight, of bias.

    Returns:
        The losses (N) in float32, or in float64 if the inputs are; and the gradients of their sum: that of hidden in
        its own dtype, those of weight and bias in the losses', since they are sums over chunks. What is not wanted is
        empty.
    """
    (num_rows, _), num_columns, wider = hidden.shape, weight.shape[0], wide(hidden.dtype)
    in_triton = device.in_triton(hidden) and hidden.dtype in device.DTYPES
    target = target.contiguous()
    if class_weight is not None:
        class_weight = class_weight.to(wider).contiguous()
    if upstream is not None:
        upstream = upstream.to(wider).contiguous()
    loss = torch.empty(num_rows, dtype=wider, device=hidden.device)
    grad_hidden, grad_weight, grad_bias = _outputs(hidden, weight, needs)
    # Rows that begin where 32 bytes do are loaded and stored 16 bytes at a time.
    stride = -(-num_columns // 16) * 16
    # In plain torch a row also has about eight tensors of its length on the way.
    rows = chunk_rows(num_rows, stride, hidden.element_size(), BUFFER if in_triton else BUFFER // 8)
    buffer = torch.empty(min(rows, num_rows), stride, dtype=hidden.dtype, device=hidden.device)[:, :num_columns]
    for start in range(0, num_rows, rows):
        part = slice(start, start + rows)
        states = hidden[part]
        logits = buffer[: len(states)]
        if bias is None:
            torch.mm(states, weight.t(), out=logits)
        else:
            torch.addmm(bias, states, weight.t(), out=logits)
        do_rows = launch_rows if in_triton else reference_rows
        above = None if upstream is None else upstream[part]
        do_rows(logits, target[part], class_weight, above, loss[part], formula, any(needs))
        if needs[0]:
            torch.mm(logits, weight, out=grad_hidden[part])
        if needs[1]:
            _add_product(grad_weight, logits, states, start == 0)
        if needs[2]:
            grad_bias += logits.sum(0, dtype=wider)
    if needs[1] and not num_rows:
        grad_weight.zero_()
    return loss, (grad_hidden, grad_weight, grad_bias)


def _outputs(hidden: torch.Tensor, weight: torch.Tensor, needs: tuple[bool, bool, bool]) -> Gradients:
    wider = wide(hidden.dtype)
    return (
        torch.empty(hidden.shape if needs[0] else 0, dtype=hidden.dtype, device=hidden.device),
        torch.empty(weight.shape if needs[1] else 0, dtype=wider, device=hidden.device),
        torch.zeros(weight.shape[0] if needs[2] else 0, dtype=wider, device=hidden.device),
    )


def _add_product(total: torch.Tensor, grad: torch.Tensor, states: torch.Tensor, first: bool) -> None:
    """Add `grad^T @ states` to `total`, which is as wide as the sum inside the product, and costs 4 bytes a weight.

    So chunks lose nothing: against float64 the weight's gradient of 4096 rows in bfloat16 is off by 0.215% (root mean
    square), as torch's own, whether in 1, 8 or 32 chunks. Added up in bfloat16 it would be 0.415% for 8, 0.70% for 32.
    """
    if total.dtype == grad.dtype:
        torch.mm(grad.t(), states, out=total) if first else total.addmm_(grad.t(), states)
    elif grad.is_cuda:
        if first:
            torch.mm(grad.t(), states, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, grad.t(), states, out_dtype=total.dtype, out=total)
    else:  # a CPU has no product of 16 bits into 32
        total.addmm_(grad.t().to(total.dtype), states.to(total.dtype), beta=0 if first else 1)


def _reduced(
    loss: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and by what the gradients of the sum are to be multiplied; nothing is read back from a device."""
    if reduction == "none":
        return loss, torch.empty(0, dtype=loss.dtype, device=loss.device)
    if reduction == "sum":
        return loss.sum(), torch.ones((), dtype=loss.dtype, device=loss.device)
    valid = target != ignore_index
    if class_weight is None:
        count = valid.sum().to(loss.dtype)
    else:
        classes = torch.where(valid, target, 0).clamp(0, class_weight.shape[0] - 1)
        count = torch.where(valid, class_weight.to(loss.dtype)[classes], 0).sum()
    # Where no row counts the loss is nan, as in torch, and its gradient zero.
    return loss.sum() / count, torch.where(valid.any(), 1 / count, 0)


# --- operators: what autograd and compilers see. Their names hold that of this module, so that two builds of the
# repository can be in one process.


@torch.library.custom_op(f"{__name__.replace('.', '_')}::forward", mutates_args=())
def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    scale: float,
    divides: bool,
    softcap: float | None,
    rounds: bool,
    reduction: str,
    hidden_learns: bool,
    weight_learns: bool,
    bias_learns: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    formula = Formula(ignore_index, label_smoothing, scale, divides, softcap, rounds)
    needs = (hidden_learns, weight_learns, bias_learns)
    loss, gradients = run(hidden, weight, bias, target, class_weight, None, formula, needs)
    return (*_reduced(loss, target, class_weight, ignore_index, reduction), *gradients)


@compiling.fake(_forward)
def _(hidden, weight, bias, target, class_weight, ignore_index, label_smoothing, scale, divides, softcap, rounds,
      reduction, hidden_learns, weight_learns, bias_learns):  # fmt: skip
    gradients = _outputs(hidden, weight, (hidden_learns, weight_learns, bias_learns))
    loss = torch.empty(hidden.shape[0] if reduction == "none" else (), dtype=wide(hidden.dtype), device=hidden.device)
    return loss, torch.empty(0 if reduction == "none" else (), dtype=loss.dtype, device=loss.device), *gradients


@torch.library.custom_op(f"{__name__.replace('.', '_')}::backward", mutates_args=())
def _backward(
    grad_loss: torch.Tensor,
    factor: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grad_hidden: torch.Tensor,
    grad_weight: torch.Tensor,
    grad_bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # The inputs are among the arguments so that a second derivative is refused, and not taken for zero.
    factor = grad_loss * factor
    found = torch.empty(grad_weight.shape, dtype=weight.dtype, device=weight.device)
    torch.mul(grad_weight, factor, out=found)  # multiplied in float32 and rounded once, with nothing between
    return (grad_hidden.to(factor.dtype) * factor).to(hidden.dtype), found, (grad_bias * factor).to(weight.dtype)


@compiling.fake(_backward)
def _(grad_loss, factor, hidden, weight, bias, grad_hidden, grad_weight, grad_bias):
    return (
        torch.empty_like(grad_hidden),
        torch.empty_like(grad_weight, dtype=weight.dtype),
        torch.empty_like(grad_bias, dtype=weight.dtype),
    )


@torch.library.custom_op(f"{__name__.replace('.', '_')}::backward_of_rows", mutates_args=())
def _backward_of_rows(
    grad_loss: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    scale: float,
    divides: bool,
    softcap: float | None,
    rounds: bool,
    hidden_learns: bool,
    weight_learns: bool,
    bias_learns: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # What comes from above differs from row to row, so the logits are computed again.
    formula = Formula(ignore_index, label_smoothing, scale, divides, softcap, rounds)
    needs = (hidden_learns, weight_learns, bias_learns)
    _, (grad_hidden, grad_weight, grad_bias) = run(
        hidden, weight, bias, target, class_weight, grad_loss, formula, needs
    )
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


@compiling.fake(_backward_of_rows)
def _(grad_loss, hidden, weight, bias, target, class_weight, ignore_index, label_smoothing, scale, divides, softcap,
      rounds, hidden_learns, weight_learns, bias_learns):  # fmt: skip
    grad_hidden, grad_weight, grad_bias = _outputs(hidden, weight, (hidden_learns, weight_learns, bias_learns))
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _keep(ctx, inputs, output):
    hidden, weight, bias, target, class_weight, *ctx.formula, ctx.reduction, _, _, _ = inputs
    _, factor, *gradients = output
    ctx.mark_non_differentiable(factor, *gradients)
    if ctx.reduction == "none":
        ctx.save_for_backward(hidden, weight, bias, target, class_weight)
    else:
        ctx.save_for_backward(hidden, weight, bias, factor, *gradients)


def _differentiate(ctx, grad_loss, *_):
    needs = ctx.needs_input_grad[:3]
    if ctx.reduction == "none":
        found = _backward_of_rows(grad_loss, *ctx.saved_tensors, *ctx.formula, *needs)
    else:
        hidden, weight, bias, factor, *gradients = ctx.saved_tensors
        found = _backward(grad_loss, factor, hidden, weight, bias, *gradients)
    return *(each if need else None for each, need in zip(found, needs, strict=True)), *(None,) * 12


_forward.register_autograd(_differentiate, setup_context=_keep)


# --- what models and other kernels call


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: torch.Tensor | None = None,
    reduction: str = "mean",
    softcap: float | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """`linear_cross_entropy` in plain torch, with all logits in memory."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if scale != 1:
        logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    loss = torch.nn.functional.cross_entropy(
        logits.to(wide(logits.dtype)).view(-1, weight.shape[0]), target.reshape(-1), class_weight,
        ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
    )  # fmt: skip
    return loss.view(target.shape) if reduction == "none" else loss


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: torch.Tensor | None = None,
    reduction: str = "mean",
    softcap: float | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Cross entropy of `hidden @ weight^T + bias` with the targets, whose logits are never in memory together.

    As in Transformers, logits are rounded to their dtype, scaled and capped in it, and the rest is in float32. Under
    autocast the product is in its dtype, as that of `torch.nn.functional.linear`.

    Args:
        hidden: (..., H), bfloat16, float16, float32 or float64.
        weight: (V, H).
        target: (...), int64: classes, or `ignore_index`. One that is neither raises on a CPU; on a GPU its loss is nan.
        bias: (V).
        ignore_index: The target of rows that do not count.
        label_smoothing: From 0 to 1, as for `torch.nn.functional.cross_entropy`.
        class_weight: (V), the weight of each class; it gets no gradient.
        reduction: "mean" over the rows that count, by their weights; "sum"; or "none".
        softcap: Caps the logits: softcap * tanh(logits / softcap).
        scale: Multiplies the logits, before the cap.

    Returns:
        The loss, () or (...), in float32, or in float64 if the inputs are.

    Raises:
        ValueError: Shapes, dtypes or options that do not go together.
        IndexError: On a CPU, a target is no class.
    """
    formula = Formula(ignore_index, label_smoothing, scale, False, softcap)
    _check(hidden, weight, target, class_weight, reduction, formula)
    hidden, weight, bias = for_autocast(hidden, weight, bias)
    loss = loss_of(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, target.reshape(-1), class_weight, formula, reduction
    )
    return loss.view(target.shape) if reduction == "none" else loss


def loss_of(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    formula: Formula,
    reduction: str,
) -> torch.Tensor:
    """`linear_cross_entropy` of rows, unchecked: hidden (N, H), target (N)."""
    if device.launches(hidden, weight, bias, target, class_weight):
        losses, _ = run(hidden, weight, bias, target, class_weight, None, formula, (False, False, False))
        return _reduced(losses, target, class_weight, formula.ignore_index, reduction)[0]
    # For "none" the gradients depend on what comes from above, and are left to the backward.
    learns = torch.is_grad_enabled() and reduction != "none"
    needs = [learns and each is not None and each.requires_grad for each in (hidden, weight, bias)]
    options: Any = (formula.ignore_index, formula.label_smoothing, formula.scale, formula.divides, formula.softcap)
    loss: torch.Tensor = _forward(
        hidden, weight, bias, target, class_weight, *options, formula.rounds, reduction, *needs
    )[0]
    return loss


def for_autocast(*tensors: Any) -> tuple[Any, ...]:
    """The operands of a matrix product as autocast has them."""
    kind = device.of(tensors[0]).type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor if tensor is None else tensor.to(dtype) for tensor in tensors)


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    reduction: str,
    formula: Formula,
) -> None:
    if hidden.shape[:-1] != target.shape or hidden.shape[-1:] != weight.shape[1:] or weight.dim() != 2:
        raise ValueError(
            f"hidden is {tuple(hidden.shape)}, weight {tuple(weight.shape)}, target {tuple(target.shape)}. They are to "
            f"be (..., H), (V, H) and (...)."
        )
    if target.dtype != torch.int64:
        raise ValueError(f"target is of {target.dtype}. It is to hold classes, in torch.int64.")
    if class_weight is not None and class_weight.shape != weight.shape[:1]:
        raise ValueError(f"class_weight is {tuple(class_weight.shape)}. It is to have one number for each class.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}. It is to be 'mean', 'sum' or 'none'.")
    if not 0 <= formula.label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {formula.label_smoothing}. It is to be from 0 to 1.")
    if formula.softcap is not None and not formula.softcap > 0:
        raise ValueError(f"softcap is {formula.softcap}. It is to be above 0, or None.")
