"""Products for few tokens, at the speed at which weights come from memory.

y = e(n(x) @ weight^T + bias) + residual, n an RMS norm or nothing, e a gated activation or nothing. Each program has
some rows of the weight to itself and reads them once. What the original rounds between two modules is rounded here too.
The kernels are in `one_token_kernels` and `few_tokens_kernels`.

Shapes: x (..., K), weight (N, K), or (2 N, K) with the gate's rows first; bias as the rows of weight; residual and
y (..., N); M tokens, all dimensions of x but the last.
"""

import torch
from torch.nn import functional as F

from . import activation, compiling, device, many_tokens, rms_norm
from .few_tokens_kernels import launch
from .product_parts import Norm

__all__ = ["MAX_TOKENS", "Norm", "launch", "product", "reference", "taken", "takes"]

MAX_TOKENS, LONG = 64, 2048
"""Up to so many tokens, and half as many where a token has more than so many numbers. The MLP with H 1024, I 3072 takes
19.1 us for 64 tokens and by the library 22.5, for 96 23.4 and 23.2; with H 4096, I 12288 83.4 and 89.5 for 32, 98.5 and
93.2 for 64 (an H200 in bfloat16, torch 2.11, Triton 3.6, 2026-11-29)."""


# --- the operator: what compilers see. It has no gradient; `product` uses it where none is recorded.


@torch.library.custom_op(f"{__name__.replace('.', '_')}::product", mutates_args=())
def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
    offset: float,
    rounds_first: bool,
    act: str,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    norm = None if scale is None else Norm(scale, eps, offset, rounds_first)
    return launch(x, weight, bias, norm, act, residual)


@compiling.fake(_product)
def _(x, weight, bias, scale, eps, offset, rounds_first, act, residual):
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2 if act else weight.shape[0])


# --- what models and other kernels call


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: Norm | None = None,
    act: str = "",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`product` in plain torch."""
    x = x if norm is None else rms_norm.reference(x, *norm)
    if act:
        # Gate and up are products of their own, as in the original: on a CPU the last columns of a product are added up
        # in another order than the rest, and with them the result is equal bit for bit.
        biases = (None, None) if bias is None else bias.chunk(2)
        gate, up = (F.linear(x, *of_one) for of_one in zip(weight.chunk(2), biases, strict=True))
        y = activation.ACTIVATIONS[act](gate) * up
    else:
        y = F.linear(x, weight, bias)
    return y if residual is None else residual + y


def takes(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the kernels are for products of `x` with these: few tokens, one dtype, no gradient, and no autocast."""
    dtype, columns = x.dtype, x.shape[-1]
    most = (MAX_TOKENS if columns <= LONG else MAX_TOKENS // 2) * columns
    if not (device.in_triton(x) and 0 < x.numel() <= most and dtype in device.DTYPES):
        return False
    recording = torch.is_grad_enabled()
    if recording and x.requires_grad:
        return False
    for each in others:
        if each is not None and (each.dtype != dtype or (recording and each.requires_grad)):
            return False
    return not torch.is_autocast_enabled(device.of(x).type)


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: Norm | None = None,
    act: str = "",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(norm(x) @ weight^T + bias) + residual, for any number of tokens.

    Args:
        x: (..., K).
        weight: (N, K); with an activation (2 N, K), the gate's rows first. No output of a kernel of this repository
            that may still run: see `overlap`.
        bias: As many as `weight` has rows.
        norm: An RMS norm of `x`.
        act: One of `activation.ACTIVATIONS`, or "".
        residual: (..., N).

    Returns:
        (..., N) in the dtype of `x`.
    """
    if not device.in_triton(x):
        return reference(x, weight, bias, norm, act, residual)
    if takes(x, weight, bias, norm and norm.weight, residual):
        return taken(x, weight, bias, norm, act, residual)
    # What lies between is let go as soon as it was used: for many tokens it is large.
    y = many_tokens.product(x if norm is None else rms_norm.rms_norm(x, *norm), weight, bias, act)
    return y if residual is None else plus(y, residual)


def plus(y: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The sum; where no gradient is recorded, in the memory of `y`, which nobody else may hold.

    A compiler decides about memory itself, and in torch 2.11 gives zeros for the gradients of an `autograd.Function`
    that changes what it returns.
    """
    if y.requires_grad or residual.requires_grad or y.dtype != residual.dtype or torch.compiler.is_compiling():
        return residual + y
    return y.add_(residual)


def taken(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: Norm | None = None,
    act: str = "",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`product`, of what `takes` has said yes to."""
    scale = None if norm is None else norm.weight
    if device.launches(x, weight, bias, scale, residual):
        return launch(x, weight, bias, norm, act, residual)
    eps, offset, rounds_first = (0.0, 0.0, True) if norm is None else norm[1:]
    y: torch.Tensor = _product(x, weight, bias, scale, eps, offset, rounds_first, act, residual)
    return y
