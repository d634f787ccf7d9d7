"""What stands before and behind the products of `few_tokens`, in their kernels: norm, biases, activation, residual."""

from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl

    from .activation import activated
except ImportError:
    triton = None


class Norm(NamedTuple):
    """An RMS norm in front of a product; see `rms_norm`."""

    weight: torch.Tensor
    eps: float
    offset: float = 0.0
    rounds_first: bool = True


if triton is not None:

    @triton.jit
    def normalized(x, scale, rstd, OFFSET: tl.constexpr, ROUNDS_FIRST: tl.constexpr):
        """In the dtype of x, as the norm's own kernel gives it."""
        y = x.to(tl.float32) * rstd
        if ROUNDS_FIRST:
            y = y.to(x.dtype).to(tl.float32)
        return (y * (scale.to(tl.float32) + OFFSET)).to(x.dtype)

    @triton.jit
    def beside(bias_ptr, residual_ptr, at, columns, inside, there, num_columns,
                ACTIVATION: tl.constexpr, BIAS: tl.constexpr, ADDS: tl.constexpr):  # fmt: skip
        """The biases of the columns, of the gate first, and the residual; where there is none, nothing is loaded.

        `at` and `there` are of the block of y, `columns` and `inside` of its columns.
        """
        gate_bias, bias, residual = 0.0, 0.0, 0.0
        if BIAS:
            bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            if ACTIVATION != "":
                gate_bias = bias
                bias = tl.load(bias_ptr + num_columns + columns, mask=inside, other=0.0).to(tl.float32)
        if ADDS:
            residual = tl.load(residual_ptr + at, mask=there, other=0.0).to(tl.float32)
        return gate_bias, bias, residual

    @triton.jit
    def finished(sums, gates, gate_bias, bias, residual, DTYPE: tl.constexpr,
                  ACTIVATION: tl.constexpr, ADDS: tl.constexpr):  # fmt: skip
        """Bias, activation and residual, each rounded to the dtype, in which the original has it in memory."""
        y = sums + bias
        if ACTIVATION != "":
            acted = activated((gates + gate_bias).to(DTYPE).to(tl.float32), ACTIVATION).to(DTYPE)
            y = acted.to(tl.float32) * y.to(DTYPE).to(tl.float32)
        if ADDS:
            y = y.to(DTYPE).to(tl.float32) + residual
        return y.to(DTYPE)
