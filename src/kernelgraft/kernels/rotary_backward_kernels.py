"""The backward kernel of `rotary` and its launch; shapes and halves as in `rotary_kernels`."""

import torch

from . import device
from .add_rows import add_rows
from .launching import run
from .rotary_kernels import batch_strides, dense, settings

try:
    import triton
    import triton.language as tl

    from .rotary_kernels import angles, scales, tile_of
except ImportError:
    triton = None

if triton is not None:

    @triton.jit
    def _grad_heads(
        first, step, grad_ptr, x_ptr, cos_ptr, sin_ptr, weight_ptr, grad_x_ptr, partial_ptr,
        num_rows, num_tokens, num_heads, grad_batch, grad_head, grad_token, x_batch, x_token,
        cos_batch, cos_token, sin_batch, sin_token, grad_x_token, eps,
        TURNS: tl.constexpr, NORMS: tl.constexpr, OFFSET: tl.constexpr, ROUNDS_FIRST: tl.constexpr,
        HALF: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    ):  # fmt: skip
        columns = tl.arange(0, COLUMNS)
        inside = columns < HALF
        if NORMS:
            low_scale, high_scale = scales(weight_ptr + columns, inside, OFFSET, HALF)
            low_sum = tl.zeros([COLUMNS], tl.float32)
            high_sum = tl.zeros([COLUMNS], tl.float32)
        for tile in range(first, tl.cdiv(num_rows, TOKENS) * tl.cdiv(num_heads, HEADS), step):
            batch, token, head, there = tile_of(tile, num_rows, num_tokens, num_heads, TOKENS, HEADS)
            mask = there[:, None] & inside[None, :]
            at = (batch * grad_batch + head * grad_head + token * grad_token)[:, None] + columns[None, :]
            low = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
            high = tl.load(grad_ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)
            if TURNS:
                cos_at = (batch * cos_batch + token * cos_token)[:, None] + columns[None, :]
                sin_at = (batch * sin_batch + token * sin_token)[:, None] + columns[None, :]
                low_cos, high_cos, low_sin, high_sin = angles(cos_ptr + cos_at, sin_ptr + sin_at, mask, HALF)
                turned_back = low * low_cos + high * high_sin
                high = high * high_cos - low * low_sin
                low = turned_back
            if NORMS:
                x_at = (batch * x_batch + token * x_token + head * (2 * HALF))[:, None] + columns[None, :]
                low_x = tl.load(x_ptr + x_at, mask=mask, other=0.0)
                high_x = tl.load(x_ptr + x_at + HALF, mask=mask, other=0.0)
                low_fp32, high_fp32 = low_x.to(tl.float32), high_x.to(tl.float32)
                squares = tl.sum(low_fp32 * low_fp32 + high_fp32 * high_fp32, axis=1)
                rstd = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
                low_fp32, high_fp32 = low_fp32 * rstd, high_fp32 * rstd
                low_rounded, high_rounded = low_fp32, high_fp32
                if ROUNDS_FIRST:
                    low_rounded = low_fp32.to(low_x.dtype).to(tl.float32)
                    high_rounded = high_fp32.to(low_x.dtype).to(tl.float32)
                low_sum += tl.sum(low * low_rounded, axis=0)
                high_sum += tl.sum(high * high_rounded, axis=0)
                low, high = low * low_scale[None, :], high * high_scale[None, :]
                mean = (tl.sum(low * low_fp32 + high * high_fp32, axis=1) / (2 * HALF))[:, None]
                low, high = (low - low_fp32 * mean) * rstd, (high - high_fp32 * mean) * rstd
            to = ((batch * num_tokens + token) * grad_x_token + head * (2 * HALF))[:, None] + columns[None, :]
            tl.store(grad_x_ptr + to, low.to(grad_x_ptr.dtype.element_ty), mask=mask)
            tl.store(grad_x_ptr + to + HALF, high.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if NORMS:
            # Each program has a row of its own: sums in a fixed order, so that the same step gives the same bits.
            tl.store(partial_ptr + columns, low_sum, mask=inside)
            tl.store(partial_ptr + HALF + columns, high_sum, mask=inside)

    @triton.jit(do_not_specialize=["num_rows", "num_tokens", "num_q_programs", "num_k_programs", "num_v_programs"])
    def _backward(
        grad_q_ptr, grad_k_ptr, grad_v_ptr, qkv_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr,
        grad_qkv_ptr, partial_ptr,
        num_rows, num_tokens, num_heads, num_kv_heads, num_q_programs, num_k_programs, num_v_programs,
        qkv_batch, qkv_token, cos_batch, cos_token, sin_batch, sin_token,
        q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, eps,
        NORMS: tl.constexpr, OFFSET: tl.constexpr, ROUNDS_FIRST: tl.constexpr,
        HALF: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0)
        width = (num_heads + 2 * num_kv_heads) * (2 * HALF)
        partial_ptr += program.to(tl.int64) * (2 * HALF)
        if program < num_q_programs:
            _grad_heads(
                program, num_q_programs, grad_q_ptr, qkv_ptr, cos_ptr, sin_ptr, q_weight_ptr, grad_qkv_ptr, partial_ptr,
                num_rows, num_tokens, num_heads, q_batch, q_head, q_token, qkv_batch, qkv_token,
                cos_batch, cos_token, sin_batch, sin_token, width, eps,
                True, NORMS, OFFSET, ROUNDS_FIRST, HALF, COLUMNS, TOKENS, HEADS,
            )  # fmt: skip
        elif program < num_q_programs + num_k_programs:
            skipped = num_heads * (2 * HALF)
            _grad_heads(
                program - num_q_programs, num_k_programs, grad_k_ptr, qkv_ptr + skipped, cos_ptr, sin_ptr,
                k_weight_ptr, grad_qkv_ptr + skipped, partial_ptr,
                num_rows, num_tokens, num_kv_heads, k_batch, k_head, k_token, qkv_batch, qkv_token,
                cos_batch, cos_token, sin_batch, sin_token, width, eps,
                True, NORMS, OFFSET, ROUNDS_FIRST, HALF, COLUMNS, TOKENS, HEADS,
            )  # fmt: skip
        else:
            skipped = (num_heads + num_kv_heads) * (2 * HALF)
            _grad_heads(
                program - num_q_programs - num_k_programs, num_v_programs, grad_v_ptr, qkv_ptr + skipped,
                cos_ptr, sin_ptr, k_weight_ptr, grad_qkv_ptr + skipped, partial_ptr,
                num_rows, num_tokens, num_kv_heads, v_batch, v_head, v_token, qkv_batch, qkv_token,
                cos_batch, cos_token, sin_batch, sin_token, width, eps,
                False, False, OFFSET, ROUNDS_FIRST, HALF, COLUMNS, TOKENS, HEADS,
            )  # fmt: skip


def launch_backward(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    qkv: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    dtype: torch.dtype,
    eps: float,
    offset: float,
    rounds_first: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the backward kernel; `qkv` is needed only where there are norms, and `dtype` is its dtype.

    Returns:
        The gradients of qkv and of the two weights, which are empty where there are no norms.
    """
    grad_q, grad_k, grad_v, cos, sin = (dense(each) for each in (grad_q, grad_k, grad_v, cos, sin))
    batch, num_heads, num_tokens, head_dim = grad_q.shape
    num_kv_heads, num_rows = grad_k.shape[1], batch * num_tokens
    width = (num_heads + 2 * num_kv_heads) * head_dim
    grad_qkv = torch.empty(batch, num_tokens, width, dtype=dtype, device=grad_q.device)
    norms = q_weight is not None and k_weight is not None and qkv is not None
    rows = dense(qkv) if norms and qkv is not None else grad_qkv
    if not num_rows:
        return grad_qkv, *_no_gradients(q_weight, k_weight, grad_q)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    chosen = settings(num_rows, heads, head_dim, device.num_multiprocessors(device.of(grad_q)), True)
    num_q, num_k, _ = chosen.num_programs
    partial = torch.empty(num_q + num_k if norms else 0, head_dim, dtype=torch.float32, device=grad_q.device)
    run(
        _backward, (sum(chosen.num_programs),), grad_q, grad_k, grad_v, rows, cos, sin,
        cos if q_weight is None else q_weight.contiguous(), cos if k_weight is None else k_weight.contiguous(),
        grad_qkv, partial, num_rows, num_tokens, num_heads, num_kv_heads, *chosen.num_programs,
        rows.stride(0), rows.stride(1), *batch_strides(cos), *batch_strides(sin),
        *grad_q.stride()[:3], *grad_k.stride()[:3], *grad_v.stride()[:3], eps,
        NORMS=norms, OFFSET=offset, ROUNDS_FIRST=rounds_first,
        HALF=head_dim // 2, COLUMNS=chosen.columns, TOKENS=chosen.tokens, HEADS=chosen.heads,
        num_warps=chosen.num_warps,
    )  # fmt: skip
    if q_weight is None or k_weight is None:
        return grad_qkv, *_no_gradients(None, None, grad_q)
    return grad_qkv, add_rows(partial[:num_q], q_weight.dtype), add_rows(partial[num_q:], k_weight.dtype)


def _no_gradients(q_weight, k_weight, like):
    return tuple(
        torch.zeros(0, dtype=like.dtype, device=like.device) if weight is None else torch.zeros_like(weight)
        for weight in (q_weight, k_weight)
    )
