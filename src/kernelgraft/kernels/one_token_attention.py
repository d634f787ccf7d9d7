"""Attention of one query token per sequence: y = softmax(scale * q k^T + mask) v, forward only.

Shapes: q (B, N, 1, D), k and v (B, K, S, D) with N a multiple of K, mask (B or 1, N or 1, 1, S), y (B, 1, N, D).

The keys are split among programs, since one sequence alone has too few heads to fill a GPU: a first kernel gives each
split's sum, its maximum and its denominator in float32, a second puts them together (Dao et al., "Flash-Decoding for
long-context inference", 2023). All queries that share a key head are in one program, so that keys are read once.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import compiling, device, overlap
from .launching import REMEMBERED, Launch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

HEAD_DIMS = (64, 80, 96, 128, 256)
MAX_SPLITS = 64
"""What the second kernel holds at once."""

if triton is not None:

    @triton.jit
    def weighed(scores, allowed, largest, denominator):
        """A block more of a softmax, of scores in base 2.

        Gives the block's weights, what is left of the sums so far, and the new maxima and denominators.
        """
        scores = tl.where(allowed, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp2(scores - shift[:, None])
        kept = tl.exp2(largest - shift)
        return weights, kept, larger, denominator * kept + tl.sum(weights, axis=1)

    @triton.jit(do_not_specialize=["num_keys", "num_splits", "window", "mask_batch", "mask_head"])
    def _attend_split(
        q_ptr, k_ptr, v_ptr, mask_ptr, length_ptr, out_ptr, sums_ptr, stats_ptr,
        num_kv_heads, num_queries, num_keys, num_splits, window, scale,
        q_batch, q_head, k_batch, k_head, k_token, v_batch, v_head, v_token, mask_batch, mask_head, length_batch,
        MASK: tl.constexpr, PER_HEAD: tl.constexpr, LIMITED: tl.constexpr, WINDOWED: tl.constexpr, WHOLE: tl.constexpr,
        OVERLAPS: tl.constexpr, UPCAST: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr,
        KEYS: tl.constexpr,
    ):  # fmt: skip
        if OVERLAPS:
            overlap.wait()
        batch = (tl.program_id(0) // num_kv_heads).to(tl.int64)
        kv_head = (tl.program_id(0) % num_kv_heads).to(tl.int64)
        split = tl.program_id(1)
        columns = tl.arange(0, COLUMNS)
        queries = tl.arange(0, QUERIES)
        inside = columns < DIM
        rows = (queries < num_queries)[:, None] & inside[None, :]
        head = kv_head * num_queries + queries
        q = tl.load(q_ptr + batch * q_batch + (head * q_head)[:, None] + columns[None, :], mask=rows, other=0.0)
        end = num_keys
        if LIMITED:
            end = tl.minimum(tl.load(length_ptr + batch * length_batch).to(tl.int32), num_keys)
        start = 0
        if WINDOWED:
            start = tl.maximum(end - window, 0)
        largest = tl.full([QUERIES], float("-inf"), tl.float32)
        denominator = tl.zeros([QUERIES], tl.float32)
        total = tl.zeros([QUERIES, COLUMNS], tl.float32)
        # The splits take turns, so that each has its share of the keys that count, wherever they are.
        for block in range(start // KEYS + split, tl.cdiv(end, KEYS), num_splits):
            keys = block * KEYS + tl.arange(0, KEYS)
            seen = (keys >= start) & (keys < end)
            at = keys.to(tl.int64)
            allowed = seen[None, :]
            if MASK != 0:
                # Nearly always one for all heads, and then read once and not for each query.
                mask_at = mask_ptr + batch * mask_batch + at[None, :]
                there = seen[None, :]
                if PER_HEAD:
                    mask_at += (head * mask_head)[:, None]
                    there = (queries < num_queries)[:, None] & seen[None, :]
                if MASK == 1:
                    allowed = tl.load(mask_at, mask=there, other=0) != 0
                else:
                    bias = tl.load(mask_at, mask=there, other=float("-inf")).to(tl.float32)
                    allowed = bias > float("-inf")
                # What no query sees is not read: of a cache with room for more, only what is filled.
                seen = tl.max(allowed.to(tl.int32), axis=0) > 0
            read = seen[:, None] & inside[None, :]
            k_at = k_ptr + batch * k_batch + kv_head * k_head + (at * k_token)[:, None] + columns[None, :]
            v_at = v_ptr + batch * v_batch + kv_head * v_head + (at * v_token)[:, None] + columns[None, :]
            k = tl.load(k_at, mask=read, other=0.0)
            v = tl.load(v_at, mask=read, other=0.0)
            # In base 2, which is what the hardware has.
            if UPCAST:
                scores = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32))) * (scale * 1.4426950408889634)
            else:
                scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
            if MASK == 2:
                # The least number that there is stays one: where all have it, all are seen alike.
                scores += tl.maximum(bias, -2.3e38) * 1.4426950408889634
            weights, kept, largest, denominator = weighed(scores, allowed, largest, denominator)
            if UPCAST:
                total = total * kept[:, None] + tl.dot(weights.to(v.dtype).to(tl.float32), v.to(tl.float32))
            else:
                total = tl.dot(weights.to(v.dtype), v, total * kept[:, None], input_precision="ieee")
        out_row = batch * num_kv_heads * num_queries + head
        if WHOLE:
            total = total / tl.where(denominator == 0, 1.0, denominator)[:, None]
            tl.store(out_ptr + out_row[:, None] * DIM + columns[None, :], total.to(out_ptr.dtype.element_ty), mask=rows)
        else:
            row = out_row * num_splits + split
            tl.store(sums_ptr + row[:, None] * DIM + columns[None, :], total, mask=rows)
            tl.store(stats_ptr + row * 2, largest, mask=queries < num_queries)
            tl.store(stats_ptr + row * 2 + 1, denominator, mask=queries < num_queries)

    @triton.jit(do_not_specialize=["num_splits"])
    def _combine(
        sums_ptr, stats_ptr, out_ptr, position_ptr, num_splits,
        COUNTS: tl.constexpr, OVERLAPS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
    ):  # fmt: skip
        if OVERLAPS:
            overlap.wait()
        row = tl.program_id(0).to(tl.int64)
        if COUNTS:
            position = tl.load(position_ptr)
        splits = tl.arange(0, SPLITS)
        columns = tl.arange(0, COLUMNS)
        there = splits < num_splits
        at = row * num_splits + splits
        largest = tl.load(stats_ptr + at * 2, mask=there, other=float("-inf"))
        denominator = tl.load(stats_ptr + at * 2 + 1, mask=there, other=0.0)
        mask = there[:, None] & (columns < DIM)[None, :]
        sums = tl.load(sums_ptr + at[:, None] * DIM + columns[None, :], mask=mask, other=0.0)
        of_all = tl.max(largest, axis=0)
        share = tl.exp2(largest - tl.where(of_all == float("-inf"), 0.0, of_all))
        total = tl.sum(share * denominator, axis=0)
        y = tl.sum(sums * share[:, None], axis=0) / tl.where(total == 0, 1.0, total)
        tl.store(out_ptr + row * DIM + columns, y.to(out_ptr.dtype.element_ty), mask=columns < DIM)
        if COUNTS:  # nobody reads it any more; last, since loads do not pass a store that waits
            tl.store(position_ptr, position + 1, mask=row == 0)


@dataclass(frozen=True)
class Settings:
    """How the kernels are launched.

    Attributes:
        num_splits: Programs that share the keys of one head; with one there is no second kernel.
        keys: Keys that a program has at once.
        num_warps: Warps of a program of the first kernel.
        num_stages: Blocks of keys that are under way.
    """

    num_splits: int
    keys: int
    num_warps: int
    num_stages: int


@functools.cache
def settings(num_pairs: int, num_keys: int, head_dim: int, itemsize: int, num_multiprocessors: int) -> Settings:
    """The launch for so many pairs of a sequence and a key head; a pure function of its arguments.

    Args:
        num_pairs: B * K.
        num_keys: S.
        head_dim: D.
        itemsize: Bytes of an element.
        num_multiprocessors: Programs that run at the same time, at least.
    """
    # 16 KiB of keys in a block, and as many of values; half where not all multiprocessors would have one: 8 key heads
    # of 128 with 512 keys 2.5 us less of a layer on an H200, and a quarter no better.
    keys = 64 if head_dim * itemsize <= 256 else 32 if head_dim * itemsize <= 512 else 16
    if keys > 32 and num_pairs * triton.cdiv(num_keys, keys) < num_multiprocessors:
        keys = 32
    # Two programs for each multiprocessor; up to two blocks of keys go through in the time that the
    # launch of a second kernel takes.
    wanted, num_blocks = max(1, 2 * num_multiprocessors // max(num_pairs, 1)), triton.cdiv(num_keys, keys)
    num_splits = 1 if num_blocks <= 2 else min(wanted, num_blocks, MAX_SPLITS)
    return Settings(num_splits, keys, 4, 2 if head_dim * itemsize > 256 else 3)


@functools.lru_cache(REMEMBERED, typed=True)
def _launches(
    choose: Callable[..., Settings],
    of: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int, int, int],
    num_keys: int,
    window: int | None,
    scale: float,
    strides: tuple[int, ...],
    mask_kind: int,
    per_head: bool,
    limited: bool,
) -> tuple[Launch, Launch | None, int]:
    """The launches of the two kernels, and how many programs share the keys.

    `choose` is `settings`, `heads` sequences, heads of queries and of keys, and their length.
    """
    batch, num_heads, num_kv_heads, dim = heads
    num_queries, pairs = num_heads // num_kv_heads, batch * num_kv_heads
    chosen = choose(pairs, num_keys, dim, dtype.itemsize, device.num_multiprocessors(of))
    splits, columns = chosen.num_splits, triton.next_power_of_2(dim)
    overlaps = overlap.overlaps(of)
    options = overlap.options(overlaps)
    values = (
        num_kv_heads, num_queries, num_keys, splits, window or 0, scale, *strides,
        mask_kind, per_head, limited, window is not None, splits == 1, overlaps, device.INTERPRETED, dim, columns,
        # The matrix units take 16 rows at least; with fewer queries the rest are zeros.
        max(16, triton.next_power_of_2(num_queries)), chosen.keys,
    )  # fmt: skip
    attend = Launch(
        _attend_split, (pairs, splits), values, num_warps=chosen.num_warps, num_stages=chosen.num_stages, **options
    )
    if splits == 1:
        return attend, None, 1
    return attend, combining(of, batch * num_heads, splits, dim, False), splits


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    length: torch.Tensor | None,
    window: int | None,
) -> torch.Tensor:
    """Run the kernels. See `one_token_attention` for the arguments."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, num_heads, _, dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    out = q.new_empty((batch, 1, num_heads, dim))
    if not out.numel() or not num_keys:
        return out.zero_()
    mask, mask_kind, mask_strides = mask_of(mask)
    length_stride = length.stride(0) if length is not None and length.numel() > 1 else 0
    strides = (*q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *mask_strides, length_stride)
    attend, combine, splits = _launches(
        settings, device.of(q), k.dtype, (batch, num_heads, num_kv_heads, dim), num_keys, window, scale, strides,
        mask_kind, mask_strides[1] != 0, length is not None,
    )  # fmt: skip
    sums, stats = empty_parts(out, splits)
    attend(q, k, v, q if mask is None else mask, q if length is None else length, out, sums, stats)
    if combine is not None:
        combine(sums, stats, out, out)
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The same with the last dimension dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def mask_of(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, int, tuple[int, int]]:
    """A mask as the kernels read it, its kind (0 for none, 1 for truth, 2 for numbers), and its first two strides."""
    if mask is None:
        return None, 0, (0, 0)
    mask = _rows(mask)
    strides = (0 if mask.shape[0] == 1 else mask.stride(0), 0 if mask.shape[1] == 1 else mask.stride(1))
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8), 1, strides
    return mask, 2, strides


