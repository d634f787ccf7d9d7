"""The forward kernel of `rotary` and its launches; for the backward see `rotary_backward_kernels`.

Shapes as there: qkv (B, T, (N + 2 K) * D), cos and sin (B or 1, T, D), weights of the norms (D), q (B, N, T, D), k and
v (B, K, T, D). A head is two halves, since the rotation is that of a number of the one with its like in the other.
Where the original has a tensor of the model's dtype (what the norm gives, each product, their sum), the kernel rounds.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import device, overlap
from .launching import REMEMBERED, Launch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:
    TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

    @triton.jit
    def tile_of(tile, num_rows, num_tokens, num_heads, TOKENS: tl.constexpr, HEADS: tl.constexpr):
        """Which batch, token and head each row of a tile is, and whether there is one."""
        head_tiles = tl.cdiv(num_heads, HEADS)
        lane = tl.arange(0, TOKENS * HEADS)
        row = (tile // head_tiles) * TOKENS + lane // HEADS
        head = (tile % head_tiles) * HEADS + lane % HEADS
        there = (row < num_rows) & (head < num_heads)
        return (row // num_tokens).to(tl.int64), (row % num_tokens).to(tl.int64), head.to(tl.int64), there

    @triton.jit
    def normed(low, high, low_scale, high_scale, eps, HALF: tl.constexpr, ROUNDS_FIRST: tl.constexpr,
               DTYPE: tl.constexpr):  # fmt: skip
        """Rows of heads, as two halves, each head normalized; the scales have what the norm adds to its weight."""
        low_fp32, high_fp32 = low.to(tl.float32), high.to(tl.float32)
        squares = tl.sum(low_fp32 * low_fp32 + high_fp32 * high_fp32, axis=1)
        rstd = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        low_fp32, high_fp32 = low_fp32 * rstd, high_fp32 * rstd
        if ROUNDS_FIRST:
            low_fp32, high_fp32 = low_fp32.to(low.dtype).to(tl.float32), high_fp32.to(low.dtype).to(tl.float32)
        return (low_fp32 * low_scale[None, :]).to(DTYPE), (high_fp32 * high_scale[None, :]).to(DTYPE)

    @triton.jit
    def scales(weight_at, mask, OFFSET: tl.constexpr, HALF: tl.constexpr):
        """What a norm multiplies the two halves by."""
        low = tl.load(weight_at, mask=mask, other=0.0).to(tl.float32) + OFFSET
        high = tl.load(weight_at + HALF, mask=mask, other=0.0).to(tl.float32) + OFFSET
        return low, high

    @triton.jit
    def angles(cos_at, sin_at, mask, HALF: tl.constexpr):
        """The cosines and sines of both halves at these addresses, in float32."""
        low_cos = tl.load(cos_at, mask=mask, other=0.0).to(tl.float32)
        high_cos = tl.load(cos_at + HALF, mask=mask, other=0.0).to(tl.float32)
        low_sin = tl.load(sin_at, mask=mask, other=0.0).to(tl.float32)
        high_sin = tl.load(sin_at + HALF, mask=mask, other=0.0).to(tl.float32)
        return low_cos, high_cos, low_sin, high_sin

    @triton.jit
    def turned(low, high, low_cos, high_cos, low_sin, high_sin, DTYPE: tl.constexpr):
        """Rows of heads, as two halves, each rotated by `angles`."""
        low_fp32, high_fp32 = low.to(tl.float32), high.to(tl.float32)
        # Each product is a tensor of the model's dtype there, so each is rounded.
        low_turned = (low_fp32 * low_cos).to(DTYPE).to(tl.float32)
        low_turned -= (high_fp32 * low_sin).to(DTYPE).to(tl.float32)
        high_turned = (high_fp32 * high_cos).to(DTYPE).to(tl.float32)
        high_turned += (low_fp32 * high_sin).to(DTYPE).to(tl.float32)
        return low_turned, high_turned

    @triton.jit
    def _heads(
        first, step, x_ptr, cos_ptr, sin_ptr, weight_ptr, out_ptr, position,
        num_rows, num_tokens, num_heads, num_slots, x_batch, x_token, cos_batch, cos_token, sin_batch, sin_token,
        out_batch, out_head, out_token, eps,
        TURNS: tl.constexpr, NORMS: tl.constexpr, OFFSET: tl.constexpr, ROUNDS_FIRST: tl.constexpr,
        NORM_DTYPE: tl.constexpr, STORES: tl.constexpr, POISONS: tl.constexpr,
        HALF: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    ):  # fmt: skip
        columns = tl.arange(0, COLUMNS)
        inside = columns < HALF
        if NORMS:
            low_scale, high_scale = scales(weight_ptr + columns, inside, OFFSET, HALF)
        for tile in range(first, tl.cdiv(num_rows, TOKENS) * tl.cdiv(num_heads, HEADS), step):
            batch, token, head, there = tile_of(tile, num_rows, num_tokens, num_heads, TOKENS, HEADS)
            mask = there[:, None] & inside[None, :]
            at = (batch * x_batch + token * x_token + head * (2 * HALF))[:, None] + columns[None, :]
            low = tl.load(x_ptr + at, mask=mask, other=0.0)
            high = tl.load(x_ptr + at + HALF, mask=mask, other=0.0)
            if NORMS:
                low, high = normed(low, high, low_scale, high_scale, eps, HALF, ROUNDS_FIRST, NORM_DTYPE)
            if TURNS:
                cos_at = (batch * cos_batch + token * cos_token)[:, None] + columns[None, :]
                sin_at = (batch * sin_batch + token * sin_token)[:, None] + columns[None, :]
                dtype = out_ptr.dtype.element_ty
                low_cos, high_cos, low_sin, high_sin = angles(cos_ptr + cos_at, sin_ptr + sin_at, mask, HALF)
                low, high = turned(low, high, low_cos, high_cos, low_sin, high_sin, dtype)
            slot = token
            if STORES:
                slot = token + position
                there = there & (slot < num_slots)
            if POISONS:
                over = (token + position >= num_slots)[:, None]
                low, high = tl.where(over, float("nan"), low), tl.where(over, float("nan"), high)
            mask = there[:, None] & inside[None, :]
            to = (batch * out_batch + head * out_head + slot * out_token)[:, None] + columns[None, :]
            tl.store(out_ptr + to, low.to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(out_ptr + to + HALF, high.to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit(
        do_not_specialize=["num_rows", "num_tokens", "num_slots", "num_q_programs", "num_k_programs", "num_v_programs"]
    )
    def _forward(
        qkv_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, q_ptr, k_ptr, v_ptr, position_ptr,
        num_rows, num_tokens, num_heads, num_kv_heads, num_slots, num_q_programs, num_k_programs, num_v_programs,
        qkv_batch, qkv_token, cos_batch, cos_token, sin_batch, sin_token,
        q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, eps,
        NORMS: tl.constexpr, OFFSET: tl.constexpr, ROUNDS_FIRST: tl.constexpr, NORM_DTYPE: tl.constexpr,
        STORES: tl.constexpr, OVERLAPS: tl.constexpr,
        HALF: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    ):  # fmt: skip
        if OVERLAPS:
            overlap.wait()
        program = tl.program_id(0)
        position = 0
        if STORES:
            position = tl.load(position_ptr).to(tl.int64)
        if program < num_q_programs:
            _heads(
                program, num_q_programs, qkv_ptr, cos_ptr, sin_ptr, q_weight_ptr, q_ptr, position,
                num_rows, num_tokens, num_heads, num_slots,
                qkv_batch, qkv_token, cos_batch, cos_token, sin_batch, sin_token, q_batch, q_head, q_token, eps,
                True, NORMS, OFFSET, ROUNDS_FIRST, NORM_DTYPE, False, STORES, HALF, COLUMNS, TOKENS, HEADS,
            )  # fmt: skip
        elif program < num_q_programs + num_k_programs:
            _heads(
                program - num_q_programs, num_k_programs, qkv_ptr + num_heads * (2 * HALF), cos_ptr, sin_ptr,
                k_weight_ptr, k_ptr, position, num_rows, num_tokens, num_kv_heads, num_slots,
                qkv_batch, qkv_token, cos_batch, cos_token, sin_batch, sin_token, k_batch, k_head, k_token, eps,
                True, NORMS, OFFSET, ROUNDS_FIRST, NORM_DTYPE, STORES, False, HALF, COLUMNS, TOKENS, HEADS,
            )  # fmt: skip
        else:
            _heads(
                program - num_q_programs - num_k_programs, num_v_programs,
                qkv_ptr + (num_heads + num_kv_heads) * (2 * HALF), cos_ptr, sin_ptr,
                k_weight_ptr, v_ptr, position, num_rows, num_tokens, num_kv_heads, num_slots,
                qkv_batch, qkv_token, cos_batch, cos_token, sin_batch, sin_token, v_batch, v_head, v_token, eps,
                False, False, OFFSET, ROUNDS_FIRST, NORM_DTYPE, STORES, False, HALF, COLUMNS, TOKENS, HEADS,
            )  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How a kernel is launched.

    Attributes:
        tokens: Tokens that a program has at once.
        heads: Heads of each of them that it has at once, a power of two.
        columns: The power of two that holds half a head.
        num_warps: Warps of a program.
        num_programs: Programs for the queries, for the keys and for the values.
    """

    tokens: int
    heads: int
    columns: int
    num_warps: int
    num_programs: tuple[int, int, int]


