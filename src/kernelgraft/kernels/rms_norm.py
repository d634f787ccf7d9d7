"""RMS norm, also of a sum: s = x + residual; y = s / sqrt(mean(s^2) + eps) * (offset + weight).

Shapes: x, residual, s and y (..., H), weight (H), rstd (rows). Rows are all dimensions but the last. The offset is 0 in
Llama and 1 in Gemma, which also rounds later: Llama rounds s / sqrt(...) to the dtype of x before the weight, Gemma
rounds once, at the end.
"""

import copy
from typing import NamedTuple

import torch
from torch import nn

from . import compiling, device, first_steps
from .rms_norm_backward_kernels import launch_backward
from .rms_norm_kernels import MAX_COLUMNS, launch, output_dtype

# --- operators: what autograd and compilers see. Their names hold that of this module, so that two builds of the
# repository can be in one process.


@torch.library.custom_op(f"{__name__.replace('.', '_')}::forward", mutates_args=())
def _norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, rounds_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    y, _, rstd = launch(x, None, weight, eps, offset, rounds_first, True)
    return y, rstd


@compiling.fake(_norm)
def _(x, weight, eps, offset, rounds_first):
    y = torch.empty(x.shape, dtype=output_dtype(x, weight, rounds_first), device=x.device)
    return y, torch.empty(x.shape[:-1].numel(), dtype=torch.float32, device=x.device)


@torch.library.custom_op(f"{__name__.replace('.', '_')}::add_forward", mutates_args=())
def _add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, rounds_first: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return launch(x, residual, weight, eps, offset, rounds_first, True)


@compiling.fake(_add_norm)
def _(x, residual, weight, eps, offset, rounds_first):
    y = torch.empty(x.shape, dtype=output_dtype(x, weight, rounds_first), device=x.device)
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


@compiling.fake(_norm_backward)
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


def with_rstd(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, rounds_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` in Triton, with what `gradients` wants of it, for who differentiates by himself."""
    if device.launches(x, weight):
        y, _, rstd = launch(x, None, weight, eps, offset, rounds_first, True)
        return y, rstd
    both: tuple[torch.Tensor, torch.Tensor] = _norm(x, weight, eps, offset, rounds_first)
    return both


def gradients(
    grad_y: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    rounds_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `x` and of `weight`; `grad_sum` is what comes to `x` past the norm, if anything does."""
    run = launch_backward if device.launches(grad_y, grad_sum, x, weight, rstd) else _norm_backward
    both: tuple[torch.Tensor, torch.Tensor] = run(grad_y, grad_sum, x, weight, rstd, offset, rounds_first)
    return both


class Kind(NamedTuple):
    """What a model's norm computes; the arguments of `rms_norm` after the weight."""

    eps: float
    offset: float
    rounds_first: bool


def kind_of(norm: nn.Module) -> Kind:
    """What a norm of a model computes.

    It is told by what it does: its own forward, on eight numbers and a weight of as many, must give what the formula
    gives, in float32 and, bit for bit, in bfloat16, where it shows at which point it rounds; and on numbers so small
    that it shows what becomes of its epsilon.

    Raises:
        ValueError: It is no RMS norm with a weight that this kernel knows.
    """
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    x = torch.tensor([[0.3, -1.7, 2.9, 0.011, -0.5, 1.3, -3.1, 0.77]], device="cpu")
    weight = torch.tensor([0.6, 1.4, 0.9, 1.1, 0.73, 1.27, 0.52, 1.03], device="cpu")
    if isinstance(eps, float) and [*norm._parameters] == ["weight"]:
        x = torch.cat([x, x * (eps**0.5 or 1.0)])
        wide, narrow = (_tried(norm, x.to(dtype), weight.to(dtype)) for dtype in (torch.float32, torch.bfloat16))
        for kind in (Kind(eps, offset, rounds_first) for offset in (0.0, 1.0) for rounds_first in (True, False)):
            # In float32 the order of additions is the norm's own.
            exact = reference(x, weight, *kind)
            if wide is not None and wide.shape == x.shape and torch.allclose(wide, exact, rtol=1e-6, atol=1e-7):
                rounded = reference(x.bfloat16(), weight.bfloat16(), *kind)
                if narrow is not None and torch.equal(narrow, rounded):
                    return kind
    raise ValueError(
        f"{type(norm).__name__} does not compute the RMS norm of Llama, weight * x / sqrt(mean(x^2) + eps), or of "
        f"Gemma, whose scale is 1 + weight"
    )


def _tried(norm: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """What a norm's forward makes of `x` with another weight, if it can be called so."""
    small = copy.copy(norm)
    small.__dict__ = {**vars(norm), "_parameters": {"weight": weight}}
    try:
        with torch.no_grad():
            y = type(norm).forward(small, x)
    except Exception:  # a norm of another call
        return None
    return y if isinstance(y, torch.Tensor) else None


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

    def prepare_kernels(self, device: torch.device) -> None:
        """See `first_steps`."""
        first_steps.prepare(self, device, self.weight, lambda x: [rms_norm(x, self.weight, self.variance_epsilon)])


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

    def prepare_kernels(self, device: torch.device) -> None:
        """See `first_steps`."""
        first_steps.prepare(self, device, self.weight, lambda x: [rms_norm(x, self.weight, self.eps, 1.0, False)])


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
