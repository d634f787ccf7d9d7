"""The backward kernels of RMS norm, and how they are launched: see `rms_norm`.

With n = x * rstd and w = offset + weight, where n is rounded for the weight as it was forward:

    grad_x = rstd * (w * grad_y - n * mean(w * grad_y * n)) + grad_sum
    grad_weight = sum over rows of grad_y * n

Shapes: x, grad_y, grad_sum and grad_x (..., H), weight and grad_weight (H), rstd (rows). Rows are all dimensions but
the last; x is what was normalized, so the sum where there was one.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import device, overlap
from .add_rows import add_rows
from .launching import REMEMBERED, Launch
from .rms_norm_kernels import Settings, tiled

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


if triton is not None:

    @triton.jit
    def _loaded(
        grad_y_ptr, x_ptr, rstd_ptr, rows, columns, num_rows, there, grad_y_stride, x_stride,
        ROUNDS_FIRST: tl.constexpr,
    ):  # fmt: skip
        """Of a tile in float32: the gradient of y, rstd, n, and n as the weight met it."""
        x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=there, other=0.0)
        grad_y = tl.load(grad_y_ptr + rows[:, None] * grad_y_stride + columns[None, :], mask=there, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        normalized = x.to(tl.float32) * rstd
        rounded = normalized
        if ROUNDS_FIRST:
            rounded = normalized.to(x.dtype).to(tl.float32)
        return grad_y.to(tl.float32), rstd, normalized, rounded

    @triton.jit
    def _store_grad_x(
        grad_sum_ptr, grad_x_ptr, weighted, rstd, normalized, rows, columns, num_columns, there, grad_sum_stride,
        ADDS: tl.constexpr,
    ):  # fmt: skip
        """Of a tile of whole rows, `weighted` being w * grad_y."""
        mean = tl.sum(weighted * normalized, axis=1) / num_columns
        grad_x = (weighted - normalized * mean[:, None]) * rstd
        if ADDS:
            grad_x += tl.load(
                grad_sum_ptr + rows[:, None] * grad_sum_stride + columns[None, :], mask=there, other=0.0
            ).to(tl.float32)
        at = rows[:, None] * num_columns + columns[None, :]
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=there)

    @triton.jit(do_not_specialize=["num_rows"])
    def _backward_few_rows(
        grad_y_ptr, grad_sum_ptr, x_ptr, weight_ptr, rstd_ptr, grad_x_ptr, grad_weight_ptr,
        num_rows, num_columns, grad_y_stride, grad_sum_stride, x_stride,
        OFFSET: tl.constexpr, ROUNDS_FIRST: tl.constexpr, ADDS: tl.constexpr, OVERLAPS: tl.constexpr,
        EVEN: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
        STAGES: tl.constexpr,
    ):  # fmt: skip
        """A program for each row of grad_x, and after those one for each block of columns of grad_weight."""
        if OVERLAPS:
            overlap.wait()
        program = tl.program_id(0)
        if program < num_rows:
            rows = program + tl.arange(0, 1).to(tl.int64)
            columns = tl.arange(0, COLUMNS)
            inside = columns < num_columns
            there = (rows < num_rows)[:, None]
            if not EVEN:
                there = there & inside[None, :]
            scale = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) + OFFSET
            grad_y, rstd, normalized, _ = _loaded(
                grad_y_ptr, x_ptr, rstd_ptr, rows, columns, num_rows, there, grad_y_stride, x_stride, ROUNDS_FIRST
            )
            _store_grad_x(
                grad_sum_ptr, grad_x_ptr, grad_y * scale[None, :], rstd, normalized, rows, columns, num_columns, there,
                grad_sum_stride, ADDS,
            )  # fmt: skip
        else:
            block = (program - num_rows) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
            within = block < num_columns
            # What each program adds up stays its own, in a fixed order, so that the same step gives the same bits.
            sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
            for start in tl.range(0, num_rows, BLOCK_ROWS, num_stages=STAGES):
                some = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
                given = (some < num_rows)[:, None]
                if not EVEN:
                    given = given & within[None, :]
                upstream, _, _, rounded = _loaded(
                    grad_y_ptr, x_ptr, rstd_ptr, some, block, num_rows, given, grad_y_stride, x_stride, ROUNDS_FIRST
                )
                sums += upstream * rounded
            grad_weight = tl.sum(sums, axis=0).to(grad_weight_ptr.dtype.element_ty)
            tl.store(grad_weight_ptr + block, grad_weight, mask=within)

    @triton.jit(do_not_specialize=["num_rows"])
    def _backward_rows(
        grad_y_ptr, grad_sum_ptr, x_ptr, weight_ptr, rstd_ptr, grad_x_ptr, partial_ptr,
        num_rows, num_columns, grad_y_stride, grad_sum_stride, x_stride,
        OFFSET: tl.constexpr, ROUNDS_FIRST: tl.constexpr, ADDS: tl.constexpr, OVERLAPS: tl.constexpr,
        EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """Each program writes the sum over its rows of what grad_weight is the sum of; they are added up later."""
        if OVERLAPS:
            overlap.wait()
        columns = tl.arange(0, COLUMNS)
        inside = columns < num_columns
        scale = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) + OFFSET
        grad_weight = tl.zeros([COLUMNS], tl.float32)
        for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
            rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
            there = (rows < num_rows)[:, None]
            if not EVEN:
                there = there & inside[None, :]
            grad_y, rstd, normalized, rounded = _loaded(
                grad_y_ptr, x_ptr, rstd_ptr, rows, columns, num_rows, there, grad_y_stride, x_stride, ROUNDS_FIRST
            )
            grad_weight += tl.sum(grad_y * rounded, axis=0)
            _store_grad_x(
                grad_sum_ptr, grad_x_ptr, grad_y * scale[None, :], rstd, normalized, rows, columns, num_columns, there,
                grad_sum_stride, ADDS,
            )  # fmt: skip
        # Each program has a row of its own: sums in a fixed order, so that the same step gives the same bits.
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * num_columns + columns, grad_weight, mask=inside)


@dataclass(frozen=True)
class FewRows(Settings):
    """How the kernel of few rows is launched; a program has one row, or some columns of all.

    Attributes:
        block_rows: Rows that a program of the weight's gradient has at once.
        block_columns: Its columns.
    """

    block_rows: int
    block_columns: int


@functools.cache
def settings(num_rows: int, num_columns: int, num_multiprocessors: int, overlaps: bool) -> Settings:
    """The launch for so many rows, in one kernel if they are `FewRows`; a pure function of its arguments.

    Chosen on an H200 in bfloat16 (torch 2.11, Triton 3.6, 2026-11-28, `benchmarks.kernels.sweep`): us, with what else
    was tried.
    """
    rows, columns, tiles = tiled(num_rows, num_columns, num_multiprocessors)
    if num_rows <= num_multiprocessors:
        # With a program for each row there are as many rows of sums: to write and read those in float32 moves no less
        # than to read x and the gradient of y again, and takes a second launch: 32 x 4096 8.3, so 5.8, where
        # torch.compile has 7.5. At least 128 bytes of each row are a program's, as many elements as other programs
        # have, and 16 or so a thread's.
        block_columns = max(64, triton.next_power_of_2(triton.cdiv(num_columns, num_multiprocessors)))
        block_columns = min(block_columns, columns)
        block_rows = min(triton.next_power_of_2(num_rows), max(4096 // block_columns, 1))
        num_warps = max(1, min(max(columns, block_rows * block_columns) // 512, 16))
        num_programs = num_rows + triton.cdiv(num_columns, block_columns)
        num_stages = min(triton.cdiv(num_rows, block_rows), 3)
        return FewRows(1, columns, num_warps, num_programs, num_stages, overlaps, block_rows, block_columns)
    if tiles <= num_multiprocessors:  # it is the time of one that counts
        return Settings(rows, columns, max(1, min(rows * columns // 512, 16)), tiles, 1, overlaps)
    # Each program has a row of sums to write, so there are no more than run at the same time. 8192 x 4096 59.5 with 8
    # warps, 3 programs for a multiprocessor 62.6, without rows on their way 62.2; 8192 x 1024 23.3.
    num_warps = max(1, min(columns // 512, 16)) if rows == 1 else 4
    num_stages = 3 if columns <= 4096 else 2 if columns <= 8192 else 1
    return Settings(rows, columns, num_warps, min(tiles, 2 * num_multiprocessors), num_stages, overlaps)


@functools.lru_cache(REMEMBERED, typed=True)
def _launches(
    choose: Callable[..., Settings],
    of: torch.device,
    num_rows: int,
    num_columns: int,
    strides: tuple[int, int, int],
    kind: tuple[float, bool],
    adds: bool,
) -> tuple[Launch, int]:
    """The launch, and how many rows of sums it writes, none if it writes the weight's gradient itself.

    `choose` is `settings`, `kind` what the norm has beside its weight.
    """
    chosen = choose(num_rows, num_columns, device.num_multiprocessors(of), overlap.overlaps(of))
    options = {"num_warps": chosen.num_warps, **overlap.options(chosen.overlaps)}
    values = (num_rows, num_columns, *strides, *kind, adds, chosen.overlaps, chosen.columns == num_columns)
    if isinstance(chosen, FewRows):
        tile = (chosen.columns, chosen.block_rows, chosen.block_columns, chosen.num_stages)
        return Launch(_backward_few_rows, (chosen.num_programs,), (*values, *tile), **options), 0
    tiles = (chosen.rows, chosen.columns, chosen.num_stages)
    return Launch(_backward_rows, (chosen.num_programs,), (*values, *tiles), **options), chosen.num_programs


def launch_backward(
    grad_y: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    rounds_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the backward kernel; `x` is what was normalized, so the sum where there was one.

    Returns:
        The gradients of `x` and of `weight`.
    """
    flat, flat_grad, weight = device.rows_of(x), device.rows_of(grad_y), weight.contiguous()
    num_rows, num_columns = flat.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not grad_x.numel():
        return grad_x, torch.zeros_like(weight)
    flat_sum = flat_grad if grad_sum is None else device.rows_of(grad_sum)
    strides = (flat_grad.stride(0), flat_sum.stride(0), flat.stride(0))
    launched, num_sums = _launches(
        settings, device.of(x), num_rows, num_columns, strides, (offset, rounds_first), grad_sum is not None
    )
    if num_sums:
        partial = torch.empty(num_sums, num_columns, dtype=torch.float32, device=x.device)
        launched(flat_grad, flat_sum, flat, weight, rstd, grad_x, partial)
        return grad_x, add_rows(partial, weight.dtype)
    grad_weight = torch.empty_like(weight)
    launched(flat_grad, flat_sum, flat, weight, rstd, grad_x, grad_weight)
    return grad_x, grad_weight
