"""`LazyTensor`: a tensor on which conversion operations run unmodified while nothing is read.

It records re-layouts, the operations that only move bytes, as moves (`moves.py`). Anything else reads its arguments and
goes on eagerly with plain tensors; `eager_steps` counts that. Memory is always reported as contiguous: a transposed
lazy tensor is what `transpose().contiguous()` would be.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from kernelgraft.conversion.moves import Dim, Move, TooManyPiecesError, contiguous_strides, normal, place, whole
from kernelgraft.conversion.part import apply, chain
from kernelgraft.conversion.views import Piece, View
from kernelgraft.errors import ConversionError


class Source(Protocol):
    """Where bytes come from: a tensor of a checkpoint file, or a live one. Two objects are two sources."""

    @property
    def name(self) -> Hashable:
        """What the tensor is called; a program needs text."""

    @property
    def shape(self) -> torch.Size:
        """The shape of what `read` returns."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what `read` returns."""

    @property
    def device(self) -> torch.device:
        """The device of what `read` returns."""

    def read(self) -> torch.Tensor:
        """The tensor, without a copy if there is a way; it is never written."""


@dataclass(frozen=True, eq=False)
class TensorSource:
    """A tensor in memory as a source."""

    name: Hashable
    tensor: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """The tensor's shape."""
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's dtype."""
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        """The tensor's device."""
        return self.tensor.device

    def read(self) -> torch.Tensor:
        """The tensor itself, outside autograd."""
        return self.tensor.detach()


@dataclass
class EagerSteps:
    """What could not be recorded: how often each operation went on eagerly, and the sources that were read for it."""

    operations: Counter[str] = field(default_factory=Counter)
    sources: set[Hashable] = field(default_factory=set)

    @property
    def total(self) -> int:
        """All eager steps."""
        return self.operations.total()


_counting: ContextVar[tuple[EagerSteps, ...]] = ContextVar("_counting", default=())


@contextmanager
def eager_steps() -> Iterator[EagerSteps]:
    """Counts the eager steps of this thread (or task) inside the block; blocks may be nested."""
    steps = EagerSteps()
    token = _counting.set((*_counting.get(), steps))
    try:
        yield steps
    finally:
        _counting.reset(token)


# Making one may make another, of which it is a part.
_resolving = RLock()

Self = TypeVar("Self", bound="LazyTensor")


