"""The plain data of a program: strided views of named contiguous tensors, and the pieces that pair them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kernelgraft.conversion.moves import Dim, Move, Shape


@dataclass(frozen=True, slots=True)
class View:
    """A strided view into the contiguous memory of the tensor called `name`."""

    name: str
    shape: Shape
    stride: Shape
    offset: int

    def to_json(self) -> dict[str, Any]:
        """The view as JSON data."""
        return {"name": self.name, "shape": list(self.shape), "stride": list(self.stride), "offset": self.offset}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "View":
        """The view that `to_json` wrote."""
        return cls(data["name"], tuple(data["shape"]), tuple(data["stride"]), data["offset"])


@dataclass(frozen=True, slots=True)
class Piece:
    """One strided copy: `source` goes to `target`; both have one shape."""

    target: View
    source: View

    @classmethod
    def of(cls, target: str, move: Move) -> "Piece":
        """The piece that says what a move into the tensor `target` does."""
        shape = tuple(dim.size for dim in move.dims)
        into = View(target, shape, tuple(dim.into for dim in move.dims), move.into)
        return cls(into, View(str(move.source), shape, tuple(dim.of for dim in move.dims), move.of))

    @property
    def move(self) -> Move:
        """The piece as a move into the memory of its target."""
        dims = map(Dim, self.target.shape, self.target.stride, self.source.stride)
        return Move(self.source.name, tuple(dims), self.target.offset, self.source.offset)

    def swapped(self) -> "Piece":
        """The way back."""
        return Piece(self.source, self.target)

    def to_json(self) -> dict[str, Any]:
        """The piece as JSON data."""
        return {"target": self.target.to_json(), "source": self.source.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Piece":
        """The piece that `to_json` wrote."""
        return cls(View.from_json(data["target"]), View.from_json(data["source"]))
