"""How far a right kernel may be from the truth: the constants, why they are what they are, and the comparison itself.

The truth is the original in float64. What is compared is not a distance with a fixed bound but two distances: the
kernel's from the truth over the original's own, both in the dtype in use. So bfloat16's noise is no fault, and a fault
that is small beside the values, but not beside that noise, is one.

A tensor is looked at row by row (its last dim), because rows of activations differ in size by factors of a thousand:
over a whole tensor, the rounding of one large row would hide anything that is wrong in the others.
"""

import math
from dataclasses import dataclass

import torch

MARGIN = 3.0
"""How many times as far as the original a right kernel may be, whatever the number of elements.

Rounding errors of independent steps add up in squares, so a kernel that rounds m times where the original rounds once
is sqrt(m) times as far off: nine steps more than the original are let through, and eight times its error is not."""

LUCK = 5.0
"""A row of n elements has n draws of the rounding error, whose root mean square strays by about 1/sqrt(2n) of itself:
five deviations of a normal distribution and more (its tails are heavier where one product dominates a sum), for both
sides of the quotient. A row of 576 elements is held to 3.6 times the original's error, one of 8 to 8.3 times."""

LARGEST = 1.5
"""The largest element of a row strays more than its root mean square, by the quotient of two maxima."""


def limit(count: int) -> float:
    """The largest quotient that a right kernel reaches over `count` elements."""
    return MARGIN * (1 + LUCK / math.sqrt(max(count, 1)))


def rounding(dtype: torch.dtype, length: int) -> float:
    """The relative error that no kernel is blamed for, even where the original happens to have none.

    One rounding to the dtype (half its epsilon), and sums of `length` terms in at least float32 in any order, of which
    sqrt(length) is the usual and `length` the worst growth. Sums in a narrower dtype than float32 are not covered: they
    are a fault where the original does better.
    """
    sums = torch.promote_types(dtype, torch.float32)
    return torch.finfo(dtype).eps / 2 + torch.finfo(sums).eps / 2 * math.sqrt(max(length, 1))


@dataclass(frozen=True)
class Distance:
    """How far the kernel and the original are from the truth, over one tensor.

    Attributes:
        largest: The largest quotient, kernel's error over original's, of a row.
        median: The quotient of the two errors of the median row.
        limit: What `largest` may be.
        median_limit: What `median` may be.
        kernel: The kernel's error in the row of `largest`, over the size of that row.
        original: The original's there.
        row: The index of that row.
    """

    largest: float
    median: float
    limit: float
    median_limit: float
    kernel: float
    original: float
    row: tuple[int, ...]

    @property
    def is_close(self) -> bool:
        """Whether a right kernel may be so far off."""
        return self.largest <= self.limit and self.median <= self.median_limit


def distance(
    kernel: torch.Tensor,
    originals: list[torch.Tensor],
    truth: torch.Tensor,
    dtype: torch.dtype,
    length: int,
    draws: int | None = None,
    around: float = 0.0,
) -> Distance:
    """Compare, where the truth is finite.

    Args:
        kernel: What the kernel gave, all of it finite where the truth is.
        originals: What the original gave: once, or for inputs too that differ from the real ones by a rounding. The
            worst of them counts for each row.
        truth: The same in higher precision.
        dtype: The dtype in which kernel and original computed.
        length: The number of terms of the longest sum.
        draws: How many rounding errors decide a row, if they are fewer than its elements. A row of a weight's gradient
            is a sum over tokens of rows that are each one number times the input.
        around: The size of the tensors that are computed along with this one. One that is smaller than their rounding
            is zero by cancellation (the gradient of a query where there is one key), and any noise of that size is
            right.
    """
    count = truth.shape[-1] if truth.ndim else 1
    independent = max(count if draws is None else min(count, draws), 1)
    known = truth.isfinite().reshape(-1, count)
    exact = truth.double().reshape(-1, count)
    unknown = None if known.all() else ~known
    if unknown is not None:
        exact = exact.masked_fill(unknown, 0)
    ours = _error(kernel, exact, unknown)
    theirs = [_error(original, exact, unknown) for original in originals]
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    quotients, median = [], 0.0
    # Of n normal numbers the largest is about sqrt(2 log n) deviations.
    reach = 1 + math.sqrt(2 * math.log(max(count, 1)))
    for norm, slack, times in ((_largest, LARGEST, reach), (_root_mean_square, 1.0, 1.0)):
        size = norm(exact)
        usual_size = float(_median(size))
        # Rows that nearly cancel are measured by what is usual: of n numbers rarely all are below 1 / sqrt(n) of it.
        size = size.clamp_min(usual_size / math.sqrt(independent))
        noise = rounding(dtype, length) * around * times
        noise = noise if usual_size < noise else 0.0
        error = torch.stack([norm(each) for each in theirs]).amax(0)
        # A row in which the original was lucky is measured by the original's usual error.
        usual = _median(error / size.clamp_min(tiny))
        bound = error.maximum(size * usual.clamp_min(rounding(dtype, length)) + tiny + noise)
        found = norm(ours)
        quotients.append(found / bound / slack)
        median = float(found.median() / bound.median())
    row = int(torch.stack(quotients).amax(0).argmax())
    size = _root_mean_square(exact[row]).clamp_min(tiny)
    return Distance(
        largest=float(max(each[row] for each in quotients)),
        median=median,
        limit=limit(independent),
        median_limit=limit(independent * len(exact)),
        kernel=float(_root_mean_square(ours[row]) / size),
        original=max(float(_root_mean_square(each[row]) / size) for each in theirs),
        row=_place(row, truth.shape[:-1]),
    )


def _error(found: torch.Tensor, exact: torch.Tensor, unknown: torch.Tensor | None) -> torch.Tensor:
    error = (found.double().reshape(exact.shape) - exact).abs_()
    if unknown is not None:
        error.masked_fill_(unknown, 0)
    return error.nan_to_num_(nan=torch.inf, posinf=torch.inf)


def _root_mean_square(rows: torch.Tensor) -> torch.Tensor:
    return rows.square().mean(-1).sqrt()


def _largest(rows: torch.Tensor) -> torch.Tensor:
    return rows.abs().amax(-1)


def _median(values: torch.Tensor) -> torch.Tensor:
    """The median of those that are not zero."""
    some = values[values > 0]
    return some.median() if len(some) else values.new_zeros(())


def _place(row: int, shape: torch.Size) -> tuple[int, ...]:
    found = []
    for size in reversed(shape):
        row, index = divmod(row, size)
        found.append(index)
    return tuple(reversed(found))