class LazyTensor(torch.Tensor):
    """A tensor that is not read yet: strided pieces of sources, and the dtype and device it will have."""

    _moves: tuple[Move, ...]
    _resolved: torch.Tensor | None = None

    # Operations are seen once, in `__torch_dispatch__`. The default would also turn plain results into this class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[Self],
        moves: tuple[Move, ...],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        requires_grad: bool = False,
    ) -> Self:
        """A lazy tensor of the given moves, which must cover its memory exactly once."""
        lazy = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=device, requires_grad=requires_grad
        )
        lazy._moves = moves
        return lazy

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    @classmethod
    def of(cls, source: Source) -> "LazyTensor":
        """The whole of one source."""
        return LazyTensor(whole(source, source.shape.numel()), source.shape, source.dtype, source.device)

    @property
    def moves(self) -> tuple[Move, ...]:
        """The moves in normal form; the `source` of each is a `Source`."""
        return self._moves

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources that are read, in the order of their first use, each once."""
        return tuple({id(move.source): cast(Source, move.source) for move in self._moves}.values())

    def pieces(self) -> list[tuple[View, View]]:
        """(view of this tensor's contiguous memory, view of a source's) pairs of one shape, in normal form.

        Sources that have one name are taken for one; the lazy tensor's own memory is called "".
        """
        named = normal(Move(_text(cast(Source, m.source).name), m.dims, m.into, m.of) for m in self._moves)
        pieces = [Piece.of("", move) for move in named]
        return [(piece.target, piece.source) for piece in pieces]

    def materialize(
        self, out: torch.Tensor | None = None, dtype: torch.dtype | None = None, *, copy: bool = False
    ) -> torch.Tensor:
        """Reads the sources.

        Args:
            out: A tensor of this shape, of any strides, dtype and device, into which every piece is copied.
            dtype: The dtype of the result if there is no `out`; by default this tensor's own.
            copy: Whether the result must have memory of its own.

        Returns:
            `out`; or a new contiguous tensor; or, for a contiguous run of one source in its own dtype and on its own
            device, a view of what the source returned: read it, do not write it.
        """
        with torch.no_grad():
            if out is not None:
                self._pull(out)
                return out
            dtype = self.dtype if dtype is None else dtype
            view = None if copy or dtype != self.dtype else self.view_of_source()
            if view is not None:
                return view
            result = torch.empty(self.shape, dtype=dtype, device=self.device)
            self._pull(result)
            return result

    def view_of_source(self) -> torch.Tensor | None:
        """This tensor as a view of what its source returns, if it is a contiguous run of one as it stands."""
        if len(self._moves) != 1 or not _is_run(self._moves[0]):
            return None
        move = self._moves[0]
        source = cast(Source, move.source)
        if (source.dtype, source.device) != (self.dtype, self.device):
            return None
        if hasattr(source, "run"):  # a file's, which gives each run a storage of its own
            return cast(torch.Tensor, source.run(move.of, self.shape))
        tensor = source.read()
        if isinstance(tensor, LazyTensor):
            run = tensor.view(-1).narrow(0, move.of, move.numel).view(self.shape)
            return cast(LazyTensor, run).materialize()
        if move.of == 0 and tensor.shape == self.shape:
            return tensor if tensor.is_contiguous() else None
        if not tensor.is_contiguous():
            return None
        return tensor.as_strided(self.shape, contiguous_strides(self.shape), tensor.storage_offset() + move.of)

    def _pull(self, out: torch.Tensor) -> None:
        """Each piece goes straight to its place in `out`; one source is open at a time."""
        if out.shape != self.shape:
            raise ConversionError(
                f"a lazy tensor of shape {tuple(self.shape)} was to be read into a tensor of shape {tuple(out.shape)}; "
                "give one of the same shape."
            )
        for source in self.sources:
            tensor = source.read()
            rounded = self.rounding(source.dtype, out.dtype)
            for move in self._moves:
                if move.source is source:
                    copy_move(move, out, tensor, rounded)

    def rounding(self, old: torch.dtype, new: torch.dtype) -> torch.dtype | None:
        """The dtype that values of a source go through on their way into a tensor of another one, if there is any."""
        return self.dtype if new != self.dtype and not is_lossless(old, self.dtype) else None

    def resolved(self) -> torch.Tensor:
        """The tensor that takes this one's place in a module, made once: see `resolve`."""
        with _resolving:
            return self.resolve(self.materialize()) if self._resolved is None else self._resolved

    def resolve(self, value: torch.Tensor) -> torch.Tensor:
        """Let `value`, what was read, take this one's place: as a `Parameter` if this is one.

        It carries over `requires_grad` and the attributes that were set on this tensor.
        """
        with _resolving:
            if self._resolved is None:
                if isinstance(self, torch.nn.Parameter):
                    value = torch.nn.Parameter(value, requires_grad=self.requires_grad)
                    kept = ("_moves", "_resolved", "_is_param")
                    value.__dict__.update({k: v for k, v in self.__dict__.items() if k not in kept})
                self._resolved = value
            return self._resolved

    @property
    def is_resolved(self) -> bool:
        """Whether there is a tensor that takes this one's place already."""
        return self._resolved is not None

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        names = [str(source.name) for source in self.sources]
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return f"LazyTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, of=[{shown}])"

    def __copy__(self) -> "LazyTensor":
        lazy = LazyTensor(self._moves, self.shape, self.dtype, self.device, self.requires_grad)
        lazy.__dict__.update(self.__dict__)
        lazy._resolved = None
        return lazy

    def __deepcopy__(self, memo: dict[int, Any]) -> "LazyTensor":
        # Nothing to copy: the moves are immutable and sources are only read.
        lazy = memo[id(self)] = self.__copy__()
        return lazy

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ConversionError(f"{self!r} was to be pickled and is not read yet; pickle .materialize() instead.")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Records a re-layout, or reads the arguments and goes on eagerly."""
        from kernelgraft.conversion.relayout import (
            FACTORIES,
            RELAYOUTS,
            NotARelayoutError,
        )  # it makes lazy tensors, so it imports this

        kwargs = dict(kwargs or {})
        if func is torch.ops.aten.copy_.default and not isinstance(args[0], LazyTensor):
            return _copy_into(args[0], args[1])
        relayout = RELAYOUTS.get(func)
        if relayout is not None:
            try:
                return relayout(*args, **kwargs)
            except (NotARelayoutError, TooManyPiecesError):
                pass
        if func in FACTORIES:
            return func(_like(args[0]), *args[1:], **kwargs)
        # In inference mode composite operations arrive whole.
        if relayout is None and func._can_decompose():
            result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return _eagerly(func, args, kwargs)


def is_lossless(old: torch.dtype, new: torch.dtype) -> bool:
    """Whether every value of the dtype `old` is a value of `new`."""
    if old == new or old == torch.bool:
        return True
    try:
        return _holds_all(old, new)
    except (TypeError, RuntimeError, NotImplementedError):  # a dtype of raw bits, about which torch says nothing
        return False


def _holds_all(old: torch.dtype, new: torch.dtype) -> bool:
    if old.is_floating_point and new.is_floating_point:
        a, b = torch.finfo(old), torch.finfo(new)
        # Subnormals end at tiny * eps.
        return b.eps <= a.eps and b.max >= a.max and b.tiny * b.eps <= a.tiny * a.eps
    if not (old.is_floating_point or old.is_complex or new.is_complex):
        if new == torch.bool:
            return False
        if new.is_floating_point:
            return max(torch.iinfo(old).max, -torch.iinfo(old).min) <= 1 / torch.finfo(new).eps
        return torch.iinfo(new).min <= torch.iinfo(old).min and torch.iinfo(old).max <= torch.iinfo(new).max
    return False


def _text(name: Hashable) -> str:
    return name if isinstance(name, str) else repr(name)


def parameter(value: torch.Tensor, requires_grad: bool) -> nn.Parameter:
    """`nn.Parameter(value, requires_grad)`, of a lazy tensor that nobody else has: it becomes the parameter itself."""
    if not isinstance(value, LazyTensor):
        return nn.Parameter(value, requires_grad)
    # What torch does with a subclass, but for a detach, which would be recorded.
    value._is_param = True
    return value.requires_grad_(requires_grad)  # type: ignore[return-value]


def _is_run(move: Move) -> bool:
    """Whether a move that covers its target reads one gapless run of its source."""
    return move.dims == () or (len(move.dims) == 1 and move.dims[0].of == 1)


def _copy_into(out: torch.Tensor, lazy: LazyTensor) -> torch.Tensor:
    wanted = lazy if lazy.shape == out.shape else cast(LazyTensor, lazy.expand(out.shape))
    wanted.materialize(out=out)
    return out


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """A plain tensor of the same shape, dtype and device that takes no memory to speak of."""
    return torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def _eagerly(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Runs an operation on read tensors, and counts it."""
    _refuse_writes(func, args, kwargs)
    given = [x for x in tree_leaves((tuple(args), dict(kwargs))) if isinstance(x, LazyTensor)]
    for steps in _counting.get():
        steps.operations[str(func)] += 1
        steps.sources.update(source.name for lazy in given for source in lazy.sources)
    args, kwargs = tree_map(lambda x: x.materialize() if isinstance(x, LazyTensor) else x, (tuple(args), dict(kwargs)))
    return func(*args, **kwargs)


