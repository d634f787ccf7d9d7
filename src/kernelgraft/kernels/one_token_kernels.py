"""The Triton kernel of the product of one token; see `few_tokens` for the formula and the shapes.

Small weights are in registers before x is there: each program has its rows, loads them while the kernel in front still
runs, and that is all. Of larger ones each program goes through many rows, with x, normalized, in its registers and the
next rows on their way to shared memory.
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

    from .product_parts import beside, finished, normalized
except ImportError:
    triton = None

_REGISTERS = 128 << 10
"""Bytes of a weight that the programs on a multiprocessor hold in their registers, of 256 KB that there are."""


if triton is not None:

    @triton.jit
    def _rows(
        tile, at, weight_ptr, num_columns, length, weight_stride,
        ACTIVATION: tl.constexpr, EVEN: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """The rows of the weight of a tile of y, those of up too if gated."""
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        there = (columns < num_columns)[:, None]
        if not EVEN:
            there = there & (at < length)[None, :]
        rows = columns.to(tl.int64)[:, None] * weight_stride + at[None, :]
        weight = tl.load(weight_ptr + rows, mask=there, other=0.0)
        up = weight
        if ACTIVATION != "":
            rows = (columns + num_columns).to(tl.int64)[:, None] * weight_stride + at[None, :]
            up = tl.load(weight_ptr + rows, mask=there, other=0.0)
        return weight, up

    @triton.jit
    def _beside(
        tile, bias_ptr, residual_ptr, num_columns,
        ACTIVATION: tl.constexpr, BIAS: tl.constexpr, ADDS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """The columns of a tile of y, and what `beside` gives for them."""
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < num_columns
        gate_bias, bias, residual = beside(
            bias_ptr, residual_ptr, columns, columns, inside, inside, num_columns, ACTIVATION, BIAS, ADDS
        )
        return columns, gate_bias, bias, residual

    @triton.jit
    def _multiplied(columns, x_row, weight, up, gate_bias, bias, residual, y_ptr, num_columns,
                    ACTIVATION: tl.constexpr, ADDS: tl.constexpr):  # fmt: skip
        """Store these columns of y."""
        gates = tl.sum(weight.to(tl.float32) * x_row, axis=1)
        sums = gates
        if ACTIVATION != "":
            sums = tl.sum(up.to(tl.float32) * x_row, axis=1)
        y = finished(sums, gates, gate_bias, bias, residual, y_ptr.dtype.element_ty, ACTIVATION, ADDS)
        tl.store(y_ptr + columns, y, mask=columns < num_columns)

    @triton.jit
    def _one_token(
        x_ptr, weight_ptr, bias_ptr, scale_ptr, residual_ptr, y_ptr, num_columns, length, weight_stride, eps,
        OFFSET: tl.constexpr, ROUNDS_FIRST: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
        BIAS: tl.constexpr, ADDS: tl.constexpr, OVERLAPS: tl.constexpr, EVEN: tl.constexpr,
        COLUMNS: tl.constexpr, LENGTH: tl.constexpr, STAGES: tl.constexpr, ONCE: tl.constexpr, LATE: tl.constexpr,
    ):  # fmt: skip
        first, step = tl.program_id(0), tl.num_programs(0)
        at = tl.arange(0, LENGTH)
        if ONCE:  # before the kernel in front has ended: it writes no weights, see `overlap`
            weight, up = _rows(first, at, weight_ptr, num_columns, length, weight_stride, ACTIVATION, EVEN, COLUMNS)
            if NORM:
                scale = tl.load(scale_ptr + at, mask=at < length, other=0.0)
        if OVERLAPS:
            overlap.wait(LATE)
        x = tl.load(x_ptr + at, mask=at < length, other=0.0)
        if ONCE:
            columns, gate_bias, bias, residual = _beside(
                first, bias_ptr, residual_ptr, num_columns, ACTIVATION, BIAS, ADDS, COLUMNS
            )
        elif NORM:
            scale = tl.load(scale_ptr + at, mask=at < length, other=0.0)
        if NORM:
            x_fp32 = x.to(tl.float32)
            rstd = tl.rsqrt(tl.sum(x_fp32 * x_fp32, axis=0) / length + eps)
            x = normalized(x, scale, rstd, OFFSET, ROUNDS_FIRST)
        x_row = x.to(tl.float32)[None, :]
        if ONCE:
            _multiplied(columns, x_row, weight, up, gate_bias, bias, residual, y_ptr, num_columns, ACTIVATION, ADDS)
        else:
            # To begin here with x, in the first turn of the loop, so that rows are on their way before, costs more in
            # all the others than it wins.
            for tile in tl.range(first, tl.cdiv(num_columns, COLUMNS), step, num_stages=STAGES):
                columns, gate_bias, bias, residual = _beside(
                    tile, bias_ptr, residual_ptr, num_columns, ACTIVATION, BIAS, ADDS, COLUMNS
                )
                weight, up = _rows(tile, at, weight_ptr, num_columns, length, weight_stride, ACTIVATION, EVEN, COLUMNS)
                _multiplied(columns, x_row, weight, up, gate_bias, bias, residual, y_ptr, num_columns, ACTIVATION, ADDS)
        if OVERLAPS and LATE:
            overlap.release()


@dataclass(frozen=True)
class Settings:
    """How the kernel is launched.

    Attributes:
        columns: Columns of y that a program has at once, so rows of the weight.
        length: The power of two that holds a row.
        num_warps: Its warps.
        num_stages: Blocks of rows that are on their way, where a program goes through several.
        num_programs: Programs that share the columns.
        overlaps: Whether it starts before the kernel in front has ended (programmatic dependent launch).
        late: Whether the one behind it may start only when this one is nearly done.
    """

    columns: int
    length: int
    num_warps: int
    num_stages: int
    num_programs: int
    overlaps: bool
    late: bool


@functools.cache
def settings(
    num_columns: int,
    length: int,
    itemsize: int,
    gated: bool,
    num_multiprocessors: int,
    shared_memory: int,
    overlaps: bool,
) -> Settings:
    """The launch; a pure function of its arguments. `overlaps` says whether the device can.

    Chosen on an H200 in bfloat16 (torch 2.11, Triton 3.6, 2026-11-28), in CUDA graphs of whole decoder layers and of
    RMSNormMLP, since what is fastest alone need not be so behind another kernel; rows in
    benchmarks/results/2026-11-28-nvidia-h200-one-token-settings.txt.
    """
    run = triton.next_power_of_2(max(length, 1))
    row = (2 if gated else 1) * run * itemsize
    if num_columns * row <= _REGISTERS * num_multiprocessors:
        # A layer with H 1024, I 3072 19.6 us; two rows 20.1, eight 20.3 to 20.6; where rows are loaded after the wait,
        # in the L2 cache by then, 22.1 to 22.9. RMSNormMLP 6.9, 7.3 to 7.9, and 8.2.
        columns = 4
        num_warps = max(4, min(columns * row // 8192, 16))
        return Settings(columns, run, num_warps, 1, triton.cdiv(num_columns, columns), overlaps, False)
    # One row at once, with 16 loads of 16 bytes for two threads of it, and two on their way: two rows cost 2 to 10 %.
    # Programs share the rows evenly, so multiprocessors have to have as many each. Where the kernel behind starts early
    # they have not: some get more while this one still holds the others. A layer with H 4096, I 12288 108 us, early
    # 138; with one large program for each multiprocessor 112 to 115.
    columns = max(1, 2048 // (run * itemsize))
    block = columns * row
    num_warps = max(1, min(columns * run * itemsize // 2048, 16))
    num_stages = max(1, min(3, shared_memory // block))
    resident = max(1, min(8, triton.cdiv(40960, block), shared_memory // (num_stages * block)))
    num_programs = min(triton.cdiv(num_columns, columns), resident * num_multiprocessors)
    return Settings(columns, run, num_warps, num_stages, num_programs, overlaps, True)


@functools.lru_cache(REMEMBERED, typed=True)
def launching(
    choose: Callable[..., Settings],
    of: torch.device,
    dtype: torch.dtype,
    num_columns: int,
    length: int,
    weight_stride: int,
    kind: tuple[float, float, bool] | None,
    act: str,
    bias: bool,
    adds: bool,
) -> Launch:
    """The launch of a product: of x, weight, bias, the norm's weight, residual and y.

    `choose` is `settings`, `kind` what a norm has beside its weight.
    """
    can, itemsize = overlap.overlaps(of), dtype.itemsize
    chosen = choose(
        num_columns, length, itemsize, bool(act), device.num_multiprocessors(of), device.shared_memory(of), can
    )
    eps, *rest = kind or (0.0, 0.0, True)
    values = (
        num_columns, length, weight_stride, eps, *rest, kind is not None, act, bias, adds,
        chosen.overlaps, length == chosen.length, chosen.columns, chosen.length, chosen.num_stages,
        chosen.num_programs * chosen.columns >= num_columns, chosen.late,
    )  # fmt: skip
    options = {"num_warps": chosen.num_warps, **overlap.options(chosen.overlaps)}
    return Launch(_one_token, (chosen.num_programs,), values, **options)
