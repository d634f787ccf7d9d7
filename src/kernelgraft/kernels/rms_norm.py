"""RMS norm, also of a sum: s = x + residual; y = s / sqrt(mean(s^2) + eps) * (offset + weight).

Shapes: x, residual, s and y (..., H), weight (H), rstd (rows). Rows are all dimensions but the last. The offset is 0 in
Llama and 1 in Gemma, which also rounds later: Llama rounds s / sqrt(...) to the dtype of x before the weight, Gemma
rounds once, at the end.
"""

import functools
from dataclasses import dataclass

import torch
from torch import nn

from . import device

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MAX_COLUMNS = 1 << 15
"""The longest row: a program holds whole rows in registers."""


if triton is not None:

    @triton.jit
    def _forward_rows(
        x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr,
        num_rows, num_columns, x_stride, residual_stride, eps,
        OFFSET: tl.constexpr, ROUNDS_FIRST: tl.constexpr, ADDS: tl.constexpr, SAVES: tl.constexpr,
        EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        columns = tl.arange(0, COLUMNS)
        inside = columns < num_columns
        scale = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) + OFFSET
        for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
            rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
            there = (rows < num_rows)[:, None]
            if not EVEN:
                there = there & inside[None, :]
            at = rows[:, None] * num_columns + columns[None, :]
            x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=there, other=0.0)
            x_fp32 = x.to(tl.float32)
            if ADDS:
                residual = tl.load(
                    residual_ptr + rows[:, None] * residual_stride + columns[None, :], mask=there, other=0.0
                )
                # The sum is a tensor of the model: the norm is that of what it holds, rounded.
                x = (x_fp32 + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
                tl.store(sum_ptr + at, x, mask=there)
                x_fp32 = x.to(tl.float32)
            rstd = tl.rsqrt(tl.sum(x_fp32 * x_fp32, axis=1) / num_columns + eps)
            if SAVES:
                tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
            normalized = x_fp32 * rstd[:, None]
            if ROUNDS_FIRST:
                normalized = normalized.to(x.dtype).to(tl.float32)
            y = normalized * scale[None, :]
            tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=there)

    @triton.jit
    def _backward_rows(
        grad_y_ptr, grad_sum_ptr, x_ptr, weight_ptr, rstd_ptr, grad_x_ptr, partial_ptr,
        num_rows, num_columns, grad_y_stride, grad_sum_stride, x_stride,
        OFFSET: tl.constexpr, ROUNDS_FIRST: tl.constexpr, ADDS: tl.constexpr,
        EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        columns = tl.arange(0, COLUMNS)
        inside = columns < num_columns
        scale = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) + OFFSET
        grad_weight = tl.zeros([COLUMNS], tl.float32)
        for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
            rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
            there = (rows < num_rows)[:, None]
            if not EVEN:
                there = there & inside[None, :]
            x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=there, other=0.0)
            grad_y = tl.load(grad_y_ptr + rows[:, None] * grad_y_stride + columns[None, :], mask=there, other=0.0).to(
                tl.float32
            )
            rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
            normalized = x.to(tl.float32) * rstd
            rounded = normalized
            if ROUNDS_FIRST:
                rounded = normalized.to(x.dtype).to(tl.float32)
            grad_weight += tl.sum(grad_y * rounded, axis=0)
            weighted = grad_y * scale[None, :]
            mean = tl.sum(weighted * normalized, axis=1) / num_columns
            grad_x = (weighted - normalized * mean[:, None]) * rstd
            if ADDS:
                grad_x += tl.load(
                    grad_sum_ptr + rows[:, None] * grad_sum_stride + columns[None, :], mask=there, other=0.0
                ).to(tl.float32)
            at = rows[:, None] * num_columns + columns[None, :]
            tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=there)
        # Each program has a row of its own: sums in a fixed order, so that the same step gives the same bits.
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * num_columns + columns, grad_weight, mask=inside)


@dataclass(frozen=True)
class Settings:
    """How a kernel is launched.

    Attributes:
        rows: Rows that a program has at once.
        columns: The power of two that holds a row.
        num_warps: Warps of a program.
        num_programs: Programs; each goes through its share of the rows.
    """

    rows: int
    columns: int
    num_warps: int
    num_programs: int