def empty_parts(out: torch.Tensor, num_splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What splits write for `combining`: sums (B * N, splits, D), and maxima and denominators (B * N, splits, 2)."""
    if num_splits == 1:
        return out, out
    batch, _, num_heads, dim = out.shape
    sums = torch.empty(batch * num_heads, num_splits, dim, dtype=torch.float32, device=out.device)
    return sums, torch.empty(batch * num_heads, num_splits, 2, dtype=torch.float32, device=out.device)


def combining(of: torch.device, num_rows: int, num_splits: int, dim: int, counts: bool) -> Launch:
    """The launch that puts the parts of all splits together: of `empty_parts`, the output and a position.

    With `counts` the position, one integer, is incremented: nobody reads it any more.
    """
    overlaps = overlap.overlaps(of)
    values = (num_splits, counts, overlaps, dim, triton.next_power_of_2(dim), triton.next_power_of_2(num_splits))
    return Launch(_combine, (num_rows,), values, num_warps=4, **overlap.options(overlaps))


# --- operator: what compilers see. Its name holds that of this module, so that two builds of the repository can be in
# one process.


@torch.library.custom_op(f"{__name__.replace('.', '_')}::forward", mutates_args=())
def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    length: torch.Tensor | None,
    window: int | None,
) -> torch.Tensor:
    return launch(q, k, v, scale, mask, length, window)


@compiling.fake(_attend)
def _(q, k, v, scale, mask, length, window):
    return q.new_empty(q.shape[0], 1, q.shape[1], q.shape[3])


# --- what models and other kernels call


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    length: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """`one_token_attention` in plain torch, in float32 (or float64, if `q` is)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    num_queries = q.shape[1] // k.shape[1]
    k, v = (each.to(wide).repeat_interleave(num_queries, dim=1) for each in (k, v))
    scores = q.to(wide) @ k.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    keys = torch.arange(k.shape[2], device=k.device)
    end = torch.full((1, 1, 1, 1), k.shape[2], device=k.device) if length is None else length.reshape(-1, 1, 1, 1)
    end = end.clamp(max=k.shape[2])
    start = 0 if window is None else end - window
    scores = scores.masked_fill(~((keys < end) & (keys >= start)), -math.inf)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)  # where nothing is seen
    return (weights @ v).to(q.dtype).transpose(1, 2)


