"""`Program`: the outcome of conversion rules as plain data, and what can be done with it.

A program says which strided piece of which source goes to which strided piece of which target. It knows names, shapes
and dtypes of one kind of site, holds no tensor, and serves every layer; its inverse is the same pieces swapped.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from kernelgraft.conversion.coverage import covered_once, elements, written
from kernelgraft.conversion.lazy import LazyTensor, copy_move, follow, is_lossless
from kernelgraft.conversion.moves import Dim, Move, Shape, normal
from kernelgraft.conversion.part import Part, part_of
from kernelgraft.conversion.views import Piece, View
from kernelgraft.errors import ConversionError

__all__ = ["Part", "Piece", "Program", "View"]


@dataclass(frozen=True)
class Program:
    """Targets as re-layouts of sources.

    Attributes:
        targets: Shapes of what is made.
        sources: Shapes of what it is made of.
        pieces: The copies, in normal form, those of one target together.
        computed: Targets whose value is computed and not only moved, with the sources that it comes from. They have no
            pieces and no inverse, and the caller makes them by running the rules.
        casts: The dtype of each target that differs from that of one of its sources.
        lossy: Sources that a cast narrows on the way, so that their bits cannot be had back.
    """

    targets: dict[str, Shape]
    sources: dict[str, Shape]
    pieces: tuple[Piece, ...]
    computed: dict[str, tuple[str, ...]]
    casts: dict[str, str]
    lossy: tuple[str, ...] = ()

    @classmethod
    def trace(
        cls,
        outputs: Mapping[str, torch.Tensor],
        sources: Mapping[str, torch.Tensor],
        origins: Mapping[str, tuple[str, ...]] | None = None,
    ) -> "Program":
        """Reads a program off the results of conversion rules.

        Args:
            outputs: Target name to result: a `LazyTensor`, or a plain tensor if it was computed.
            sources: Source name to tensor; the lazy leaves of `outputs` carry these names.
            origins: The sources of each output, asked for computed ones. Without it all sources that no other output
                uses are taken for them.

        Raises:
            ConversionError: If an output reads a source that is not listed.
        """
        pieces: dict[str, list[Piece]] = {
            name: [Piece.of(name, move) for move in _named_moves(name, output, sources)]
            for name, output in outputs.items()
            if isinstance(output, LazyTensor)
        }
        used = {piece.source.name for group in pieces.values() for piece in group}
        unused = tuple(name for name in sources if name not in used)
        computed = {name: (origins or {}).get(name, unused) for name in outputs if name not in pieces}
        lazies = {name: output for name, output in outputs.items() if isinstance(output, LazyTensor)}
        return cls(
            targets={name: tuple(output.shape) for name, output in outputs.items()},
            sources={name: tuple(source.shape) for name, source in sources.items()},
            pieces=tuple(piece for group in pieces.values() for piece in group),
            computed=computed,
            casts={
                name: str(lazy.dtype).removeprefix("torch.")
                for name, lazy in lazies.items()
                if any(source.dtype != lazy.dtype for source in lazy.sources)
            },
            lossy=tuple(
                dict.fromkeys(
                    str(source.name)
                    for lazy in lazies.values()
                    for source in lazy.sources
                    if not is_lossless(source.dtype, lazy.dtype)
                )
            ),
        )

    @cached_property
    def moves(self) -> dict[str, tuple[Move, ...]]:
        """The pieces of each target as moves."""
        moves: dict[str, list[Move]] = {name: [] for name in self.targets}
        for piece in self.pieces:
            moves[piece.target.name].append(piece.move)
        return {name: tuple(group) for name, group in moves.items()}

    @cached_property
    def feeds(self) -> dict[str, tuple[str, ...]]:
        """The sources that are moved into each target, each once."""
        return {name: tuple(dict.fromkeys(str(move.source) for move in group)) for name, group in self.moves.items()}

    @cached_property
    def whole(self) -> dict[str, str]:
        """The targets that hold one source as it stands, and that source."""
        return {self.part(name).packed[0]: name for name in self.sources if self.part(name).kind == "whole"}

    @cached_property
    def moved(self) -> tuple[str, ...]:
        """The sources that no target holds as they stand."""
        return tuple(name for name in self.sources if self.part(name).kind != "whole")

    @cached_property
    def _lost(self) -> dict[str, str]:
        """Sources that cannot be had back, with the reason."""
        swapped: dict[str, list[Move]] = {name: [] for name in self.sources}
        for piece in self.pieces:
            swapped[piece.source.name].append(piece.swapped().move)
        fed = defaultdict(list)
        for target, names in self.computed.items():
            for name in names:
                fed[name].append(target)
        reasons = {name: self._why_lost(name, swapped[name], fed.get(name, [])) for name in self.sources}
        return {name: reason for name, reason in reasons.items() if reason}

    def _why_lost(self, name: str, moves: list[Move], fed: list[str]) -> str:
        numel, regions = math.prod(self.sources[name]), written(moves)
        covered = elements(regions)
        if name in self.lossy:
            return "a cast on the way narrows its values"
        if covered == 0 and fed:
            return f"it is only used to compute {', '.join(fed)}"
        if covered < numel:
            return f"{numel - covered} of its {numel} elements are in no packed parameter"
        if covered > numel:
            return f"its {numel} elements are used {covered} times, so one value could be changed without the other"
        once = covered_once(regions, numel)
        if once is None:
            return "it is too finely divided to prove that each element is used once"
        return "" if once else "some of its elements are used twice and others not at all"

    @property
    def irreversible(self) -> tuple[str, ...]:
        """Sources that the targets do not determine, or that they hold more than once."""
        return tuple(self._lost)

    def why(self, name: str) -> str:
        """The reason for which a source is irreversible, "" if it is not."""
        self._known(name, self.sources, "source")
        return self._lost.get(name, "")

    def inverse(self) -> "Program":
        """The program that makes the sources of the targets; irreversible sources are not among its targets."""
        kept = {name: shape for name, shape in self.sources.items() if name not in self._lost}
        swapped: dict[str, list[Move]] = {name: [] for name in kept}
        for piece in self.pieces:
            if piece.source.name in kept:
                swapped[piece.source.name].append(piece.swapped().move)
        pieces = tuple(Piece.of(name, move) for name, moves in swapped.items() for move in normal(moves))
        targets = {name: shape for name, shape in self.targets.items() if name not in self.computed}
        return Program(targets=kept, sources=targets, pieces=pieces, computed={}, casts={})

    def check_filled(self) -> None:
        """Proves that each element of each target is written exactly once.

        Raises:
            ConversionError: If one is not, or if that cannot be settled, naming the target.
        """
        for name, shape in self.targets.items():
            if name in self.computed:
                continue
            regions, numel = written(self.moves[name]), math.prod(shape)
            once = covered_once(regions, numel)
            if not once:
                found = "the pieces are too fine to tell" if once is None else f"{elements(regions)} are written"
                raise ConversionError(
                    f"each of the {numel} elements of {name} {list(shape)} must be written exactly once, "
                    f"but {found}; correct the rule that makes it: {self.describe(name)}."
                )

    def fill(self, target_name: str, out: torch.Tensor, read: Callable[[str], torch.Tensor]) -> None:
        """Copies every piece of one target from its source straight into place.

        Args:
            target_name: The target.
            out: A tensor of its shape, of any strides, dtype and device; written under `no_grad`.
            read: Gives a source by its name, of any strides. It is called once for each source of the target.

        Raises:
            ConversionError: If the target is unknown or computed, or a shape is not the one in the program.
        """
        self._known(target_name, self.targets, "target")
        if target_name in self.computed:
            raise ConversionError(
                f"{target_name} is computed from {', '.join(self.computed[target_name])} and not only moved; "
                "run its rule on the tensors instead of filling it."
            )
        self._fits(target_name, out, self.targets)
        rounded = self._rounding(target_name, out.dtype)
        by_source: dict[str, list[Move]] = defaultdict(list)
        for move in self.moves[target_name]:
            by_source[str(move.source)].append(move)
        with torch.no_grad():
            for name, moves in by_source.items():
                source = read(name)
                self._fits(name, source, self.sources)
                narrowed = rounded if rounded and not is_lossless(source.dtype, rounded) else None
                for move in moves:
                    copy_move(move, out, source, narrowed)

    def lazy(self, target_name: str, sources: Mapping[str, torch.Tensor]) -> LazyTensor | None:
        """One target as a lazy tensor, of the dtype and on the device that its sources have.

        Args:
            target_name: The target.
            sources: Source name to tensor.

        Returns:
            None if a source is not lazy, the target is computed, or values are rounded twice on the way.
        """
        self._known(target_name, self.targets, "target")
        used = {name: sources[name] for name in self.feeds[target_name]}
        lazies = {name: tensor for name, tensor in used.items() if isinstance(tensor, LazyTensor)}
        if target_name in self.computed or not used or len(lazies) < len(used):
            return None
        for name, lazy in lazies.items():
            self._fits(name, lazy, self.sources)
        first = next(iter(lazies.values()))
        dtype = getattr(torch, self.casts[target_name]) if target_name in self.casts else first.dtype
        cast = [lazy for lazy in lazies.values() if lazy.dtype != dtype]
        if any(lazy.rounding(source.dtype, dtype) for lazy in cast for source in lazy.sources):
            return None
        return LazyTensor(self._followed(target_name, lazies), self.targets[target_name], dtype, first.device)

    def _followed(self, target_name: str, lazies: Mapping[str, LazyTensor]) -> tuple[Move, ...]:
        """A target's moves out of what its sources are made of: worked out once for all that are laid out alike."""
        numbers: dict[int, int] = {}
        origins: list[object] = []
        layout: list[object] = []
        for lazy in lazies.values():
            layout.append(tuple(lazy.shape))
            for move in lazy.moves:
                number = numbers.setdefault(id(move.source), len(numbers))
                if number == len(origins):
                    origins.append(move.source)
                layout.append((number, move.dims, move.into, move.of))
        key = (target_name, tuple(layout))
        if key not in self._layouts:
            moves = normal(p for move in self.moves[target_name] for p in follow(move, lazies[str(move.source)]))
            if any(id(move.source) not in numbers for move in moves):
                return moves  # something was read on the way
            self._layouts[key] = [(numbers[id(move.source)], move.dims, move.into, move.of) for move in moves]
        return tuple(Move(origins[number], dims, into, of) for number, dims, into, of in self._layouts[key])

    @cached_property
    def _layouts(self) -> dict[object, list[tuple[int, tuple[Dim, ...], int, int]]]:
        """What `_followed` has worked out so far."""
        return {}

    def part(self, source_name: str) -> Part:
        """How a source reads from the targets, and is written into them."""
        self._known(source_name, self.sources, "source")
        if source_name not in self._parts:
            if source_name in self._lost:
                part = Part(source_name, self.sources[source_name], "lost", why=self._lost[source_name])
            else:
                part = self._inverse.assembly(source_name)
            self._parts[source_name] = part
        return self._parts[source_name]

    @cached_property
    def _parts(self) -> dict[str, Part]:
        """The parts that were asked for so far: every site of a kind asks for the same."""
        return {}

    @cached_property
    def _inverse(self) -> "Program":
        return self.inverse()

    def assembly(self, target_name: str) -> Part:
        """How a target reads from the sources: `part` in the other direction."""
        self._known(target_name, self.targets, "target")
        shape = self.targets[target_name]
        if target_name in self.computed:
            why = f"it is computed from {', '.join(self.computed[target_name])}"
            return Part(target_name, shape, "lost", why=why)
        return part_of(target_name, shape, self.moves[target_name], self.sources)

    def describe(self, target: str) -> str:
        """Short text for a plan page, such as `cat(mlp.gate_proj.weight, mlp.up_proj.weight, dim=0)`."""
        if target in self.computed:
            return f"computed from {', '.join(self.computed[target])}"
        text = self.assembly(target).describe()
        return f"{text}.to({self.casts[target]})" if target in self.casts else text

    def to_json(self) -> dict[str, Any]:
        """The program as JSON data."""
        return {
            "targets": {name: list(shape) for name, shape in self.targets.items()},
            "sources": {name: list(shape) for name, shape in self.sources.items()},
            "pieces": [piece.to_json() for piece in self.pieces],
            "computed": {name: list(sources) for name, sources in self.computed.items()},
            "casts": dict(self.casts),
            "lossy": list(self.lossy),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Program":
        """The program that `to_json` wrote."""
        return cls(
            targets={name: tuple(shape) for name, shape in data["targets"].items()},
            sources={name: tuple(shape) for name, shape in data["sources"].items()},
            pieces=tuple(map(Piece.from_json, data["pieces"])),
            computed={name: tuple(sources) for name, sources in data["computed"].items()},
            casts=dict(data["casts"]),
            lossy=tuple(data.get("lossy", ())),
        )

    def _rounding(self, target: str, dtype: torch.dtype) -> torch.dtype | None:
        """The dtype that values take before they take that of the tensor which is filled."""
        cast = self.casts.get(target)
        wanted = getattr(torch, cast) if cast else None
        return wanted if wanted != dtype else None

    def _fits(self, name: str, tensor: torch.Tensor, shapes: Mapping[str, Shape]) -> None:
        if tuple(tensor.shape) != shapes[name]:
            raise ConversionError(
                f"{name} has shape {shapes[name]} in this conversion, and a tensor of shape {tuple(tensor.shape)} was "
                "given; give one of that shape, or trace the conversion again for this model."
            )

    def _known(self, name: str, names: Mapping[str, Shape], what: str) -> None:
        if name not in names:
            raise ConversionError(f"{name!r} is no {what} of this conversion; it has {', '.join(names) or 'none'}.")


def _named_moves(target: str, lazy: LazyTensor, sources: Mapping[str, torch.Tensor]) -> tuple[Move, ...]:
    """The moves of a lazy tensor with names for sources."""
    unknown = [str(source.name) for source in lazy.sources if source.name not in sources]
    if unknown:
        raise ConversionError(
            f"{target} reads {', '.join(unknown)}, which the conversion was not given; it has {', '.join(sources)}."
        )
    return normal(Move(getattr(m.source, "name", None), m.dims, m.into, m.of) for m in lazy.moves)