@functools.cache
def settings(num_rows: int, num_columns: int, num_multiprocessors: int, backward: bool) -> Settings:
    """The launch for so many rows; a pure function of its arguments."""
    columns = triton.next_power_of_2(max(num_columns, 1))
    tile = 4096  # elements in a program's registers: 16 for each of 256 threads
    rows = max(1, min(tile // columns, triton.next_power_of_2(max(num_rows // num_multiprocessors, 1))))
    num_warps = min(max(rows * columns // 512, 1), 16)
    wanted = triton.cdiv(num_rows, rows)
    # Backward each program has a row of sums to write, so there are no more than run at the same time.
    most = num_multiprocessors * max(1, (8 if backward else 16) // num_warps)
    return Settings(rows, columns, num_warps, max(1, min(wanted, most)))


def _rows_of(x: torch.Tensor) -> torch.Tensor:
    """(rows, H), with any stride between the rows."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def _output_dtype(x: torch.Tensor, weight: torch.Tensor, rounds_first: bool) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if rounds_first else x.dtype


def launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    rounds_first: bool,
    saves: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the forward kernel.

    Returns:
        y; x + residual, or x itself if there is no residual; and, if it `saves`, rstd (rows), float32.
    """
    flat, weight = _rows_of(x), weight.contiguous()
    num_rows, num_columns = flat.shape
    y = torch.empty(x.shape, dtype=_output_dtype(x, weight, rounds_first), device=x.device)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device) if saves else y
    total, added = x, flat
    if residual is not None:
        added = _rows_of(residual)
        total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    if y.numel():
        chosen = settings(num_rows, num_columns, device.num_multiprocessors(x.device), False)
        _forward_rows[(chosen.num_programs,)](
            flat, added, weight, y, total, rstd, num_rows, num_columns, flat.stride(0), added.stride(0), eps,
            OFFSET=offset, ROUNDS_FIRST=rounds_first, ADDS=residual is not None, SAVES=saves,
            EVEN=chosen.columns == num_columns, ROWS=chosen.rows, COLUMNS=chosen.columns, STAGES=2,
            num_warps=chosen.num_warps,
        )  # fmt: skip
    return y, total, rstd


def launch_backward(
    grad_y: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    rounds_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the backward kernel; `x` is what was normalized, so the sum where there was one.

    Returns:
        The gradients of `x` and of `weight`.
    """
    flat, flat_grad, weight = _rows_of(x), _rows_of(grad_y), weight.contiguous()
    num_rows, num_columns = flat.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not grad_x.numel():
        return grad_x, torch.zeros_like(weight)
    flat_sum = flat_grad if grad_sum is None else _rows_of(grad_sum)
    chosen = settings(num_rows, num_columns, device.num_multiprocessors(x.device), True)
    partial = torch.empty(chosen.num_programs, num_columns, dtype=torch.float32, device=x.device)
    _backward_rows[(chosen.num_programs,)](
        flat_grad, flat_sum, flat, weight, rstd, grad_x, partial,
        num_rows, num_columns, flat_grad.stride(0), flat_sum.stride(0), flat.stride(0),
        OFFSET=offset, ROUNDS_FIRST=rounds_first, ADDS=grad_sum is not None,
        EVEN=chosen.columns == num_columns, ROWS=chosen.rows, COLUMNS=chosen.columns, STAGES=1,
        num_warps=chosen.num_warps,
    )  # fmt: skip
    return grad_x, partial.sum(0).to(weight.dtype)


# --- operators: what autograd and compilers see. Their names hold that of this module, so that two builds of the
# repository can be in one process.


@torch.library.custom_op(f"{__name__.replace('.', '_')}::forward", mutates_args=())
def _norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, rounds_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    y, _, rstd = launch(x, None, weight, eps, offset, rounds_first, True)
    return y, rstd


@_norm.register_fake
def _(x, weight, eps, offset, rounds_first):
    y = torch.empty(x.shape, dtype=_output_dtype(x, weight, rounds_first), device=x.device)
    return y, torch.empty(x.shape[:-1].numel(), dtype=torch.float32, device=x.device)


@torch.library.custom_op(f"{__name__.replace('.', '_')}::add_forward", mutates_args=())
def _add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, rounds_first: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return launch(x, residual, weight, eps, offset, rounds_first, True)


@_add_norm.register_fake
def _(x, residual, weight, eps, offset, rounds_first):
    y = torch.empty(x.shape, dtype=_output_dtype(x, weight, rounds_first), device=x.device)
    total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    return y, total, torch.empty(x.shape[:-1].numel(), dtype=torch.float32, device=x.device)


@torch.library.custom_op(f"{__name__.replace('.', '_')}::backward", mutates_args=())
def _norm_backward(
    grad_y: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    rounds_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_backward(grad_y, grad_sum, x, weight, rstd, offset, rounds_first)


@_norm_backward.register_fake
def _(grad_y, grad_sum, x, weight, rstd, offset, rounds_first):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight.contiguous())


def _keep(ctx, inputs, output):
    x, weight, _, ctx.offset, ctx.rounds_first = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad_y, _):
    x, weight, rstd = ctx.saved_tensors
    grad_x, grad_weight = _norm_backward(grad_y, None, x, weight, rstd, ctx.offset, ctx.rounds_first)
    return grad_x, grad_weight, None, None, None


_norm.register_autograd(_differentiate, setup_context=_keep)


def _keep_sum(ctx, inputs, output):
    x, residual, weight, _, ctx.offset, ctx.rounds_first = inputs
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(output[1], weight, output[2])
    ctx.mark_non_differentiable(output[2])


def _differentiate_sum(ctx, grad_y, grad_sum, _):
    total, weight, rstd = ctx.saved_tensors
    grad, grad_weight = _norm_backward(grad_y, grad_sum, total, weight, rstd, ctx.offset, ctx.rounds_first)
    return grad.to(ctx.dtypes[0]), grad.to(ctx.dtypes[1]), grad_weight, None, None, None


_add_norm.register_autograd(_differentiate_sum, setup_context=_keep_sum)


# --- what models and other kernels call


def reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0, rounds_first: bool = True
) -> torch.Tensor:
    """`rms_norm` in plain torch, step by step as Transformers' LlamaRMSNorm, or Gemma's if it does not round first."""
    x_fp32 = x.float()
    normalized = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    if rounds_first:
        scale = weight if offset == 0 else offset + weight
        return scale * normalized.to(x.dtype)
    return (normalized * (offset + weight.float())).to(x.dtype)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0, rounds_first: bool = True
) -> torch.Tensor:
    """RMS norm over the last dimension.

    Args:
        x: (..., H), bfloat16, float16 or float32.
        weight: (H).
        eps: Added to the mean of the squares.
        offset: Added to the weight.
        rounds_first: Whether to round to the dtype of `x` before the weight, as Llama does.

    Returns:
        (..., H), contiguous; in the dtype that `x` and `weight` have together, or in that of `x` if it does not round
        first.
    """
    if not device.in_triton(x):
        return reference(x, weight, eps, offset, rounds_first)
    if device.launches(x, weight):
        return launch(x, None, weight, eps, offset, rounds_first, False)[0]
    y: torch.Tensor = _norm(x, weight, eps, offset, rounds_first)[0]
    return y


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    rounds_first: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm(x + residual)`, and the sum, in one pass. Arguments as for `rms_norm`; `residual` (..., H)."""
    if not device.in_triton(x):
        total = x + residual
        return reference(total, weight, eps, offset, rounds_first), total
    if device.launches(x, residual, weight):
        return launch(x, residual, weight, eps, offset, rounds_first, False)[:2]
    y, total, _ = _add_norm(x, residual, weight, eps, offset, rounds_first)
    return y, total


class RMSNormLayout(nn.Module):
    """The weight of `RMSNorm`, made with the arguments of the norm that it replaces."""

    @staticmethod
    def supports(hidden_states: torch.Tensor) -> bool | str:
        """Rows of up to 32768 numbers in bfloat16, float16 or float32."""
        return refusal(hidden_states) or True

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps


class RMSNorm(nn.Module):
    """RMS norm over the last dimension, as in Llama, Mistral and Qwen."""

    has_backward = True
    can_torch_compile = True
    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., H) to (..., H)."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class OffsetRMSNormLayout(nn.Module):
    """The weight of `OffsetRMSNorm`, made with the arguments of the norm that it replaces."""

    @staticmethod
    def supports(x: torch.Tensor) -> bool | str:
        """Rows of up to 32768 numbers in bfloat16, float16 or float32."""
        return refusal(x) or True

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps


class OffsetRMSNorm(nn.Module):
    """RMS norm whose scale is 1 + weight, rounded once, as in Gemma."""

    has_backward = True
    can_torch_compile = True
    weight: torch.Tensor
    eps: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., H) to (..., H)."""
        return rms_norm(x, self.weight, self.eps, offset=1.0, rounds_first=False)


def refusal(x: torch.Tensor) -> str | None:
    """Why a norm of `x` is not taken, if it is not."""
    if x.shape[-1] > MAX_COLUMNS:
        return f"its rows have up to {MAX_COLUMNS} numbers, and not {x.shape[-1]}"
    return device.refusal(x)
