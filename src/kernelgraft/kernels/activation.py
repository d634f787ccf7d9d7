"""Gated activation: y = act(gate) * up, where one product has given gate and up side by side.

Shapes: gate_up (..., 2 I), the gate first; y (..., I). act(gate) is rounded to the dtype before the product, as it is
where the two are operations of their own. The activations are silu(x) = x / (1 + exp(-x)); gelu(x) = x Phi(x), Phi by
erf; and its approximation gelu_tanh(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from . import compiling, device
from .launching import run

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
"""The activations by name, in plain torch."""


if triton is not None:

    @triton.jit
    def sigmoid(x):
        """1 / (1 + exp(-x)) of float32, by an exp that overflows nowhere."""
        e = tl.exp(-tl.abs(x))
        return tl.where(x >= 0, 1.0, e) / (1 + e)

    @triton.jit
    def tanh(x):
        """The hyperbolic tangent of float32."""
        return 2 * sigmoid(2 * x) - 1

    @triton.jit
    def activated(x, ACTIVATION: tl.constexpr):
        """act(x) of float32."""
        if ACTIVATION == "silu":
            y = x * sigmoid(x)
        elif ACTIVATION == "gelu":
            y = x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        else:
            y = 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
        return y

    @triton.jit
    def slope(x, ACTIVATION: tl.constexpr):
        """The derivative of act at x, in float32."""
        if ACTIVATION == "silu":
            s = sigmoid(x)
            y = s * (1 + x * (1 - s))
        elif ACTIVATION == "gelu":
            y = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
        else:
            u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
            e = tl.exp(-2 * tl.abs(u))
            of_tanh = 4 * e / ((1 + e) * (1 + e))  # 1 - tanh(u)^2, without the difference
            y = 0.5 * (1 + tanh(u)) + 0.5 * x * of_tanh * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
        return y

    @triton.jit
    def _forward_blocks(
        gate_up_ptr, y_ptr, num_columns, stride, num_blocks, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = (tl.program_id(0) // num_blocks).to(tl.int64)
        columns = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < num_columns
        gate = tl.load(gate_up_ptr + row * stride + columns, mask=inside, other=0.0)
        up = tl.load(gate_up_ptr + row * stride + num_columns + columns, mask=inside, other=0.0)
        acted = activated(gate.to(tl.float32), ACTIVATION).to(gate.dtype)
        y = acted.to(tl.float32) * up.to(tl.float32)
        tl.store(y_ptr + row * num_columns + columns, y.to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward_blocks(
        grad_ptr, gate_up_ptr, grad_gate_up_ptr, num_columns, grad_stride, stride, num_blocks,
        ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = (tl.program_id(0) // num_blocks).to(tl.int64)
        columns = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < num_columns
        grad = tl.load(grad_ptr + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_up_ptr + row * stride + columns, mask=inside, other=0.0)
        up = tl.load(gate_up_ptr + row * stride + num_columns + columns, mask=inside, other=0.0).to(tl.float32)
        gate_fp32 = gate.to(tl.float32)
        acted = activated(gate_fp32, ACTIVATION).to(gate.dtype).to(tl.float32)
        out_ptr = grad_gate_up_ptr + row * 2 * num_columns + columns
        out = grad * up * slope(gate_fp32, ACTIVATION)
        tl.store(out_ptr, out.to(grad_gate_up_ptr.dtype.element_ty), mask=inside)
        tl.store(out_ptr + num_columns, (grad * acted).to(grad_gate_up_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Settings:
    """How a kernel is launched.

    Attributes:
        block: Columns of one program.
        num_warps: Its warps.
    """

    block: int
    num_warps: int


@functools.cache
def settings(num_rows: int, num_columns: int, num_multiprocessors: int) -> Settings:
    """The launch for so many rows; a pure function of its arguments.

    1024 columns are 8 numbers of each input for each of 128 threads, one load of 16 bytes in bfloat16: 8192 x 12288 in
    143 us on an H200 (torch 2.11, Triton 3.6, 2026-11-28), a copy's speed, and 142 to 145 with 512 to 4096 columns and
    2 to 8 warps. Few rows go in smaller blocks, so that every multiprocessor has one.
    """
    block = 1024
    while block > 128 and num_rows * triton.cdiv(num_columns, block) < num_multiprocessors:
        block //= 2
    return Settings(block, max(block // 256, 1))


def launch(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """Run the forward kernel."""
    rows = device.rows_of(gate_up)
    num_rows, num_columns = rows.shape[0], rows.shape[1] // 2
    y = torch.empty(*gate_up.shape[:-1], num_columns, dtype=gate_up.dtype, device=gate_up.device)
    if y.numel():
        chosen = settings(num_rows, num_columns, device.num_multiprocessors(device.of(gate_up)))
        num_blocks = triton.cdiv(num_columns, chosen.block)
        run(
            _forward_blocks, (num_rows * num_blocks,), rows, y, num_columns, rows.stride(0), num_blocks,
            activation, chosen.block, num_warps=chosen.num_warps,
        )  # fmt: skip
    return y


def launch_backward(grad: torch.Tensor, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """Run the backward kernel; the gradient of `gate_up`, contiguous."""
    rows, grad_rows = device.rows_of(gate_up), device.rows_of(grad)
    num_rows, num_columns = grad_rows.shape
    grad_gate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    if grad_gate_up.numel():
        chosen = settings(num_rows, num_columns, device.num_multiprocessors(device.of(gate_up)))
        num_blocks = triton.cdiv(num_columns, chosen.block)
        run(
            _backward_blocks, (num_rows * num_blocks,), grad_rows, rows, grad_gate_up, num_columns,
            grad_rows.stride(0), rows.stride(0), num_blocks, activation, chosen.block, num_warps=chosen.num_warps,
        )  # fmt: skip
    return grad_gate_up


# --- operators


@torch.library.custom_op(f"{__name__.replace('.', '_')}::forward", mutates_args=())
def _gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    return launch(gate_up, activation)


@compiling.fake(_gated)
def _(gate_up, activation):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op(f"{__name__.replace('.', '_')}::backward", mutates_args=())
def _gated_backward(grad: torch.Tensor, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    return launch_backward(grad, gate_up, activation)


@compiling.fake(_gated_backward)
def _(grad, gate_up, activation):
    return gate_up.new_empty(gate_up.shape)


def _keep(ctx, inputs, output):
    gate_up, ctx.activation = inputs
    ctx.save_for_backward(gate_up)


def _differentiate(ctx, grad):
    return _gated_backward(grad, *ctx.saved_tensors, ctx.activation), None


_gated.register_autograd(_differentiate, setup_context=_keep)


# --- what models and other kernels call


def reference(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """`gated_activation` in plain torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    # On the CPU torch computes the last few numbers of a run by another exp than the rest. Made contiguous, the gate is
    # one run, as where gate and up are products of their own, and the result is equal bit for bit.
    return ACTIVATIONS[activation](gate.contiguous()) * up


