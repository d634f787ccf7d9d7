"""The Triton kernels of products for some tokens; see `few_tokens` for the formula and the shapes.

Each program has some rows of the weight to itself, or a part of their length, and then a second kernel adds up the
parts. The weight is read once, with several loads on their way. One token has a kernel of its own, `one_token_kernels`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import device, one_token_kernels, overlap, rms_norm_kernels
from .launching import REMEMBERED, Launch
from .product_parts import Norm

try:
    import triton
    import triton.language as tl

    from .product_parts import beside, finished
except ImportError:
    triton = None

_ADDED_COLUMNS = 512
"""Columns of one program that adds up parts: 64 tokens, H 1024, I 3072 19.3 us, with 256 20.0, with 1024 19.9; the same
for H 4096, where there are fewer parts (an H200 in bfloat16, torch 2.11, Triton 3.6, 2026-11-29)."""


if triton is not None:

    @triton.jit
    def _dot(x, weight, sums, UPCAST: tl.constexpr):
        if UPCAST:  # the interpreter's products of bfloat16 are wrong
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        return tl.dot(x, weight, sums, input_precision="ieee")

    @triton.jit(do_not_specialize=["num_tokens"])
    def _some_tokens(
        x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr,
        num_tokens, num_columns, length, x_stride, weight_stride, ACTIVATION: tl.constexpr,
        BIAS: tl.constexpr, ADDS: tl.constexpr, OVERLAPS: tl.constexpr, EVEN: tl.constexpr,
        TOKENS: tl.constexpr, COLUMNS: tl.constexpr, LENGTH: tl.constexpr, SPLITS: tl.constexpr, AHEAD: tl.constexpr,
        STAGES: tl.constexpr, UPCAST: tl.constexpr,
    ):  # fmt: skip
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < num_columns
        tokens = tl.arange(0, TOKENS)
        known = tokens < num_tokens
        x_rows = tokens.to(tl.int64)[:, None] * x_stride
        rows = columns.to(tl.int64)[None, :] * weight_stride
        up_rows = (columns + num_columns).to(tl.int64)[None, :] * weight_stride
        first, last = 0, length
        if SPLITS > 1:
            part = tl.cdiv(tl.cdiv(length, LENGTH), SPLITS) * LENGTH
            first = tl.program_id(1) * part
            last = tl.minimum(first + part, length)
        if OVERLAPS:
            if AHEAD:
                # What a product reads of shared memory is stored there as soon as it is loaded, so the first blocks of
                # the weight go to the L2 cache only while the program waits.
                itemsize: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth // 8
                num_bytes = tl.minimum(LENGTH * AHEAD, last - first) * itemsize
                early = tl.minimum(columns, num_columns - 1).to(tl.int64)
                overlap.prefetch_rows(weight_ptr + early * weight_stride + first, num_bytes, COLUMNS)
                if ACTIVATION != "":
                    overlap.prefetch_rows(
                        weight_ptr + (early + num_columns) * weight_stride + first, num_bytes, COLUMNS
                    )
            overlap.wait()
        sums = tl.zeros([TOKENS, COLUMNS], tl.float32)
        gates = tl.zeros([TOKENS, COLUMNS], tl.float32)
        for start in tl.range(first, last, LENGTH, num_stages=STAGES):
            at = start + tl.arange(0, LENGTH)
            x_there, there = known[:, None], inside[None, :]
            if not EVEN:
                x_there, there = x_there & (at < length)[None, :], there & (at < length)[:, None]
            x = tl.load(x_ptr + x_rows + at[None, :], mask=x_there, other=0.0)
            weight = tl.load(weight_ptr + rows + at[:, None], mask=there, other=0.0)
            if ACTIVATION != "":
                gates = _dot(x, weight, gates, UPCAST)
                weight = tl.load(weight_ptr + up_rows + at[:, None], mask=there, other=0.0)
            sums = _dot(x, weight, sums, UPCAST)
        there = known[:, None] & inside[None, :]
        if SPLITS > 1:
            WIDTH: tl.constexpr = 2 if ACTIVATION != "" else 1
            row = (tl.program_id(1) * num_tokens + tokens).to(tl.int64)[:, None] * num_columns * WIDTH
            tl.store(y_ptr + row + columns[None, :], sums, mask=there)
            if ACTIVATION != "":
                tl.store(y_ptr + row + num_columns + columns[None, :], gates, mask=there)
        else:
            to = tokens.to(tl.int64)[:, None] * num_columns + columns[None, :]
            gate_bias, bias, residual = beside(
                bias_ptr, residual_ptr, to, columns[None, :], inside[None, :], there, num_columns,
                ACTIVATION, BIAS, ADDS,
            )  # fmt: skip
            y = finished(sums, gates, gate_bias, bias, residual, y_ptr.dtype.element_ty, ACTIVATION, ADDS)
            tl.store(y_ptr + to, y, mask=there)

    @triton.jit(do_not_specialize=["num_tokens"])
    def _add_splits(
        partial_ptr, bias_ptr, residual_ptr, y_ptr, num_tokens, num_columns, num_blocks,
        ACTIVATION: tl.constexpr, BIAS: tl.constexpr, ADDS: tl.constexpr, OVERLAPS: tl.constexpr,
        SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Add up the parts of a product, always in the same order, and finish it."""
        if OVERLAPS:
            overlap.wait()
        token = tl.program_id(0) // num_blocks
        columns = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < num_columns
        WIDTH: tl.constexpr = 2 if ACTIVATION != "" else 1
        to = token.to(tl.int64) * num_columns + columns
        gate_bias, bias, residual = beside(
            bias_ptr, residual_ptr, to, columns, inside, inside, num_columns, ACTIVATION, BIAS, ADDS
        )
        sums = tl.zeros([BLOCK], tl.float32)
        gates = tl.zeros([BLOCK], tl.float32)
        for split in tl.static_range(SPLITS):
            row_ptr = partial_ptr + (split * num_tokens + token).to(tl.int64) * num_columns * WIDTH
            sums += tl.load(row_ptr + columns, mask=inside, other=0.0)
            if ACTIVATION != "":
                gates += tl.load(row_ptr + num_columns + columns, mask=inside, other=0.0)
        y = finished(sums, gates, gate_bias, bias, residual, y_ptr.dtype.element_ty, ACTIVATION, ADDS)
        tl.store(y_ptr + to, y, mask=inside)


