"""The forward kernel of RMS norm, and how it is launched: see `rms_norm`, and `rms_norm_backward_kernels`.

Shapes: x, residual and y (..., H), weight (H), rstd (rows). Rows are all dimensions but the last.
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

MAX_COLUMNS = 1 << 15
"""The longest row: a program holds whole rows in registers."""


if triton is not None:

    @triton.jit
    def _forward_tile(
        tile, weight, x_ptr, residual_ptr, y_ptr, sum_ptr, rstd_ptr,
        num_rows, num_columns, x_stride, residual_stride, eps,
        OFFSET: tl.constexpr, ROUNDS_FIRST: tl.constexpr, ADDS: tl.constexpr, SAVES: tl.constexpr,
        EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        columns = tl.arange(0, COLUMNS)
        rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        there = (rows < num_rows)[:, None]
        if not EVEN:
            there = there & (columns < num_columns)[None, :]
        at = rows[:, None] * num_columns + columns[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=there, other=0.0)
        x_fp32 = x.to(tl.float32)
        if ADDS:
            residual = tl.load(residual_ptr + rows[:, None] * residual_stride + columns[None, :], mask=there, other=0.0)
            # The sum is a tensor of the model: the norm is that of what it holds, rounded.
            x = (x_fp32 + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + at, x, mask=there)
            x_fp32 = x.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x_fp32 * x_fp32, axis=1) / num_columns + eps)
        if SAVES:
            tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
        normalized = x_fp32 * rstd[:, None]
        if ROUNDS_FIRST:
            normalized = normalized.to(x.dtype).to(tl.float32)
        y = normalized * (weight.to(tl.float32) + OFFSET)[None, :]
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=there)

    @triton.jit(do_not_specialize=["num_rows"])
    def _forward_rows(
        x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr,
        num_rows, num_columns, x_stride, residual_stride, eps,
        OFFSET: tl.constexpr, ROUNDS_FIRST: tl.constexpr, ADDS: tl.constexpr, SAVES: tl.constexpr,
        OVERLAPS: tl.constexpr, EVEN: tl.constexpr, ONCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
        STAGES: tl.constexpr,
    ):  # fmt: skip
        if OVERLAPS:
            overlap.wait()
        columns = tl.arange(0, COLUMNS)
        weight = tl.load(weight_ptr + columns, mask=columns < num_columns, other=0.0)
        first = tl.program_id(0)
        if ONCE:  # not a loop of one turn, which would begin when the weight is there
            _forward_tile(
                first, weight, x_ptr, residual_ptr, y_ptr, sum_ptr, rstd_ptr, num_rows, num_columns, x_stride,
                residual_stride, eps, OFFSET, ROUNDS_FIRST, ADDS, SAVES, EVEN, ROWS, COLUMNS,
            )  # fmt: skip
        else:
            for tile in tl.range(first, tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
                _forward_tile(
                    tile, weight, x_ptr, residual_ptr, y_ptr, sum_ptr, rstd_ptr, num_rows, num_columns, x_stride,
                    residual_stride, eps, OFFSET, ROUNDS_FIRST, ADDS, SAVES, EVEN, ROWS, COLUMNS,
                )  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How a kernel is launched.

    Attributes:
        rows: Rows that a program has at once.
        columns: The power of two that holds a row.
        num_warps: Warps of a program.
        num_programs: Programs; each goes through its share of the rows.
        num_stages: Tiles of rows that are on their way, where a program has many.
        overlaps: Whether it starts before the kernel in front has ended, see `overlap`.
    """

    rows: int
    columns: int
    num_warps: int
    num_programs: int
    num_stages: int
    overlaps: bool


def tiled(num_rows: int, num_columns: int, num_multiprocessors: int) -> tuple[int, int, int]:
    """Rows that a program has at once, the power of two that holds one of them, and how often that makes them all."""
    columns = triton.next_power_of_2(max(num_columns, 1))
    rows = max(1, min(4096 // columns, triton.next_power_of_2(max(num_rows // num_multiprocessors, 1))))
    return rows, columns, triton.cdiv(num_rows, rows)


@functools.cache
def settings(num_rows: int, num_columns: int, num_multiprocessors: int, overlaps: bool) -> Settings:
    """The launch for so many rows; a pure function of its arguments.

    Chosen on an H200 in bfloat16 (torch 2.11, Triton 3.6, 2026-11-28, `benchmarks.kernels.sweep`): us, with what else
    was tried.
    """
    rows, columns, tiles = tiled(num_rows, num_columns, num_multiprocessors)
    if tiles <= num_multiprocessors:  # it is the time of one that counts: 32 x 4096 4.5; 16 warps 4.8
        return Settings(rows, columns, max(1, min(rows * columns // 512, 16)), max(tiles, 1), 1, overlaps)
    if rows == 1:
        # 8192 x 4096 36.6, with 4 warps 37.9, two rows 37.5, rows on their way 39.1 to 40.1; stores that pass the cache
        # by 37.3; a copy 35.6 (2026-11-29, in turn).
        return Settings(rows, columns, max(1, min(columns // 512, 16)), tiles, 1, overlaps)
    # 8192 x 1024 12.4, a program for each four rows 12.9.
    num_warps = max(1, min(rows * columns // 1024, 16))
    return Settings(rows, columns, num_warps, min(tiles, 8 * num_multiprocessors), 3, overlaps)


def output_dtype(x: torch.Tensor, weight: torch.Tensor, rounds_first: bool) -> torch.dtype:
    """That of y: see `reference`."""
    return torch.promote_types(x.dtype, weight.dtype) if rounds_first else x.dtype


@functools.lru_cache(REMEMBERED, typed=True)
def _launches(
    choose: Callable[..., Settings],
    of: torch.device,
    num_rows: int,
    num_columns: int,
    strides: tuple[int, int],
    kind: tuple[float, float, bool],
    adds: bool,
    saves: bool,
) -> Launch:
    """The launch of the forward kernel; `choose` is `settings`, `kind` what the norm has beside its weight."""
    chosen = choose(num_rows, num_columns, device.num_multiprocessors(of), overlap.overlaps(of))
    values = (
        num_rows, num_columns, *strides, *kind, adds, saves, chosen.overlaps, chosen.columns == num_columns,
        chosen.num_programs * chosen.rows >= num_rows, chosen.rows, chosen.columns, chosen.num_stages,
    )  # fmt: skip
    options = {"num_warps": chosen.num_warps, **overlap.options(chosen.overlaps)}
    return Launch(_forward_rows, (chosen.num_programs,), values, **options)


def launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    rounds_first: bool,
    saves: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the forward kernel.

    Returns:
        y; x + residual, or x itself if there is no residual; and, if it `saves`, rstd (rows), float32.
    """
    flat, weight = device.rows_of(x), weight.contiguous()
    num_rows, num_columns = flat.shape
    y = torch.empty(x.shape, dtype=output_dtype(x, weight, rounds_first), device=x.device)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device) if saves else y
    total, added = x, flat
    if residual is not None:
        added = device.rows_of(residual)
        total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    if y.numel():
        strides = (flat.stride(0), added.stride(0))
        kind = (eps, offset, rounds_first)
        launched = _launches(
            settings, device.of(x), num_rows, num_columns, strides, kind, residual is not None, saves
        )  # fmt: skip
        launched(flat, added, weight, y, total, rstd)
    return y, total, rstd
