"""Proof that strided regions cover a tensor's memory exactly once: by exact arithmetic, never by sampling."""

import math
from collections.abc import Iterable

from kernelgraft.conversion.moves import Move

# The proof by marking holds a byte per element of what is left once common structure is divided out.
MAX_MARKED = 1 << 22

Region = tuple[tuple[tuple[int, int], ...], int]  # ((size, stride) from the outermost, ...), offset


def written(moves: Iterable[Move]) -> list[Region]:
    """The regions of the own memory that moves write."""
    return [_region([(dim.size, dim.into) for dim in move.dims], move.into) for move in moves]


def elements(regions: Iterable[Region]) -> int:
    """How many elements regions have, counted as often as they occur."""
    return sum(math.prod(size for size, _ in dims) for dims, _ in regions)


def _region(dims: Iterable[tuple[int, int]], offset: int) -> Region:
    merged: list[tuple[int, int]] = []
    for size, stride in sorted(dims, key=lambda dim: -dim[1]):
        if merged and merged[-1][1] == stride * size:
            merged[-1] = (merged[-1][0] * size, stride)
        elif size > 1:
            merged.append((size, stride))
    return tuple(merged), offset


def covered_once(regions: list[Region], numel: int) -> bool | None:
    """Whether regions cover each of `numel` elements exactly once; exact, and None if that is too large to settle."""
    if elements(regions) != numel:
        return False
    if any(stride == 0 for dims, _ in regions for _, stride in dims) or any(_end(r) > numel for r in regions):
        return False
    if len(regions) <= 1:
        return numel == 0 or regions[0] in ((((numel, 1),), 0), ((), 0))
    outer = regions[0][0][0] if regions[0][0] else None
    if outer and outer[0] * outer[1] == numel and all(_repeats(region, outer) for region in regions):
        return covered_once([(dims[1:], offset) for dims, offset in regions], outer[1])
    spans = _spans(regions)
    if len(spans) > 1:
        return _each(spans, numel)
    return _marked_once(regions, numel)


def _end(region: Region) -> int:
    dims, offset = region
    return offset + sum((n - 1) * s for n, s in dims) + 1


def _repeats(region: Region, outer: tuple[int, int]) -> bool:
    dims, offset = region
    return bool(dims) and dims[0] == outer and offset + sum((n - 1) * s for n, s in dims[1:]) < outer[1]


def _spans(regions: list[Region]) -> list[tuple[int, int, list[Region]]]:
    """Groups of regions whose spans of memory overlap: (first, end, regions)."""
    spans: list[tuple[int, int, list[Region]]] = []
    for dims, offset in sorted(regions, key=lambda region: region[1]):
        end = _end((dims, offset))
        if spans and offset < spans[-1][1]:
            first, old_end, group = spans[-1]
            spans[-1] = (first, max(old_end, end), [*group, (dims, offset)])
        else:
            spans.append((offset, end, [(dims, offset)]))
    return spans


def _each(spans: list[tuple[int, int, list[Region]]], numel: int) -> bool | None:
    bounds = [first for first, _, _ in spans] + [numel]
    if bounds[0] != 0 or any(end != bounds[i + 1] for i, (_, end, _) in enumerate(spans)):
        return False
    answers = [
        covered_once([(dims, offset - first) for dims, offset in group], end - first) for first, end, group in spans
    ]
    if any(answer is False for answer in answers):
        return False
    return None if None in answers else True


def _marked_once(regions: list[Region], numel: int) -> bool | None:
    """Marks every element, in units of the largest run in which all regions are made."""
    unit = numel
    for dims, offset in regions:
        run = dims[-1][0] if dims and dims[-1][1] == 1 else 1
        unit = math.gcd(unit, run, offset, *(stride for _, stride in dims if stride != 1))
    if numel // unit > MAX_MARKED:
        return None
    marks = bytearray(numel // unit)
    count = _mark(marks, regions, unit)
    return count == len(marks) and marks.count(1) == len(marks)


def _mark(marks: bytearray, regions: list[Region], unit: int) -> int:
    count = 0
    for dims, offset in regions:
        scaled = [(n // unit, 1) if s == 1 else (n, s // unit) for n, s in dims] or [(1, 1)]
        *outer, (size, stride) = scaled
        starts = [offset // unit]
        for n, s in outer:
            starts = [start + i * s for start in starts for i in range(n)]
        for start in starts:
            marks[start : start + (size - 1) * stride + 1 : stride] = b"\1" * size
            count += size
    return count
