"""The Triton kernel of `decode_attention`, and its launches: see there for what it computes, and for the shapes.

As in `one_token_attention` the keys are split among programs. A head is two halves, as in `rotary_kernels`, whose
rounding this is: each program rotates the queries of its head itself, and the one that has the new token's place among
its keys writes that token's key and value there, and goes on with them.
"""

import functools
from collections.abc import Callable

import torch

from . import device, one_token_attention, overlap
from .launching import REMEMBERED, Launch
from .rotary_kernels import TRITON_DTYPES, dtypes, kv_heads_of

try:
    import triton
    import triton.language as tl

    from .one_token_attention import weighed
    from .rotary_kernels import angles, normed, scales, turned
except ImportError:
    triton = None


if triton is not None:

    @triton.jit
    def _given(
        qkv_ptr, num_kv_heads, num_queries, kv_head, head, columns, rows, inside,
        HALF: tl.constexpr,
    ):  # fmt: skip
        """The queries of a program and the new token's key and value, in halves."""
        q_at = qkv_ptr + (head * (2 * HALF))[:, None] + columns[None, :]
        q_low, q_high = tl.load(q_at, mask=rows, other=0.0), tl.load(q_at + HALF, mask=rows, other=0.0)
        k_at = qkv_ptr + (num_kv_heads * num_queries + kv_head) * (2 * HALF) + columns[None, :]
        k_low = tl.load(k_at, mask=inside[None, :], other=0.0)
        k_high = tl.load(k_at + HALF, mask=inside[None, :], other=0.0)
        v_at = k_at + num_kv_heads * (2 * HALF)
        v_low = tl.load(v_at, mask=inside[None, :], other=0.0)
        v_high = tl.load(v_at + HALF, mask=inside[None, :], other=0.0)
        return q_low, q_high, k_low, k_high, v_low, v_high

    @triton.jit
    def _block(
        block, k_ptr, v_ptr, k_token, v_token, mask_ptr, mask_rows, has_mask, num_keys, columns, inside,
        MASK: tl.constexpr, PER_HEAD: tl.constexpr, APPENDS: tl.constexpr, FIRST: tl.constexpr, HALF: tl.constexpr,
        KEYS: tl.constexpr,
    ):  # fmt: skip
        """Keys and values that are held, in halves, and what the mask says: truth, or a bias.

        In this token's place is what was there before. The `FIRST` are not waiting for the mask.
        """
        keys = block * KEYS + tl.arange(0, KEYS)
        at = keys.to(tl.int64)
        seen = keys < num_keys
        said = seen[None, :]
        held = keys < num_keys - APPENDS
        if MASK != 0:
            # Nearly always one for all heads, and then read once and not for each query.
            mask_at, asked = mask_ptr + at[None, :], said
            if PER_HEAD:
                mask_at += mask_rows[:, None]
                asked = has_mask[:, None] & asked
            if MASK == 1:
                said = tl.load(mask_at, mask=asked, other=0) != 0
                allowed = said
            else:
                said = tl.load(mask_at, mask=asked, other=float("-inf")).to(tl.float32)
                allowed = said > float("-inf")
            # What no query sees is not looked at: of a cache with room for more, only what is filled, though the first
            # keys are here by then. All of a cache that grows is read, since it goes into the longer one.
            if not APPENDS:
                seen = tl.max(allowed.to(tl.int32), axis=0) > 0
        read = held[:, None] & inside[None, :]
        if not FIRST:
            read = read & seen[:, None]
        k_at = k_ptr + (at * k_token)[:, None] + columns[None, :]
        v_at = v_ptr + (at * v_token)[:, None] + columns[None, :]
        k_low, k_high = tl.load(k_at, mask=read, other=0.0), tl.load(k_at + HALF, mask=read, other=0.0)
        v_low, v_high = tl.load(v_at, mask=read, other=0.0), tl.load(v_at + HALF, mask=read, other=0.0)
        if FIRST and MASK != 0 and not APPENDS:
            v_low, v_high = tl.where(seen[:, None], v_low, 0.0), tl.where(seen[:, None], v_high, 0.0)
        return k_low, k_high, v_low, v_high, said

    @triton.jit
    def _attended(
        block, position, num_keys, q_low, q_high, k_low, k_high, v_low, v_high, said, new_k_low, new_k_high,
        new_v_low, new_v_high, largest, denominator, low_total, high_total, k_ptr, v_ptr, k_token, v_token, scale,
        columns, inside,
        MASK: tl.constexpr, APPENDS: tl.constexpr, UPCAST: tl.constexpr, HALF: tl.constexpr, KEYS: tl.constexpr,
    ):  # fmt: skip
        """The running maxima, denominators and sums with one block more, which is written where it has to be."""
        keys = block * KEYS + tl.arange(0, KEYS)
        at = keys.to(tl.int64)
        there, fresh = keys < num_keys, (at == position)[:, None]
        allowed = said
        if MASK == 2:
            allowed = said > float("-inf")
        k_low, k_high = tl.where(fresh, new_k_low, k_low), tl.where(fresh, new_k_high, k_high)
        v_low, v_high = tl.where(fresh, new_v_low, v_low), tl.where(fresh, new_v_high, v_high)
        written = there[:, None] & inside[None, :]
        if not APPENDS:
            written = written & fresh
        to = k_ptr + (at * k_token)[:, None] + columns[None, :]
        tl.store(to, k_low, mask=written)
        tl.store(to + HALF, k_high, mask=written)
        to = v_ptr + (at * v_token)[:, None] + columns[None, :]
        tl.store(to, v_low, mask=written)
        tl.store(to + HALF, v_high, mask=written)
        # In base 2, which is what the hardware has.
        if UPCAST:
            scores = tl.dot(q_low.to(tl.float32), tl.trans(k_low.to(tl.float32)))
            scores = tl.dot(q_high.to(tl.float32), tl.trans(k_high.to(tl.float32)), scores)
        else:
            scores = tl.dot(q_low, tl.trans(k_low), input_precision="ieee")
            scores = tl.dot(q_high, tl.trans(k_high), scores, input_precision="ieee")
        scores = scores * (scale * 1.4426950408889634)
        if MASK == 2:
            # The least number that there is stays one: where all have it, all are seen alike.
            scores += tl.maximum(said, -2.3e38) * 1.4426950408889634
        weights, kept, largest, denominator = weighed(scores, allowed, largest, denominator)
        weights = weights.to(q_low.dtype)
        low_total, high_total = low_total * kept[:, None], high_total * kept[:, None]
        if UPCAST:
            low_total += tl.dot(weights.to(tl.float32), v_low.to(tl.float32))
            high_total += tl.dot(weights.to(tl.float32), v_high.to(tl.float32))
        else:
            low_total = tl.dot(weights, v_low, low_total, input_precision="ieee")
            high_total = tl.dot(weights, v_high, high_total, input_precision="ieee")
        return largest, denominator, low_total, high_total

    @triton.jit(do_not_specialize=["num_keys", "num_splits", "mask_batch", "mask_head"])
    def _decode_split(
        qkv_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, old_k_ptr, old_v_ptr, k_ptr, v_ptr, position_ptr,
        mask_ptr, out_ptr, sums_ptr, stats_ptr, num_kv_heads, num_queries, num_keys, num_splits, scale, eps,
        qkv_batch, cos_batch, sin_batch, old_k_batch, old_k_head, old_k_token, old_v_batch, old_v_head, old_v_token,
        k_batch, k_head, k_token, v_batch, v_head, v_token, mask_batch, mask_head,
        MASK: tl.constexpr, PER_HEAD: tl.constexpr, APPENDS: tl.constexpr, NORMS: tl.constexpr, OFFSET: tl.constexpr,
        ROUNDS_FIRST: tl.constexpr, NORM_DTYPE: tl.constexpr, WHOLE: tl.constexpr, OVERLAPS: tl.constexpr,
        EARLY: tl.constexpr, UPCAST: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr,
        QUERIES: tl.constexpr, KEYS: tl.constexpr,
    ):  # fmt: skip
        batch = (tl.program_id(0) // num_kv_heads).to(tl.int64)
        kv_head = (tl.program_id(0) % num_kv_heads).to(tl.int64)
        split = tl.program_id(1)
        old_k_ptr += batch * old_k_batch + kv_head * old_k_head
        old_v_ptr += batch * old_v_batch + kv_head * old_v_head
        if OVERLAPS and not EARLY:
            # The keys and values before this token are there already: the first come into the L2 cache meanwhile.
            row_bytes: tl.constexpr = 2 * HALF * (old_k_ptr.dtype.element_ty.primitive_bitwidth // 8)
            early = tl.minimum(split * KEYS + tl.arange(0, KEYS), num_keys - 1 - APPENDS)
            early = tl.maximum(early, 0).to(tl.int64)
            overlap.prefetch_rows(old_k_ptr + early * old_k_token, row_bytes, KEYS)
            overlap.prefetch_rows(old_v_ptr + early * old_v_token, row_bytes, KEYS)
            overlap.wait()
        dtype = out_ptr.dtype.element_ty
        columns = tl.arange(0, COLUMNS)
        inside = columns < HALF
        queries = tl.arange(0, QUERIES)
        has_query = queries < num_queries
        rows = has_query[:, None] & inside[None, :]
        head = kv_head * num_queries + queries
        qkv_ptr += batch * qkv_batch
        # All that is read first is on its way before any of it is looked at.
        if not EARLY:
            q_low, q_high, new_k_low, new_k_high, new_v_low, new_v_high = _given(
                qkv_ptr, num_kv_heads, num_queries, kv_head, head, columns, rows, inside, HALF
            )
        if NORMS:
            q_low_scale, q_high_scale = scales(q_weight_ptr + columns, inside, OFFSET, HALF)
            k_low_scale, k_high_scale = scales(k_weight_ptr + columns, inside, OFFSET, HALF)
        cos_at, sin_at = cos_ptr + batch * cos_batch + columns[None, :], sin_ptr + batch * sin_batch + columns[None, :]
        low_cos, high_cos, low_sin, high_sin = angles(cos_at, sin_at, inside[None, :], HALF)
        mask_ptr += batch * mask_batch
        k_low, k_high, v_low, v_high, said = _block(
            split, old_k_ptr, old_v_ptr, old_k_token, old_v_token, mask_ptr, head * mask_head, has_query,
            num_keys, columns, inside, MASK, PER_HEAD, APPENDS, True, HALF, KEYS,
        )  # fmt: skip
        if EARLY:  # of what is read here the kernel in front wrote this alone
            if OVERLAPS:
                overlap.wait()
            q_low, q_high, new_k_low, new_k_high, new_v_low, new_v_high = _given(
                qkv_ptr, num_kv_heads, num_queries, kv_head, head, columns, rows, inside, HALF
            )
        position = (num_keys - 1).to(tl.int64)
        if not APPENDS:
            position = tl.load(position_ptr).to(tl.int64)
        if NORMS:
            q_low, q_high = normed(q_low, q_high, q_low_scale, q_high_scale, eps, HALF, ROUNDS_FIRST, NORM_DTYPE)
            new_k_low, new_k_high = normed(
                new_k_low, new_k_high, k_low_scale, k_high_scale, eps, HALF, ROUNDS_FIRST, NORM_DTYPE
            )
        q_low, q_high = turned(q_low, q_high, low_cos, high_cos, low_sin, high_sin, dtype)
        new_k_low, new_k_high = turned(new_k_low, new_k_high, low_cos, high_cos, low_sin, high_sin, dtype)
        q_low, q_high = q_low.to(dtype), q_high.to(dtype)
        new_k_low, new_k_high = new_k_low.to(dtype), new_k_high.to(dtype)
        k_ptr += batch * k_batch + kv_head * k_head
        v_ptr += batch * v_batch + kv_head * v_head
        largest = tl.full([QUERIES], float("-inf"), tl.float32)
        denominator = tl.zeros([QUERIES], tl.float32)
        low_total = tl.zeros([QUERIES, COLUMNS], tl.float32)
        high_total = tl.zeros([QUERIES, COLUMNS], tl.float32)
        # The splits take turns, so that each has its share of the keys that count, wherever they are.
        largest, denominator, low_total, high_total = _attended(
            split, position, num_keys, q_low, q_high, k_low, k_high, v_low, v_high, said, new_k_low, new_k_high,
            new_v_low, new_v_high, largest, denominator, low_total, high_total, k_ptr, v_ptr, k_token, v_token, scale,
            columns, inside, MASK, APPENDS, UPCAST, HALF, KEYS,
        )  # fmt: skip
        for block in range(split + num_splits, tl.cdiv(num_keys, KEYS), num_splits):
            k_low, k_high, v_low, v_high, said = _block(
                block, old_k_ptr, old_v_ptr, old_k_token, old_v_token, mask_ptr, head * mask_head, has_query,
                num_keys, columns, inside, MASK, PER_HEAD, APPENDS, False, HALF, KEYS,
            )  # fmt: skip
            largest, denominator, low_total, high_total = _attended(
                block, position, num_keys, q_low, q_high, k_low, k_high, v_low, v_high, said, new_k_low, new_k_high,
                new_v_low, new_v_high, largest, denominator, low_total, high_total, k_ptr, v_ptr, k_token, v_token,
                scale, columns, inside, MASK, APPENDS, UPCAST, HALF, KEYS,
            )  # fmt: skip
        if not APPENDS:
            # Behind the cache's end there is no place for the token: as where the rotation writes, nothing is right.
            over = position >= num_keys
            low_total = tl.where(over, float("nan"), low_total)
            high_total = tl.where(over, float("nan"), high_total)
        out_row = batch * num_kv_heads * num_queries + head
        if WHOLE:
            share = tl.where(denominator == 0, 1.0, denominator)[:, None]
            to = out_ptr + out_row[:, None] * (2 * HALF) + columns[None, :]
            tl.store(to, (low_total / share).to(dtype), mask=rows)
            tl.store(to + HALF, (high_total / share).to(dtype), mask=rows)
        else:
            row = out_row * num_splits + split
            to = sums_ptr + row[:, None] * (2 * HALF) + columns[None, :]
            tl.store(to, low_total, mask=rows)
            tl.store(to + HALF, high_total, mask=rows)
            tl.store(stats_ptr + row * 2, largest, mask=queries < num_queries)
            tl.store(stats_ptr + row * 2 + 1, denominator, mask=queries < num_queries)


@functools.lru_cache(REMEMBERED, typed=True)
def _launches(
    choose: Callable[..., one_token_attention.Settings],
    of: torch.device,
    dtype: torch.dtype,
    norm_dtype: torch.dtype,
    heads: tuple[int, int, int, int],
    num_keys: int,
    scale: float,
    norm: tuple[float, float, bool] | None,
    strides: tuple[int, ...],
    mask_kind: int,
    appends: bool,
    counts: bool,
    early: bool,
) -> tuple[Launch, Launch | None, int]:
    """The launches of the two kernels, and how many programs share the keys.

    `choose` is `one_token_attention.settings`, `heads` sequences, heads of queries and of keys, and their length.
    """
    batch, num_heads, num_kv_heads, dim = heads
    num_queries, pairs, itemsize = num_heads // num_kv_heads, batch * num_kv_heads, dtype.itemsize
    chosen = choose(pairs, num_keys, dim, itemsize, device.num_multiprocessors(of))
    splits, columns, overlaps = chosen.num_splits, triton.next_power_of_2(dim // 2), overlap.overlaps(of)
    eps, offset, rounds_first = norm or (0.0, 0.0, True)
    values = (
        num_kv_heads, num_queries, num_keys, splits, scale, eps, *strides,
        mask_kind, strides[-1] != 0, appends, norm is not None, offset, rounds_first, TRITON_DTYPES[norm_dtype],
        splits == 1, overlaps, early, device.INTERPRETED, dim // 2, columns,
        # The matrix units take 16 rows at least; with fewer queries the rest are zeros.
        max(16, triton.next_power_of_2(num_queries)), chosen.keys,
    )  # fmt: skip
    # As in the rotation, what is rounded may not be fused.
    options = {"enable_fp_fusion": False, **overlap.options(overlaps)}
    attend = Launch(
        _decode_split, (pairs, splits), values, num_warps=chosen.num_warps, num_stages=chosen.num_stages, **options
    )
    if splits == 1:
        return attend, None, 1
    return attend, one_token_attention.combining(of, batch * num_heads, splits, dim, counts), splits


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
    old: tuple[torch.Tensor, torch.Tensor],
    new: tuple[torch.Tensor, torch.Tensor],
    position: torch.Tensor | None,
    scale: float,
    mask: torch.Tensor | None,
    counts: bool = True,
    follows: bool = False,
) -> torch.Tensor:
    """Run the kernels.

    Args:
        qkv: (B, 1, (N + 2 K) * D).
        cos: (B or 1, 1, D).
        sin: The same.
        q_weight: (D), if the heads are normalized.
        k_weight: The same.
        num_heads: N.
        head_dim: D.
        eps: Of the norm.
        offset: What the norm adds to its weights.
        rounds_first: Whether the norm rounds before it multiplies by its weight.
        old: Keys and values before this token, (B, K, S, D).
        new: What they are written to: (B, K, S + 1, D) all of them, or `old` itself, and then only this token's.
        position: Where in `old` the token goes, one integer on the device; `None` if `new` is longer.
        scale: What the products of queries and keys are multiplied by.
        mask: (B or 1, N or 1, 1, number of keys in `new`).
        counts: Whether the position is incremented.
        follows: Whether the kernel in front gave `qkv`, so that it gave nothing else of what is read here.

    Returns:
        (B, 1, N, D).
    """
    batch, num_kv_heads, num_keys = qkv.shape[0], kv_heads_of(qkv, num_heads, head_dim), new[0].shape[2]
    out = qkv.new_empty((batch, 1, num_heads, head_dim))
    if not out.numel():
        return out
    # Nor is anything copied in between.
    early = follows and all(each is None or each.stride(-1) == 1 for each in (cos, sin, q_weight, k_weight, mask))
    mask, mask_kind, mask_strides = one_token_attention.mask_of(mask)
    qkv, cos, sin = (each if each.stride(-1) == 1 else each.contiguous() for each in (qkv, cos, sin))
    strides = (
        qkv.stride(0), 0 if cos.shape[0] == 1 else cos.stride(0), 0 if sin.shape[0] == 1 else sin.stride(0),
        *old[0].stride()[:3], *old[1].stride()[:3], *new[0].stride()[:3], *new[1].stride()[:3], *mask_strides,
    )  # fmt: skip
    attend, combine, splits = _launches(
        one_token_attention.settings, device.of(qkv), qkv.dtype, dtypes(qkv, cos, q_weight, rounds_first)[0],
        (batch, num_heads, num_kv_heads, head_dim), num_keys, scale,
        None if q_weight is None else (eps, offset, rounds_first), strides, mask_kind, position is None,
        counts and position is not None, early,
    )  # fmt: skip
    sums, stats = one_token_attention.empty_parts(out, splits)
    attend(
        qkv, cos, sin, cos if q_weight is None else q_weight.contiguous(),
        cos if k_weight is None else k_weight.contiguous(), *old, *new, qkv if position is None else position,
        qkv if mask is None else mask, out, sums, stats,
    )  # fmt: skip
    if combine is not None:
        combine(sums, stats, out, out if position is None else position)
    elif counts and position is not None:
        position.add_(1)
    return out