def _refuse_writes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """A write into a lazy tensor, or one that depends on its strides, would be lost or wrong in silence."""
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
    for argument in func._schema.arguments:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        lazies = [x for x in tree_leaves(given.get(argument.name)) if isinstance(x, LazyTensor)] if writes else []
        if lazies:
            raise ConversionError(
                f"{func} was asked to write into {lazies[0]!r}, which is not read yet and may be a view of "
                "a checkpoint file; write the operation without in-place steps, or call .materialize(copy=True) first."
            )
    if func is torch.ops.aten.as_strided.default:
        raise ConversionError(
            f"as_strided was asked of {args[0]!r}, which has no strides of its own yet; "
            "write narrow, select, transpose or reshape instead."
        )


def copy_move(move: Move, out: torch.Tensor, source: torch.Tensor, rounded: torch.dtype | None = None) -> None:
    """Copies what a move says from `source` into `out`, tensors of any strides, without a temporary.

    Args:
        move: The move, in the contiguous memory of both.
        out: The tensor to write, of any dtype and device.
        source: The tensor to read.
        rounded: A dtype to go through, if the value was narrowed before it took the dtype of `out`.
    """
    for part in fitted(move, out):
        for back in fitted(part.swapped(None), source):
            value = _strided(source, [(dim.size, dim.into) for dim in back.dims], back.into)
            # A lazy source is read by this copy, straight into place.
            value = value if rounded is None else value.to(rounded)
            _strided(out, [(dim.size, dim.of) for dim in back.dims], back.of).copy_(value)


def follow(move: Move, lazy: LazyTensor) -> list[Move]:
    """A move out of a lazy tensor's memory as moves out of its sources' memory."""
    if len(lazy.moves) == 1 and _is_run(lazy.moves[0]):
        run = lazy.moves[0]
        return [move._replace(source=run.source, of=move.of + run.of)]
    piece = _strided_lazy(lazy, [(dim.size, dim.of) for dim in move.dims], move.of)
    if not isinstance(piece, LazyTensor):
        piece = LazyTensor.of(TensorSource("piece", piece.contiguous()))
    strides = [dim.into for dim in move.dims]
    return [
        settled._replace(into=settled.into + move.into)
        for part in piece.moves
        for settled in (placed.settled(strides) for placed in place(part, tuple(piece.shape)))
    ]


def fitted(move: Move, tensor: torch.Tensor) -> list[Move]:
    """A move with what they write in the tensor's real strides instead of contiguous ones."""
    if tensor.is_contiguous():
        return [move]
    return [placed.settled(tensor.stride()) for placed in place(move, tensor.shape)]


def _strided(tensor: torch.Tensor, dims: list[tuple[int, int]], offset: int) -> torch.Tensor:
    if isinstance(tensor, LazyTensor):
        return _strided_lazy(tensor, dims, offset)
    sizes, strides = [size for size, _ in dims], [stride for _, stride in dims]
    return tensor.as_strided(sizes, strides, tensor.storage_offset() + offset)


def _strided_lazy(lazy: LazyTensor, dims: list[tuple[int, int]], offset: int) -> torch.Tensor:
    """A strided piece of a lazy tensor's memory: lazy too, if it can be said in ordinary steps."""
    move = Move(None, tuple(Dim(size, stride, 0) for size, stride in dims), offset, 0)
    steps = chain(move, tuple(lazy.shape))
    if any(step[0] == "as_strided" for step in steps):
        return _strided(lazy.materialize(), dims, offset)
    return apply(steps, lazy)