@dataclass(frozen=True)
class Settings:
    """How a kernel is launched.

    Attributes:
        tokens: The power of two that holds the tokens.
        columns: Columns of y of one program, so rows of the weight.
        length: Numbers of each row that it has at once.
        splits: Programs that have a part each of the same rows.
        num_warps: Its warps.
        num_stages: Blocks of the weight that are on their way.
        ahead: Blocks of the weight that go to the L2 cache while it waits for the kernel in front.
        overlaps: Whether it starts before the kernel in front has ended (programmatic dependent launch).
    """

    tokens: int
    columns: int
    length: int
    splits: int
    num_warps: int
    num_stages: int
    ahead: int
    overlaps: bool


@functools.cache
def settings(
    num_tokens: int,
    num_columns: int,
    length: int,
    itemsize: int,
    gated: bool,
    num_multiprocessors: int,
    shared_memory: int,
    overlaps: bool,
) -> Settings:
    """The launch for so many tokens; a pure function of its arguments.

    `overlaps` says whether the device can. Chosen on an H200 in bfloat16 (torch 2.11, Triton 3.6, 2026-11-28), with
    H 4096, I 12288 and H 1024, I 3072.
    """
    gates = 2 if gated else 1
    # Beside its rows each program reads as much of x for each token as of the weight for each row, through the same
    # cache: with two rows for each token it is half as much as of the weight, with 16 rows for 32 tokens twice as much.
    tokens = max(16, triton.next_power_of_2(num_tokens))
    if (
        not gated
        and num_tokens <= 32
        and num_multiprocessors < 2 * triton.cdiv(num_columns, 32) <= 2 * num_multiprocessors
    ):
        # A program for each multiprocessor, with all of its shared memory: 32 tokens, H 4096, I 12288 28.9 us, in two
        # parts of 64 rows 30.6.
        run = min(512 // itemsize, max(triton.next_power_of_2(length), 16))
        num_stages = max(2, min(6, shared_memory // ((tokens + 32) * run * itemsize)))
        return Settings(tokens, 32, run, 1, 4, num_stages, 1, overlaps)
    rows, fewest = 128, max(16, triton.next_power_of_2(2 * num_tokens))
    while rows > fewest and triton.cdiv(num_columns, rows // gates) < num_multiprocessors:
        rows //= 2
    # 16 KB in a block, and of gated ones two cache lines of each row: 32 tokens, H 4096, I 12288 in a graph with the
    # product behind it 79.7 us, with one line and a block more on its way 82.2, with four lines and a block less 84.4.
    lines = 128 * gates // itemsize
    run = min(max(16384 // (rows * itemsize), lines), 512 // itemsize, max(triton.next_power_of_2(length), 16))
    # To add up parts is a launch more, so not before half of the multiprocessors would have nothing to do.
    splits, programs = 1, triton.cdiv(num_columns, rows // gates)
    while 2 * splits * programs <= num_multiprocessors and splits < 8 and length >= 4 * splits * run:
        splits *= 2
    num_stages = min(3 if rows * run * itemsize > 16384 else 4, 1 + shared_memory // ((rows + tokens) * run * itemsize))
    return Settings(tokens, rows // gates, run, splits, 4, num_stages, 1, overlaps)


@functools.lru_cache(REMEMBERED, typed=True)
def _launches(
    choose: Callable[..., Settings],
    of: torch.device,
    dtype: torch.dtype,
    num_tokens: int,
    num_columns: int,
    length: int,
    strides: tuple[int, int],
    act: str,
    bias: bool,
    adds: bool,
) -> tuple[Launch, Launch | None, int]:
    """The launch of a product, that which adds up its parts, and how many parts there are.

    `choose` is `settings`, `strides` those of x and the weight between rows.
    """
    overlaps, itemsize = overlap.overlaps(of), dtype.itemsize
    chosen = choose(
        num_tokens, num_columns, length, itemsize, bool(act), device.num_multiprocessors(of),
        device.shared_memory(of), overlaps,
    )  # fmt: skip
    options, splits = {"num_warps": chosen.num_warps, **overlap.options(chosen.overlaps)}, chosen.splits
    has = (act, bias, adds)
    values: tuple[Any, ...] = (
        num_tokens, num_columns, length, *strides, *has, chosen.overlaps,
        length % chosen.length == 0, chosen.tokens, chosen.columns, chosen.length, splits, chosen.ahead,
        chosen.num_stages, device.INTERPRETED,
    )  # fmt: skip
    product = Launch(_some_tokens, (triton.cdiv(num_columns, chosen.columns), splits), values, **options)
    if splits == 1:
        return product, None, 1
    num_blocks = triton.cdiv(num_columns, _ADDED_COLUMNS)
    values = (num_tokens, num_columns, num_blocks, *has, chosen.overlaps, splits, _ADDED_COLUMNS)
    return product, Launch(_add_splits, (num_tokens * num_blocks,), values, **options), splits


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm: Norm | None,
    act: str,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Run the kernel of one token or of some. See `product`; `act` is "" for none."""
    shape = x.shape
    length, num_columns = shape[-1], weight.shape[0] // 2 if act else weight.shape[0]
    y = x.new_empty((*shape[:-1], num_columns))
    if not y.numel():
        return y
    if x.is_contiguous():  # of which each row is dense, without a view
        rows, stride = x, length
    else:
        rows = device.rows_of(x)
        stride = rows.stride(0)
    if not weight.is_contiguous() and weight.stride(-1) != 1:
        weight = weight.contiguous()
    num_tokens = y.numel() // num_columns
    behind = (act, bias is not None, residual is not None)
    # Where there is none, a pointer that is there stands for it.
    bias = weight if bias is None else bias.contiguous()
    residual = y if residual is None else residual.contiguous()
    if num_tokens == 1:
        kind = None if norm is None else (norm.eps, norm.offset, norm.rounds_first)
        product = one_token_kernels.launching(
            one_token_kernels.settings, device.of(x), x.dtype, num_columns, length, weight.stride(0), kind, *behind
        )
        product(rows, weight, bias, rows if norm is None else norm.weight.contiguous(), residual, y)
        return y
    if norm is not None:
        # Two tokens, H 4096, I 12288 81.1 us; where each program normalizes for itself, and reads all of x twice, 96.6.
        rows = rms_norm_kernels.launch(rows, None, norm.weight, norm.eps, norm.offset, norm.rounds_first, False)[0]
        stride = length
    product, added, splits = _launches(
        settings, device.of(x), x.dtype, num_tokens, num_columns, length, (stride, weight.stride(0)), *behind
    )
    if added is None:
        product(rows, weight, bias, residual, y)
        return y
    width = num_columns * 2 if act else num_columns
    parts = torch.empty(splits, num_tokens, width, dtype=torch.float32, device=x.device)
    product(rows, weight, bias, residual, parts)
    added(parts, bias, residual, y)
    return y
