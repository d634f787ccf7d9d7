"""The operations of ATen that only move bytes, on lazy tensors: one table, from the operation to what it does."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kernelgraft.conversion import moves as mv
from kernelgraft.conversion.lazy import LazyTensor, is_lossless
from kernelgraft.conversion.moves import Move, Shape

aten = torch.ops.aten


class NotARelayoutError(Exception):
    """The operation computes something with these arguments; the caller goes on eagerly."""


def _new(like: LazyTensor, moves: tuple[Move, ...], shape: Sequence[int]) -> LazyTensor:
    return LazyTensor(moves, shape, like.dtype, like.device)


def _same(lazy: LazyTensor, *_: Any, **__: Any) -> LazyTensor:
    return _new(lazy, lazy.moves, lazy.shape)


def _dim(lazy: LazyTensor, dim: int) -> int:
    if not -lazy.ndim <= dim < lazy.ndim:
        raise IndexError(f"Dimension out of range (expected to be in [{-lazy.ndim}, {lazy.ndim - 1}], but got {dim})")
    return dim % lazy.ndim


def _view(lazy: LazyTensor, size: Sequence[int], *_: Any) -> LazyTensor:
    size = list(size)
    if -1 in size:
        rest = -math.prod(size)
        size[size.index(-1)] = lazy.numel() // rest if rest else 0
    if math.prod(size) != lazy.numel():
        raise RuntimeError(f"shape '{size}' is invalid for input of size {lazy.numel()}")
    return _new(lazy, lazy.moves, size)


def _permute(lazy: LazyTensor, dims: Sequence[int]) -> LazyTensor:
    order = [_dim(lazy, dim) for dim in dims]
    if sorted(order) != list(range(lazy.ndim)):
        raise RuntimeError(f"permute(dims={list(dims)}) does not name each of the {lazy.ndim} dims once")
    return _new(lazy, mv.permute(lazy.moves, tuple(lazy.shape), order), [lazy.shape[k] for k in order])


def _transpose(lazy: LazyTensor, dim0: int, dim1: int) -> LazyTensor:
    if lazy.ndim == 0:
        return _same(lazy)
    order = list(range(lazy.ndim))
    a, b = _dim(lazy, dim0), _dim(lazy, dim1)
    order[a], order[b] = b, a
    return _permute(lazy, order)


def _t(lazy: LazyTensor) -> LazyTensor:
    return _transpose(lazy, 0, 1) if lazy.ndim == 2 else _same(lazy)


def _take(lazy: LazyTensor, dim: int, index: range) -> LazyTensor:
    shape = tuple(lazy.shape)
    taken = mv.take(lazy.moves, shape, dim, index)
    return _new(lazy, taken, (*shape[:dim], len(index), *shape[dim + 1 :]))


def _slice(
    lazy: LazyTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> LazyTensor:
    dim = _dim(lazy, dim)
    index = range(*slice(start, end, step).indices(lazy.shape[dim]))
    # ATen's step is positive, and a reversed range is empty, as here.
    return _take(lazy, dim, index)


def _select(lazy: LazyTensor, dim: int, index: int) -> LazyTensor:
    dim = _dim(lazy, dim)
    size = lazy.shape[dim]
    if not -size <= index < size:
        raise IndexError(f"select(): index {index} out of range for tensor of size {list(lazy.shape)} at dim {dim}")
    return _squeeze_dims(_take(lazy, dim, range(index % size, index % size + 1)), [dim])


def _split_with_sizes(lazy: LazyTensor, sizes: Sequence[int], dim: int = 0) -> list[LazyTensor]:
    dim = _dim(lazy, dim)
    if sum(sizes) != lazy.shape[dim]:
        raise RuntimeError(f"split_with_sizes expects sizes that sum to {lazy.shape[dim]} at dim {dim}, got {sizes}")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_take(lazy, dim, range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


def _split(lazy: LazyTensor, size: int, dim: int = 0) -> list[LazyTensor]:
    dim = _dim(lazy, dim)
    length = lazy.shape[dim]
    if size <= 0:
        raise NotARelayoutError
    sizes = [min(size, length - start) for start in range(0, max(length, 1), size)]
    return _split_with_sizes(lazy, sizes, dim)


def _unbind(lazy: LazyTensor, dim: int = 0) -> list[LazyTensor]:
    return [_select(lazy, dim, i) for i in range(lazy.shape[dim])]


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> LazyTensor:
    # torch ignores legacy empty vectors.
    parts = [t for t in tensors if tuple(t.shape) != (0,)]
    lazies = [t for t in parts if isinstance(t, LazyTensor)]
    if not lazies or len(lazies) != len(parts) or len({(t.dtype, t.device) for t in tensors}) > 1:
        raise NotARelayoutError
    first, dim = lazies[0], _dim(lazies[0], dim)
    rest = {tuple(t.shape[:dim]) + tuple(t.shape[dim + 1 :]) for t in lazies}
    if len(rest) > 1 or any(t.ndim != first.ndim for t in lazies):
        raise RuntimeError(f"sizes of tensors must match except in dimension {dim}: {[tuple(t.shape) for t in lazies]}")
    return _new(first, *mv.concatenate([(t.moves, tuple(t.shape)) for t in lazies], dim))


def _stack(tensors: Sequence[torch.Tensor], dim: int = 0) -> LazyTensor:
    if not all(isinstance(t, LazyTensor) for t in tensors) or len({(t.dtype, t.device) for t in tensors}) > 1:
        raise NotARelayoutError
    shapes = {tuple(t.shape) for t in tensors}
    if len(shapes) > 1:
        raise RuntimeError(f"stack expects each tensor to be equal size, but got {sorted(shapes)}")
    dim = dim % (tensors[0].ndim + 1)
    shape = list(tensors[0].shape)
    raised = (*shape[:dim], 1, *shape[dim:])
    first: Any = tensors[0]
    return _new(first, *mv.concatenate([(t.moves, raised) for t in tensors if isinstance(t, LazyTensor)], dim))


def _expand(lazy: LazyTensor, size: Sequence[int], **_: Any) -> LazyTensor:
    shape: Shape = (1,) * (len(size) - lazy.ndim) + tuple(lazy.shape)
    wanted = tuple(old if new == -1 else new for old, new in zip(shape, size, strict=True))
    if any(old not in (1, new) for old, new in zip(shape, wanted, strict=True)):
        raise RuntimeError(f"expand: {tuple(lazy.shape)} cannot be expanded to {tuple(size)}")
    return _new(lazy, mv.expand(lazy.moves, shape, wanted), wanted)


def _squeeze_dims(lazy: LazyTensor, dims: Sequence[int]) -> LazyTensor:
    gone = {_dim(lazy, dim) for dim in dims} if lazy.ndim else set()
    return _new(lazy, lazy.moves, [size for k, size in enumerate(lazy.shape) if size != 1 or k not in gone])


def _squeeze(lazy: LazyTensor) -> LazyTensor:
    return _squeeze_dims(lazy, range(lazy.ndim))


def _squeeze_dim(lazy: LazyTensor, dim: int) -> LazyTensor:
    return _squeeze_dims(lazy, [dim])


def _unsqueeze(lazy: LazyTensor, dim: int) -> LazyTensor:
    dim = dim % (lazy.ndim + 1)
    return _new(lazy, lazy.moves, [*lazy.shape[:dim], 1, *lazy.shape[dim:]])


def _index_select(lazy: LazyTensor, dim: int, index: torch.Tensor) -> LazyTensor:
    whole_numbers = index.dtype in (torch.int64, torch.int32) and index.ndim == 1 and not index.is_meta
    if isinstance(index, LazyTensor) or not whole_numbers or index.numel() == 0:
        raise NotARelayoutError
    size = lazy.shape[dim]
    chosen = [int(i) for i in index.tolist()]
    if any(not -size <= i < size for i in chosen):
        raise IndexError(f"index {chosen} is out of bounds for dimension {dim} with size {size}")
    return _cat([_take(lazy, dim, range(i % size, i % size + 1)) for i in chosen], dim)


def _index(lazy: LazyTensor, indices: Sequence[torch.Tensor | None]) -> LazyTensor:
    used = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(used) != 1:
        raise NotARelayoutError
    return _index_select(lazy, *used[0])


def _to_copy(
    lazy: LazyTensor, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **_: Any
) -> LazyTensor:
    dtype = lazy.dtype if dtype is None else dtype
    # A lossy cast is done by the copy into place. A second cast after it would have to round in between.
    if dtype != lazy.dtype and not all(is_lossless(source.dtype, lazy.dtype) for source in lazy.sources):
        raise NotARelayoutError
    return LazyTensor(lazy.moves, lazy.shape, dtype, torch.device(lazy.device if device is None else device))


RELAYOUTS: dict[Any, Callable[..., Any]] = {
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten._reshape_alias.default: _view,
    aten.reshape.default: _view,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _t,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split.Tensor: _split,
    aten.unsafe_split.Tensor: _split,
    aten.split_with_sizes.default: _split_with_sizes,
    aten.unsafe_split_with_sizes.default: _split_with_sizes,
    aten.unbind.int: _unbind,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.expand.default: _expand,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze_dim,
    aten.squeeze.dims: _squeeze_dims,
    aten.unsqueeze.default: _unsqueeze,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten._to_copy.default: _to_copy,
    aten.clone.default: _same,
    aten.contiguous.default: _same,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.lift.default: _same,
    aten.lift_fresh.default: _same,
    aten.lift_fresh_copy.default: _same,
}

# These take shape, dtype and device from a tensor and nothing else, so nothing is read for them.
FACTORIES = frozenset(
    {
        aten.new_empty.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_full.default,
        aten.new_empty_strided.default,
        aten.empty_like.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
    }
)
