"""Products for many tokens: the library's, and on Hopper, where it is faster, a kernel that activates as it goes.

y = e(x @ weight^T + bias), e a gated activation or nothing. The kernel is in `many_tokens_kernels`. It takes no bias
and records no gradient: in training what lies before the activation has to be kept for the backward.

Shapes: x (..., K), weight (N, K), or (2 N, K) with the gate's rows first; bias as the rows of weight; y (..., N); M
rows, all dimensions of x but the last.
"""

import torch
from torch.nn import functional as F

from . import activation, compiling, device
from .many_tokens_kernels import COLUMNS, EXPONENTS, KNOWN, MIN_LENGTH, ROWS, launch

__all__ = ["MIN_ROWS", "product", "takes"]

MIN_ROWS = 512
"""From so many rows on. The first product of an MLP with its activation takes 17.6 us for 512 rows, H 1024, I 3072, and
by the library 18.5, for 256 17.3 and 13.9; with H 4096, I 12288 137 and 149, and 99.5 and 83.1 (an H200 in bfloat16,
torch 2.11, Triton 3.6, 2026-11-30)."""

_BUSY = {"": 0.9, **dict.fromkeys(EXPONENTS, 0.75)}
"""How much of the multiprocessors' time their blocks take at least, when all take part in the last round, by what is
activated. The library has smaller blocks for other numbers."""


def _multiprocessors(of: torch.device) -> int:
    """How many the kernel has on a device; none where it does not run: it is written for Hopper's tensor cores."""
    if not KNOWN or device.INTERPRETED or of.type != "cuda" or torch.version.hip is not None:
        return 0
    return device.num_multiprocessors(of) if torch.cuda.get_device_capability(of)[0] == 9 else 0


# Or a compiler traces into it, and warns of what it finds cached. `torch.compiler.assume_constant_result` does the
# same, and imports the compiler for it.
_multiprocessors._dynamo_marked_constant = True  # type: ignore[attr-defined]


def takes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, act: str = "") -> bool:
    """Whether the kernel is for this product: it can compute it, and is faster."""
    return _is_able(x, weight, bias, act) and _is_faster(x, weight, act)


def _is_able(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, act: str) -> bool:
    """No bias, no gradient, one dtype of 16 bits, no autocast, rows that can be fetched, and a device of its kind."""
    if bias is not None or act not in _BUSY or not device.in_triton(x):
        return False
    if x.dtype != weight.dtype or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    of, length = device.of(x), x.shape[-1]
    columns = weight.shape[0] // 2 if act else weight.shape[0]
    if torch.is_autocast_enabled(of.type) or length < MIN_LENGTH or length % 8 or columns % 8:
        return False
    return _multiprocessors(of) > 0


def _is_faster(x: torch.Tensor, weight: torch.Tensor, act: str) -> bool:
    """Many rows, and few multiprocessors without work in the last round."""
    rows, at_once = x.numel() // x.shape[-1], _multiprocessors(device.of(x))
    blocks = -(-rows // ROWS) * -(-weight.shape[0] // COLUMNS)
    return rows >= MIN_ROWS and blocks >= _BUSY[act] * -(-blocks // at_once) * at_once


@torch.library.custom_op(f"{__name__.replace('.', '_')}::product", mutates_args=())
def _product(x: torch.Tensor, weight: torch.Tensor, act: str) -> torch.Tensor:
    y = launch(x, weight, act)
    if y is None:
        y = F.linear(x, weight)
        y = activation.gated_activation(y, act) if act else y
    return y


@compiling.fake(_product)
def _(x, weight, act):
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2 if act else weight.shape[0])


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, act: str = "") -> torch.Tensor:
    """act(x @ weight^T + bias).

    Args:
        x: (..., K).
        weight: (N, K); with an activation (2 N, K), the gate's rows first. No output of a kernel of this repository
            that may still run: see `overlap`.
        bias: As many as `weight` has rows.
        act: One of `activation.ACTIVATIONS`, or "".

    Returns:
        (..., N) in the dtype of `x`.
    """
    if device.is_preparing() and _is_able(x, weight, bias, act):
        launch(x, weight, act)  # as the library's way, which other numbers of tokens may take
    if not takes(x, weight, bias, act):
        y = F.linear(x, weight, bias)
        del x  # for many tokens it is large, and who calls may have let it go
        return activation.gated_activation(y, act) if act else y
    if device.launches(x, weight):
        launched = launch(x, weight, act)
        if launched is not None:
            return launched
    made: torch.Tensor = _product(x, weight, act)
    return made
