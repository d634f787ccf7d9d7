"""The Triton kernels of products for few tokens; see `few_tokens`, which calls them, for the formula and the shapes.

With one token each program goes through rows of the weight, with x, normalized, in its registers. With some tokens it
has some rows to itself, or a part of their length, and then a second kernel adds up the parts. The weight is read once,
with several loads on their way. What the original rounds between two modules is rounded here too.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import device, overlap, rms_norm_kernels
from .launching import REMEMBERED, Launch

try:
    import triton
    import triton.language as tl

    from .activation import activated
except ImportError:
    triton = None

NORMED_TOKENS = 4
"""Up to so many tokens each program normalizes for itself: it then reads all of x twice. To be measured."""

_SHARED_MEMORY = 220 << 10
"""Bytes that all programs on a multiprocessor of an H100 or H200 can have."""

_ADDED_COLUMNS = 512
"""Columns of one program that adds up parts. To be measured."""


class Norm(NamedTuple):
    """An RMS norm in front of a product; see `rms_norm`."""

    weight: torch.Tensor
    eps: float
    offset: float = 0.0
    rounds_first: bool = True


if triton is not None:

    @triton.jit
    def _normalized(x, scale, rstd, OFFSET: tl.constexpr, ROUNDS_FIRST: tl.constexpr):
        """In the dtype of x, as the norm's own kernel gives it."""
        y = x.to(tl.float32) * rstd
        if ROUNDS_FIRST:
            y = y.to(x.dtype).to(tl.float32)
        return (y * (scale.to(tl.float32) + OFFSET)).to(x.dtype)

    @triton.jit
    def _beside(bias_ptr, residual_ptr, at, columns, inside, there, num_columns,
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
    def _finished(sums, gates, gate_bias, bias, residual, DTYPE: tl.constexpr,
                  ACTIVATION: tl.constexpr, ADDS: tl.constexpr):  # fmt: skip
        """Bias, activation and residual, each rounded to the dtype, in which the original has it in memory."""
        y = sums + bias
        if ACTIVATION != "":
            acted = activated((gates + gate_bias).to(DTYPE).to(tl.float32), ACTIVATION).to(DTYPE)
            y = acted.to(tl.float32) * y.to(DTYPE).to(tl.float32)
        if ADDS:
            y = y.to(DTYPE).to(tl.float32) + residual
        return y.to(DTYPE)

    @triton.jit
    def _one_token(
        x_ptr, weight_ptr, bias_ptr, scale_ptr, residual_ptr, y_ptr, num_columns, length, weight_stride, eps,
        OFFSET: tl.constexpr, ROUNDS_FIRST: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
        BIAS: tl.constexpr, ADDS: tl.constexpr, OVERLAPS: tl.constexpr, EVEN: tl.constexpr,
        COLUMNS: tl.constexpr, LENGTH: tl.constexpr, AHEAD: tl.constexpr, LINE: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        first, step = tl.program_id(0), tl.num_programs(0)
        at = tl.arange(0, LENGTH)
        if OVERLAPS:
            # While the program waits, and sums up the squares, its first rows come into the L2 cache.
            lines = tl.minimum(tl.arange(0, LENGTH // LINE) * LINE, length - 1)[None, :]
            for early in tl.static_range(AHEAD):
                columns = tl.minimum((first + early * step) * COLUMNS + tl.arange(0, COLUMNS), num_columns - 1)
                overlap.prefetch(weight_ptr + columns.to(tl.int64)[:, None] * weight_stride + lines)
                if ACTIVATION != "":
                    overlap.prefetch(weight_ptr + (columns + num_columns).to(tl.int64)[:, None] * weight_stride + lines)
            overlap.wait()
        x = tl.load(x_ptr + at, mask=at < length, other=0.0)
        if NORM:
            x_fp32 = x.to(tl.float32)
            rstd = tl.rsqrt(tl.sum(x_fp32 * x_fp32, axis=0) / length + eps)
            x = _normalized(x, tl.load(scale_ptr + at, mask=at < length, other=0.0), rstd, OFFSET, ROUNDS_FIRST)
        x_fp32 = x.to(tl.float32)[None, :]
        for tile in tl.range(first, tl.cdiv(num_columns, COLUMNS), step, num_stages=STAGES):
            columns = tile * COLUMNS + tl.arange(0, COLUMNS)
            inside = columns < num_columns
            there = inside[:, None]
            if not EVEN:
                there = there & (at < length)[None, :]
            # Here, so that it is on its way with the weight.
            gate_bias, bias, residual = _beside(
                bias_ptr, residual_ptr, columns, columns, inside, inside, num_columns, ACTIVATION, BIAS, ADDS
            )
            rows = columns.to(tl.int64)[:, None] * weight_stride + at[None, :]
            weight = tl.load(weight_ptr + rows, mask=there, other=0.0)
            sums = tl.sum(weight.to(tl.float32) * x_fp32, axis=1)
            gates = sums
            if ACTIVATION != "":
                rows = (columns + num_columns).to(tl.int64)[:, None] * weight_stride + at[None, :]
                up = tl.load(weight_ptr + rows, mask=there, other=0.0)
                sums = tl.sum(up.to(tl.float32) * x_fp32, axis=1)
            y = _finished(sums, gates, gate_bias, bias, residual, y_ptr.dtype.element_ty, ACTIVATION, ADDS)
            tl.store(y_ptr + columns, y, mask=inside)

    @triton.jit
    def _dot(x, weight, sums, UPCAST: tl.constexpr):
        if UPCAST:  # the interpreter's products of bfloat16 are wrong
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        return tl.dot(x, weight, sums, input_precision="ieee")

    @triton.jit
    def _some_tokens(
        x_ptr, weight_ptr, bias_ptr, scale_ptr, residual_ptr, y_ptr,
        num_tokens, num_columns, length, x_stride, weight_stride, eps,
        OFFSET: tl.constexpr, ROUNDS_FIRST: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
        BIAS: tl.constexpr, ADDS: tl.constexpr, OVERLAPS: tl.constexpr, EVEN: tl.constexpr,
        TOKENS: tl.constexpr, COLUMNS: tl.constexpr, LENGTH: tl.constexpr, SPLITS: tl.constexpr, AHEAD: tl.constexpr,
        LINE: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr,
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
            # What a product reads of shared memory is stored there as soon as it is loaded, so the first blocks of the
            # weight go to the L2 cache only while the program waits, and sums up the squares.
            ahead = tl.minimum(first + tl.arange(0, LENGTH * AHEAD // LINE) * LINE, length - 1)[:, None]
            overlap.prefetch(weight_ptr + tl.where(inside[None, :], rows, 0) + ahead)
            if ACTIVATION != "":
                overlap.prefetch(weight_ptr + tl.where(inside[None, :], up_rows, 0) + ahead)
            overlap.wait()
        rstd = tl.zeros([TOKENS], tl.float32)
        if NORM:
            squares = tl.zeros([TOKENS, LENGTH], tl.float32)
            for start in tl.range(0, length, LENGTH, num_stages=STAGES):
                every = start + tl.arange(0, LENGTH)
                some_of_x = tl.load(
                    x_ptr + x_rows + every[None, :], mask=known[:, None] & (every < length)[None, :], other=0.0
                ).to(tl.float32)
                squares += some_of_x * some_of_x
            rstd = tl.rsqrt(tl.sum(squares, axis=1) / length + eps)
        sums = tl.zeros([TOKENS, COLUMNS], tl.float32)
        gates = tl.zeros([TOKENS, COLUMNS], tl.float32)
        for start in tl.range(first, last, LENGTH, num_stages=STAGES):
            at = start + tl.arange(0, LENGTH)
            x_there, there = known[:, None], inside[None, :]
            if not EVEN:
                x_there, there = x_there & (at < length)[None, :], there & (at < length)[:, None]
            x = tl.load(x_ptr + x_rows + at[None, :], mask=x_there, other=0.0)
            weight = tl.load(weight_ptr + rows + at[:, None], mask=there, other=0.0)
            if NORM:
                scale = tl.load(scale_ptr + at, mask=at < length, other=0.0)[None, :]
                x = _normalized(x, scale, rstd[:, None], OFFSET, ROUNDS_FIRST)
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
            gate_bias, bias, residual = _beside(
                bias_ptr, residual_ptr, to, columns[None, :], inside[None, :], there, num_columns,
                ACTIVATION, BIAS, ADDS,
            )  # fmt: skip
            y = _finished(sums, gates, gate_bias, bias, residual, y_ptr.dtype.element_ty, ACTIVATION, ADDS)
            tl.store(y_ptr + to, y, mask=there)

    @triton.jit
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
        gate_bias, bias, residual = _beside(
            bias_ptr, residual_ptr, to, columns, inside, inside, num_columns, ACTIVATION, BIAS, ADDS
        )
        sums = tl.zeros([BLOCK], tl.float32)
        gates = tl.zeros([BLOCK], tl.float32)
        for split in tl.static_range(SPLITS):
            row_ptr = partial_ptr + (split * num_tokens + token).to(tl.int64) * num_columns * WIDTH
            sums += tl.load(row_ptr + columns, mask=inside, other=0.0)
            if ACTIVATION != "":
                gates += tl.load(row_ptr + num_columns + columns, mask=inside, other=0.0)
        y = _finished(sums, gates, gate_bias, bias, residual, y_ptr.dtype.element_ty, ACTIVATION, ADDS)
        tl.store(y_ptr + to, y, mask=inside)


@dataclass(frozen=True)
class Settings:
    """How a kernel is launched.

    Attributes:
        tokens: The power of two that holds the tokens; 1 for the kernel of one token.
        columns: Columns of y of one program, so rows of the weight.
        length: Numbers of each row that it has at once.
        splits: Programs that have a part each of the same rows; 1 for the kernel of one token.
        num_warps: Its warps.
        num_stages: Blocks of the weight that are on their way.
        num_programs: Programs that share the columns; 0 for the kernel of some tokens, where each has its own.
        ahead: Blocks of the weight that go to the L2 cache while it waits for the kernel in front, a power of two.
        overlaps: Whether it starts before the kernel in front has ended (programmatic dependent launch).
    """

    tokens: int
    columns: int
    length: int
    splits: int
    num_warps: int
    num_stages: int
    num_programs: int
    ahead: int
    overlaps: bool


@functools.cache
def settings(
    num_tokens: int, num_columns: int, length: int, itemsize: int, gated: bool, num_multiprocessors: int, overlaps: bool
) -> Settings:
    """The launch for so many tokens; a pure function of its arguments.

    `overlaps` says whether the device can. Chosen on an H200 in bfloat16 (torch 2.11, Triton 3.6, 2026-11-28,
    `benchmarks.kernels.sweep`), with H 4096, I 12288 and H 1024, I 3072.
    """
    gates = 2 if gated else 1
    if num_tokens == 1:
        # One row at once, and 16 loads of 16 bytes for two threads of it, was best for all four; two rows or half the
        # warps cost 2 to 10 %. Three blocks on their way: with two 10 % more, with four a few per cent.
        run = triton.next_power_of_2(max(length, 1))
        columns = max(1, 2048 // (run * itemsize))
        block = columns * run * itemsize
        num_warps = max(1, min(block // 2048, 16))
        num_stages = max(1, min(3, _SHARED_MEMORY // (gates * block)))
        # 8 programs a multiprocessor for blocks of 4 KB, 3 for 16 KB, 2 for 32 KB.
        resident = max(1, min(8, triton.cdiv(40960, gates * block), _SHARED_MEMORY // (num_stages * gates * block)))
        num_programs = min(triton.cdiv(num_columns, columns), resident * num_multiprocessors)
        return Settings(1, columns, run, 1, num_warps, num_stages, num_programs, 1, overlaps)
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
        num_stages = max(2, min(6, _SHARED_MEMORY // ((tokens + 32) * run * itemsize)))
        return Settings(tokens, 32, run, 1, 4, num_stages, 0, 1, overlaps)
    rows, fewest = 128, max(16, triton.next_power_of_2(2 * num_tokens))
    while rows > fewest and triton.cdiv(num_columns, rows // gates) < num_multiprocessors:
        rows //= 2
    # 16 KB in a block, and whole cache lines.
    run = min(
        max(16384 // (rows * itemsize), 128 // itemsize), 512 // itemsize, max(triton.next_power_of_2(length), 16)
    )
    # To add up parts is a launch more, so not before half of the multiprocessors would have nothing to do.
    splits, programs = 1, triton.cdiv(num_columns, rows // gates)
    while 2 * splits * programs <= num_multiprocessors and splits < 8 and length >= 4 * splits * run:
        splits *= 2
    return Settings(tokens, rows // gates, run, splits, 4, 4, 0, 4, overlaps)


@functools.lru_cache(REMEMBERED, typed=True)
def _launches(
    choose: Callable[..., Settings],
    of: torch.device,
    dtype: torch.dtype,
    num_tokens: int,
    num_columns: int,
    length: int,
    strides: tuple[int, int],
    kind: tuple[float, float, bool] | None,
    act: str,
    bias: bool,
    adds: bool,
) -> tuple[Launch, Launch | None, int]:
    """The launch of a product, that which adds up its parts, and how many parts there are.

    `choose` is `settings`, `strides` those of x and the weight between rows, `kind` what a norm has beside its weight.
    """
    overlaps, itemsize = overlap.overlaps(of), dtype.itemsize
    chosen = choose(
        num_tokens, num_columns, length, itemsize, bool(act), device.num_multiprocessors(of), overlaps
    )  # fmt: skip
    options = {"num_warps": chosen.num_warps, **overlap.options(chosen.overlaps)}
    eps, offset, rounds_first = kind or (0.0, 0.0, True)
    has = (kind is not None, act, bias, adds)
    flags = (offset, rounds_first, *has, chosen.overlaps, length % chosen.length == 0)
    line, splits = overlap.CACHE_LINE // itemsize, chosen.splits
    values: tuple[Any, ...]
    if num_tokens == 1:
        values = (
            num_columns, length, strides[1], eps, *flags, chosen.columns, chosen.length, chosen.ahead,
            min(line, chosen.length), chosen.num_stages,
        )  # fmt: skip
        return Launch(_one_token, (chosen.num_programs,), values, **options), None, 1
    values = (
        num_tokens, num_columns, length, *strides, eps, *flags, chosen.tokens, chosen.columns, chosen.length, splits,
        chosen.ahead, line, chosen.num_stages, device.INTERPRETED,
    )  # fmt: skip
    product = Launch(_some_tokens, (triton.cdiv(num_columns, chosen.columns), splits), values, **options)
    if splits == 1:
        return product, None, 1
    num_blocks = triton.cdiv(num_columns, _ADDED_COLUMNS)
    values = (num_tokens, num_columns, num_blocks, *has[1:], chosen.overlaps, splits, _ADDED_COLUMNS)
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
    if norm is not None and num_tokens > NORMED_TOKENS:
        rows = rms_norm_kernels.launch(rows, None, norm.weight, norm.eps, norm.offset, norm.rounds_first, False)[0]
        norm, stride = None, length
    kind = None if norm is None else (norm.eps, norm.offset, norm.rounds_first)
    product, added, splits = _launches(
        settings, x.device, x.dtype, num_tokens, num_columns, length, (stride, weight.stride(0)), kind, act,
        bias is not None, residual is not None,
    )  # fmt: skip
    out = y
    if added is not None:
        width = num_columns * 2 if act else num_columns
        out = torch.empty(splits, num_tokens, width, dtype=torch.float32, device=x.device)
    bias = weight if bias is None else bias.contiguous()
    residual = y if residual is None else residual.contiguous()
    product(rows, weight, bias, rows if norm is None else norm.weight.contiguous(), residual, out)
    if added is not None:
        added(out, bias, residual, y)
    return y