@functools.cache
def settings(
    num_rows: int, heads: tuple[int, int, int], head_dim: int, num_multiprocessors: int, backward: bool
) -> Settings:
    """The launch for so many tokens and heads of queries, keys and values; a pure function of its arguments."""
    columns = triton.next_power_of_2(head_dim // 2)
    # 2048 elements in a program's registers are 16 for each of 128 threads, and twice as many the other way; with few
    # tokens a program has one head, since then it is the time of one that counts, and all run at the same time. 8192
    # tokens, 16 heads of queries and 8 of keys and values, on an H200 in bfloat16 (torch 2.11, Triton 3.6, 2026-11-29):
    # 35.0 us, with half of them 39.5, with twice as many 36.1; the other way 78.6, with half of them 116, and with 2 or
    # 8 warps 90.2 and 124.
    most = max(1, (4096 if backward else 2048) // (2 * columns))
    wanted = max(1, num_rows * sum(heads) // (4 * num_multiprocessors))
    rows = min(most, 1 << (wanted.bit_length() - 1))
    heads_at_once = min(rows, 1 << (max(min(heads[0], heads[1]), 1).bit_length() - 1))
    tokens = rows // heads_at_once
    num_warps = max(1, min(rows * columns // 256, 4))
    tiles = [triton.cdiv(num_rows, tokens) * triton.cdiv(each, heads_at_once) for each in heads]
    if backward:
        # Each program has a row of sums to write, so there are no more than run at the same time.
        resident = num_multiprocessors * max(1, 16 // num_warps)
        tiles = [min(each, max(1, resident * each // sum(tiles))) if each else 0 for each in tiles]
    return Settings(tokens, heads_at_once, columns, num_warps, (tiles[0], tiles[1], tiles[2]))


def dense(x: torch.Tensor) -> torch.Tensor:
    """The same with the last dimension dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def batch_strides(x: torch.Tensor) -> tuple[int, int]:
    """The strides of cos or sin along batch and tokens; one batch is that of all."""
    return (0 if x.shape[0] == 1 else x.stride(0)), x.stride(1)


def kv_heads_of(qkv: torch.Tensor, num_heads: int, head_dim: int) -> int:
    """How many heads of keys there are; what the queries leave is keys and values."""
    return (qkv.shape[-1] // head_dim - num_heads) // 2


def dtypes(
    qkv: torch.Tensor, cos: torch.Tensor, weight: torch.Tensor | None, rounds_first: bool
) -> tuple[torch.dtype, torch.dtype]:
    """What the norm gives, and what q and k are."""
    normalized = torch.promote_types(qkv.dtype, weight.dtype) if weight is not None and rounds_first else qkv.dtype
    return normalized, torch.promote_types(normalized, cos.dtype)


def empty_heads(qkv: torch.Tensor, num_heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, num_heads, T, D), of which the memory is (B, T, num_heads, D)."""
    batch, num_tokens, _ = qkv.shape
    return torch.empty(batch, num_tokens, num_heads, head_dim, dtype=dtype, device=qkv.device).transpose(1, 2)


def launch(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    num_heads: int,
    head_dim: int,
    eps: float,
    offset: float,
    rounds_first: bool,
    copies: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the forward kernel.

    Returns:
        q, k and v; v is empty unless `copies`.
    """
    num_kv_heads = kv_heads_of(qkv, num_heads, head_dim)
    dtype = dtypes(qkv, cos, q_weight, rounds_first)[1]
    q, k = empty_heads(qkv, num_heads, head_dim, dtype), empty_heads(qkv, num_kv_heads, head_dim, dtype)
    v = empty_heads(qkv, num_kv_heads if copies else 0, head_dim, qkv.dtype)
    _launch(qkv, cos, sin, q_weight, k_weight, q, k, v, None, copies, eps, offset, rounds_first)
    return q, k, v


def launch_into(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    num_heads: int,
    head_dim: int,
    eps: float,
    offset: float,
    rounds_first: bool,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """Run the forward kernel with k and v written into `keys` and `values`; gives q."""
    q = empty_heads(qkv, num_heads, head_dim, dtypes(qkv, cos, q_weight, rounds_first)[1])
    _launch(qkv, cos, sin, q_weight, k_weight, q, keys, values, position, True, eps, offset, rounds_first)
    return q


@functools.lru_cache(REMEMBERED, typed=True)
def _launches(
    choose: Callable[..., Settings],
    of: torch.device,
    num_tokens: tuple[int, int],
    heads: tuple[int, int, int],
    head_dim: int,
    num_slots: int,
    strides: tuple[int, ...],
    norm: tuple[float, float, bool] | None,
    norm_dtype: torch.dtype,
    stores: bool,
) -> Launch:
    """The launch of the forward kernel; `choose` is `settings`, `num_tokens` all of them and those of a sequence."""
    chosen = choose(num_tokens[0], heads, head_dim, device.num_multiprocessors(of), False)
    overlaps, (eps, offset, rounds_first) = overlap.overlaps(of), norm or (0.0, 0.0, True)
    values = (
        *num_tokens, *heads[:2], num_slots, *chosen.num_programs, *strides, eps,
        norm is not None, offset, rounds_first, TRITON_DTYPES[norm_dtype], stores, overlaps,
        head_dim // 2, chosen.columns, chosen.tokens, chosen.heads,
    )  # fmt: skip
    # The rounded products and their sum become arithmetic of the dtype, and fused they would not be rounded.
    options = {"num_warps": chosen.num_warps, "enable_fp_fusion": False, **overlap.options(overlaps)}
    return Launch(_forward, (sum(chosen.num_programs),), values, **options)


def _launch(qkv, cos, sin, q_weight, k_weight, q, k, v, position, copies, eps, offset, rounds_first):
    qkv, cos, sin = dense(qkv), dense(cos), dense(sin)
    batch, num_tokens, _ = qkv.shape
    (num_heads, head_dim), num_rows = (q.shape[1], q.shape[3]), batch * num_tokens
    num_kv_heads = kv_heads_of(qkv, num_heads, head_dim)
    if not num_rows:
        return
    norms = q_weight is not None
    strides = (
        *qkv.stride()[:2], *batch_strides(cos), *batch_strides(sin), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    )  # fmt: skip
    launch = _launches(
        settings, device.of(qkv), (num_rows, num_tokens), (num_heads, num_kv_heads, num_kv_heads if copies else 0),
        head_dim, k.shape[2], strides, (eps, offset, rounds_first) if norms else None,
        dtypes(qkv, cos, q_weight, rounds_first)[0], position is not None,
    )  # fmt: skip
    launch(
        qkv, cos, sin, q_weight.contiguous() if norms else cos, k_weight.contiguous() if norms else cos, q, k, v,
        qkv if position is None else position,
    )  # fmt: skip
