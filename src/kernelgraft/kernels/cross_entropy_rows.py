"""Cross entropy of rows of logits, and its gradient in their place.

x = logits * scale, then softcap * tanh(x / softcap); with them, for one row and its target t, w being the classes'
weights, V their number and e the label smoothing,
loss = (1 - e) * w[t] * -log_softmax(x)[t] + e / V * sum over c of w[c] * -log_softmax(x)[c].

Shapes: logits (n, V), each row without gaps; target (n), class_weight (V), loss (n).
"""

import functools
from dataclasses import dataclass

import torch

from .launching import run

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


@dataclass(frozen=True)
class Formula:
    """What the loss of a row is.

    Attributes:
        ignore_index: The target of rows that do not count.
        label_smoothing: How much of a target is spread over all classes, from 0 to 1.
        scale: By what the logits are multiplied.
        divides: Whether they are divided by it instead.
        softcap: The cap of the logits, or `None`.
        rounds: Whether scaling and capping round to the dtype of the logits; else they are in float32.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    scale: float = 1.0
    divides: bool = False
    softcap: float | None = None
    rounds: bool = True


def wide(dtype: torch.dtype) -> torch.dtype:
    """In what sums over a dtype are."""
    return torch.promote_types(dtype, torch.float32)


if triton is not None:

    @triton.jit
    def _tanh(x):
        # Near zero the quotient would have lost its digits; the series has an error of 1e-8 at the seam.
        square = x * x
        series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
        decay = tl.exp(-2 * tl.abs(x))
        far = (1 - decay) / (1 + decay)
        return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -far, far))

    @triton.jit
    def _transformed(
        x, factor, softcap, inverse_cap, dtype: tl.constexpr,
        SCALES: tl.constexpr, CAPS: tl.constexpr, ROUNDS: tl.constexpr,
    ):  # fmt: skip
        """What the loss is of, and the tanh in it; rounded as in a model, which has a tensor after each step."""
        x = x.to(tl.float32)
        if SCALES:
            x = x * factor
            if ROUNDS:
                x = x.to(dtype).to(tl.float32)
        tanh = x
        if CAPS:
            x = x * inverse_cap
            if ROUNDS:
                x = x.to(dtype).to(tl.float32)
            tanh = _tanh(x)
            if ROUNDS:
                tanh = tanh.to(dtype).to(tl.float32)
            x = tanh * softcap
            if ROUNDS:
                x = x.to(dtype).to(tl.float32)
        return x, tanh

    @triton.jit
    def _loss_rows(
        logits_ptr, target_ptr, class_weight_ptr, upstream_ptr, loss_ptr,
        num_columns, stride, ignore_index, kept, share, factor, softcap, inverse_cap,
        SCALES: tl.constexpr, CAPS: tl.constexpr, ROUNDS: tl.constexpr, SMOOTHS: tl.constexpr, WEIGHS: tl.constexpr,
        SCALES_GRADIENT: tl.constexpr, GRADIENT: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        dtype: tl.constexpr = logits_ptr.dtype.element_ty
        logits_ptr += row * stride
        target = tl.load(target_ptr + row)
        columns = tl.arange(0, COLUMNS)
        if target == ignore_index:
            tl.store(loss_ptr + row, 0.0)
            if GRADIENT:
                for start in range(0, num_columns, COLUMNS):
                    inside = start + columns < num_columns
                    tl.store(logits_ptr + start + columns, tl.zeros([COLUMNS], dtype), mask=inside)
        else:
            # A target that is no class is not looked up: its row is nan, gradient and all.
            named = (target >= 0) & (target < num_columns)
            aim = tl.load(logits_ptr + target, mask=named, other=float("nan"))
            aim, _aim_tanh = _transformed(aim, factor, softcap, inverse_cap, dtype, SCALES, CAPS, ROUNDS)
            aim_weight = 1.0
            if WEIGHS:
                aim_weight = tl.load(class_weight_ptr + target, mask=named, other=0.0).to(tl.float32)

            # Each lane has a maximum and a sum of its own, joined once at the end.
            top = tl.full([COLUMNS], -float("inf"), tl.float32)
            total = tl.zeros([COLUMNS], tl.float32)
            weighed = tl.zeros([COLUMNS], tl.float32)
            weights = tl.zeros([COLUMNS], tl.float32)
            for start in range(0, num_columns, COLUMNS):
                inside = start + columns < num_columns
                x = tl.load(logits_ptr + start + columns, mask=inside, other=0.0)
                x, tanh = _transformed(x, factor, softcap, inverse_cap, dtype, SCALES, CAPS, ROUNDS)
                if SMOOTHS:
                    weight = tl.where(inside, 1.0, 0.0)
                    if WEIGHS:
                        weight = tl.load(class_weight_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
                    weighed += tl.where(inside, weight * x, 0.0)
                    weights += weight
                x = tl.where(inside, x, -float("inf"))
                higher = tl.maximum(top, x)
                # Where all is -inf so far there is nothing to rescale, and -inf - -inf would be nan.
                shift = tl.where(higher == -float("inf"), 0.0, higher)
                total = total * tl.exp(top - shift) + tl.exp(x - shift)
                top = higher
            highest = tl.max(top, 0)
            shift = tl.where(highest == -float("inf"), 0.0, highest)
            log_total = shift + tl.log(tl.sum(total * tl.exp(top - shift), 0))

            aim_share = kept * aim_weight
            loss = aim_share * (log_total - aim)
            spread = aim_share
            if SMOOTHS:
                all_weights = tl.sum(weights, 0)
                loss += share * (all_weights * log_total - tl.sum(weighed, 0))
                spread += share * all_weights
            tl.store(loss_ptr + row, loss)

            if GRADIENT:
                upstream = 1.0
                if SCALES_GRADIENT:
                    upstream = tl.load(upstream_ptr + row).to(tl.float32)
                upstream = tl.where(named, upstream, float("nan"))
                for start in range(0, num_columns, COLUMNS):
                    inside = start + columns < num_columns
                    x = tl.load(logits_ptr + start + columns, mask=inside, other=0.0)
                    x, tanh = _transformed(x, factor, softcap, inverse_cap, dtype, SCALES, CAPS, ROUNDS)
                    x = tl.where(inside, x, -float("inf"))
                    grad = spread * tl.exp(x - log_total)
                    if SMOOTHS:
                        if WEIGHS:
                            weight = tl.load(class_weight_ptr + start + columns, mask=inside, other=0.0)
                            grad -= share * weight.to(tl.float32)
                        else:
                            grad -= share
                    grad = tl.where(start + columns == target, grad - aim_share, grad) * upstream
                    if CAPS:
                        grad *= 1 - tanh * tanh
                    if SCALES:
                        grad *= factor
                    tl.store(logits_ptr + start + columns, grad.to(dtype), mask=inside)


@dataclass(frozen=True)
class Settings:
    """How the kernel of a row is launched.

    Attributes:
        columns: Logits that a program has at once.
        num_warps: Warps of a program.
    """

    columns: int
    num_warps: int


@functools.cache
def settings(num_columns: int) -> Settings:
    """The launch for rows of so many logits; a pure function.

    16 for each of 256 threads: loss and gradients of 8192 rows, V 151936, H 1024 13.6 ms on an H200 in bfloat16 (torch
    2.11, Triton 3.6, 2026-11-29), with 2048 or 8192 columns and as many for a thread 13.6, with 32 for a thread 14.0.
    """
    columns = min(triton.next_power_of_2(max(num_columns, 1)), 4096)
    return Settings(columns, min(max(columns // 512, 1), 8))


def launch_rows(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    upstream: torch.Tensor | None,
    loss: torch.Tensor,
    formula: Formula,
    gradient: bool,
) -> None:
    """Run the kernel: it fills `loss` (n), and if asked puts the gradient where `logits` (n, V) were."""
    num_rows, num_columns = logits.shape
    chosen = settings(num_columns)
    softcap, smoothing = formula.softcap or 1.0, formula.label_smoothing
    run(
        _loss_rows, (num_rows,), logits, target, class_weight, upstream, loss,
        num_columns, logits.stride(0), formula.ignore_index, 1 - smoothing, smoothing / num_columns,
        # Torch too multiplies by the reciprocal of a number on a GPU.
        1 / formula.scale if formula.divides else formula.scale, softcap, 1 / softcap,
        SCALES=formula.scale != 1, CAPS=formula.softcap is not None, ROUNDS=formula.rounds,
        SMOOTHS=smoothing > 0, WEIGHS=class_weight is not None,
        SCALES_GRADIENT=upstream is not None, GRADIENT=gradient, COLUMNS=chosen.columns, num_warps=chosen.num_warps,
    )  # fmt: skip


def reference_rows(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    upstream: torch.Tensor | None,
    loss: torch.Tensor,
    formula: Formula,
    gradient: bool,
) -> None:
    """`launch_rows` in plain torch, step by step as a model and `torch.nn.functional.cross_entropy` do it."""
    num_columns, smoothing, wider = logits.shape[1], formula.label_smoothing, wide(logits.dtype)
    valid = target != formula.ignore_index
    if logits.device.type == "cpu":
        wrong = target[valid & ((target < 0) | (target >= num_columns))]
        if wrong.numel():
            raise IndexError(f"Target {wrong[0].item()} is out of bounds: there are {num_columns} classes.")
    x = logits if formula.rounds else logits.to(wider)
    if formula.scale != 1:
        x = x / formula.scale if formula.divides else x * formula.scale
    if formula.softcap is not None:
        tanh = torch.tanh(x / formula.softcap)
        x = tanh * formula.softcap
    log_p = torch.log_softmax(x.to(wider), 1)
    aim = torch.where(valid, target, 0)[:, None]
    aim_weight = 1.0 if class_weight is None else class_weight[aim[:, 0]]
    row_loss = -log_p.gather(1, aim)[:, 0] * aim_weight
    if smoothing > 0:
        spread = -(log_p if class_weight is None else log_p * class_weight).sum(1)
        row_loss = (1 - smoothing) * row_loss + smoothing / num_columns * spread
    loss.copy_(torch.where(valid, row_loss, 0))
    if not gradient:
        return
    aim_share = ((1 - smoothing) * aim_weight * torch.ones_like(loss))[:, None]
    grad = log_p.exp_()
    if smoothing > 0:
        shares = smoothing / num_columns * (torch.ones_like(grad[0]) if class_weight is None else class_weight)
        grad = grad * (aim_share + shares.sum()) - shares
    else:
        grad *= aim_share
    grad.scatter_add_(1, aim, -aim_share)
    if upstream is not None:
        grad *= upstream[:, None]
    if formula.softcap is not None:
        grad *= 1 - tanh.to(wider).square()
    if formula.scale != 1:
        grad *= 1 / formula.scale if formula.divides else formula.scale
    logits.copy_(grad.masked_fill_(~valid[:, None], 0))