def refusal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> str | None:
    """Why the kernels do not take these tensors, if they do not."""
    if q.shape[2] != 1:
        return f"it takes one query token, and not {q.shape[2]}"
    if q.shape[3] not in HEAD_DIMS or v.shape[3] != q.shape[3]:
        return f"it takes heads of {', '.join(map(str, HEAD_DIMS))} numbers, and not {q.shape[3]}"
    if not q.dtype == k.dtype == v.dtype:
        return f"queries, keys and values are of one dtype, and not {q.dtype}, {k.dtype} and {v.dtype}"
    if mask is not None and (mask.ndim != 4 or mask.shape[-2:] != (1, k.shape[2])):
        return f"its mask is (B or 1, N or 1, 1, {k.shape[2]}), and not {tuple(mask.shape)}"
    return device.refusal(q)


def one_token_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    length: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of one query token per sequence. Not differentiable.

    Args:
        q: (B, N, 1, D), bfloat16, float16 or float32; D one of `HEAD_DIMS`.
        k: (B, K, S, D), N a multiple of K.
        v: The same.
        scale: What the products of queries and keys are multiplied by.
        mask: (B or 1, N or 1, 1, S): true where a key is seen, or numbers that are added to the scaled products.
        length: One integer, or (B), on the device: only that many keys are seen. It is not read on the host.
        window: How many of the keys that `length` leaves are seen, the last ones.

    Returns:
        (B, 1, N, D), contiguous, as Transformers' attention functions give it; 0 where no key is seen.
    """
    if not device.in_triton(q):
        return reference(q, k, v, scale, mask, length, window)
    if device.launches(q, k, v, mask, length):
        return launch(q, k, v, scale, mask, length, window)
    y: torch.Tensor = _attend(q, k, v, scale, mask, length, window)
    return y
