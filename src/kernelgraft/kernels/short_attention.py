"""Attention of short sequences without a mask, by torch's flash attention: y = softmax(scale * q k^T) v, causal or not.

On an H100, H200, B100 and B200 torch's `scaled_dot_product_attention` takes cuDNN's, which makes a plan for each shape,
in each thread, at its first call. Prompts have another length nearly every time; flash attention needs no plan.

Shapes: q (B, N, T, D), k and v (B, K, T, D) with N a multiple of K, y (B, T, N, D).
"""

import functools

import torch

MAX_SCORES = 1 << 24
"""Of so many scores, B * N * T * T, at most: one prompt of 1024 tokens with 16 heads. There cuDNN takes 24 us and flash
attention 39, for 512 tokens 15 and 25, for 128 10 and 12; for 2048 tokens 55 and 108. Forward and backward take as long
either way (0.27 and 0.29 ms). cuDNN's plan takes 65 ms, and another one for the backward 80: 150 prompts of 1024 tokens
in 28 layers would have to be of one length before that is made up (an H200, D 128, K 8, bfloat16, torch 2.11, cuDNN
9.19, 2026-11-30)."""

MAX_HEAD_DIM = 256
"""What flash attention takes at most."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention.default


def is_planned(of: torch.device) -> bool:
    """Whether torch, left alone, may have cuDNN plan attention on a device, and nobody told it otherwise.

    What is compiled, transformed or cast on the way stays with torch too.
    """
    if torch.compiler.is_compiling() or not _has_plans(of) or torch.is_autocast_enabled(of.type):
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return bool(torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled())


@functools.cache
def _has_plans(of: torch.device) -> bool:
    if of.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(of) in ((9, 0), (10, 0))


def takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether it is short, and flash attention computes it."""
    batch, num_heads, length, dim = q.shape
    if not 0 < batch * num_heads * length**2 <= MAX_SCORES or dim > MAX_HEAD_DIM or dim % 8:
        return False
    if q.dtype not in (torch.bfloat16, torch.float16) or not q.dtype == k.dtype == v.dtype:
        return False
    if k.shape != v.shape or (k.shape[0], *k.shape[2:]) != (batch, length, dim) or num_heads % k.shape[1]:
        return False
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        return False
    return type(q) is type(k) is type(v) is torch.Tensor


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, is_causal: bool) -> torch.Tensor:
    """Attention of what `takes` takes.

    Args:
        q: (B, N, T, D), in bfloat16 or float16.
        k: (B, K, T, D).
        v: As `k`.
        scale: Of the scores.
        is_causal: Whether a token sees none behind it.

    Returns:
        (B, T, N, D); where they lie in memory is as torch has it.
    """
    y: torch.Tensor = _flash(q, k, v, 0.0, is_causal, scale=scale)[0]
    return y.transpose(1, 2)
