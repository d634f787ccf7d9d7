"""Sums over rows, of which each program of a backward kernel has written one: y = sum over r of x[r].

Always in the same order, so that the same step gives the same bits. Shapes: x (R, C) in float32, y (C).
"""

import torch

from . import device, overlap
from .launching import run

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_COLUMNS = 32
"""Columns that one program adds up: a cache line of each row."""

if triton is not None:

    @triton.jit(do_not_specialize=["num_rows"])
    def _add_rows(
        partial_ptr, out_ptr, num_rows, num_columns, OVERLAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
    ):
        """The sums of the columns, always in the same order."""
        if OVERLAPS:
            overlap.wait()
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < num_columns
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, num_rows, ROWS):
            rows = start + tl.arange(0, ROWS)
            at = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
            sums += tl.load(partial_ptr + at, mask=(rows < num_rows)[:, None] & inside[None, :], other=0.0)
        tl.store(out_ptr + columns, tl.sum(sums, axis=0).to(out_ptr.dtype.element_ty), mask=inside)


def add_rows(partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum over the first of two dimensions of a float32 tensor, with what is left of it dense."""
    num_rows, num_columns = partial.shape
    overlaps = overlap.overlaps(device.of(partial))
    out = torch.empty(num_columns, dtype=dtype, device=partial.device)
    rows = min(triton.next_power_of_2(num_rows), 128)
    run(
        _add_rows, (triton.cdiv(num_columns, _COLUMNS),), partial, out, num_rows, num_columns,
        overlaps, rows, _COLUMNS, num_warps=8, **overlap.options(overlaps),
    )  # fmt: skip
    return out