def gated_activation(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up.

    Args:
        gate_up: (..., 2 I), bfloat16, float16 or float32.
        activation: One of `ACTIVATIONS`.

    Returns:
        (..., I), contiguous, in the same dtype.
    """
    if not device.in_triton(gate_up):
        return reference(gate_up, activation)
    if device.launches(gate_up):
        return launch(gate_up, activation)
    y: torch.Tensor = _gated(gate_up, activation)
    return y


def gradient(grad: torch.Tensor, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """The gradient of `gate_up`, in Triton, for who differentiates by himself."""
    run = launch_backward if device.launches(grad, gate_up) else _gated_backward
    grad_gate_up: torch.Tensor = run(grad, gate_up, activation)
    return grad_gate_up


def name_of(act_fn: object) -> str | None:
    """The name of a model's activation, a module or a function; `None` if it is none of them.

    It is told by what it does, since Transformers has several classes for one: on a few numbers in float64 it must
    give what the activation gives. Large ones are among them, since some clip at 7 or at 10.
    """
    if not callable(act_fn):
        return None
    large = torch.logspace(0, 4, 17, dtype=torch.float64, device="cpu")
    x = torch.cat([-large, torch.linspace(-4, 4, 33, dtype=torch.float64, device="cpu"), large])
    try:
        y = act_fn(x)
    except Exception:  # an activation of another kind, with weights say, or of another call
        return None
    for name, known in ACTIVATIONS.items():
        if isinstance(y, torch.Tensor) and y.shape == x.shape and torch.allclose(y, known(x), rtol=1e-12, atol=1e-12):
            return name
    return None
