"""Stage one of a load: a checkpoint's tensors become lazy tensors under the names of a Transformers model.

Transformers knows how a checkpoint's names lead to a model's, and what is merged on the way. Its rules are run by its
own code, but not once for each name: of blocks that are alike (`blocks.py`) one is run name by name, and of every other
one those of its names that differ in more than numbers. Where these lead to the same places, the other block's tensors
are the same pieces of other sources. Everything else (dtypes, devices, what is missing or unexpected, tied weights)
stays with Transformers, which is given tensors under the model's names.

What is not certain to come out the same is left to Transformers as a whole: a rule that computes values, two tensors
for one place, an operation that fails.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from kernelgraft import compat
from kernelgraft.checkpoint.blocks import Block, Blocks, blocks_of, one_of_each
from kernelgraft.checkpoint.files import Checkpoint, FileTensor
from kernelgraft.checkpoint.renaming import Renaming
from kernelgraft.conversion.lazy import LazyTensor, parameter
from kernelgraft.conversion.moves import Dim, Move
from kernelgraft.tree import tensor_at

logger = logging.getLogger("kernelgraft")

Lazies = Callable[[], Mapping[str, torch.Tensor]]

# Of fewer blocks each is run name by name, which is as quick.
_FEWEST_BLOCKS = 3

# An operation on fewer tensors is run for every block, which is as quick.
_FEWEST_SOURCES = 8

# Of operations that are not Transformers' own nothing is known, and they are run for every block too.
_THEIRS = "transformers.core_model_loading"


class _LeftToTransformersError(Exception):
    """This checkpoint is one that Transformers itself has to convert, and why."""


def load_lazily(
    model: Any,
    checkpoint: Checkpoint,
    load_config: Any,
    expected_keys: Any = None,
    before: Callable[[Lazies], None] = lambda _: None,
) -> Any:
    """Let every parameter of a Transformers model that a checkpoint has stand in it as a lazy tensor.

    Args:
        model: The model, on the meta device.
        checkpoint: The opened checkpoint; nothing is read but the headers, which are.
        load_config: Transformers' `LoadStateDictConfig` of this load.
        expected_keys: As in Transformers' `_load_pretrained_model`.
        before: Called before lazy tensors are in the model, with what gives them, by the model's names; it gives none
            where Transformers will make them.

    Returns:
        What `_load_pretrained_model` returns: its account of the load, and the index of what went to disk.
    """
    load = type(model)._load_pretrained_model
    state = model.state_dict(keep_vars=True)
    expected_keys = list(state) if expected_keys is None else expected_keys
    converted = convert_by_kind(model, checkpoint._tensors, load_config, state)
    if converted is None:
        before(dict)
        return load(model, dict(checkpoint), None, load_config, expected_keys)
    known = {name: converted.tensors[name] for name in state if name in converted.tensors}
    lazies = cache(lambda: _as_loaded(model, known, load_config))
    before(lazies)
    others = {name: lazy for name, lazy in converted.tensors.items() if name not in state}
    # What the model does not have Transformers accounts for, and whatever else it does before and after.
    # Without a device map, of which it would reserve memory: on the CPU these would be, if they were anywhere.
    account, index = load(model, others, None, replace(load_config, weight_mapping=[], device_map=None), expected_keys)
    _put_into(model, lazies(), account)
    model._weight_conversions = converted.rules  # for saving
    return account, index


def _as_loaded(model: Any, tensors: Mapping[str, LazyTensor], load_config: Any) -> dict[str, torch.Tensor]:
    """Tensors as they will be in the model, in the dtype and on the device that Transformers gives them."""
    kept, device_of = compat.loaded_dtypes(load_config), _devices(load_config)
    found = {}
    for name, lazy in tensors.items():
        there = tensor_at(model, name)
        value: torch.Tensor = lazy.to(device=device_of(name), dtype=kept(name) or there.dtype)
        found[name] = parameter(value, value.is_floating_point()) if isinstance(there, nn.Parameter) else value
    return found


def _put_into(model: Any, tensors: Mapping[str, torch.Tensor], account: Any) -> None:
    """Put tensors where the model has these names.

    Given to Transformers' `convert_and_load_state_dict_in_model` each name would cost a rule of its own, with regular
    expressions to compile: for the 399 tensors of an 8B model a third of all that a load costs beside its bytes.
    """
    from transformers.core_model_loading import set_param_for_module

    for name, value in tensors.items():
        set_param_for_module(model, name, value, account, None)


def _devices(load_config: Any) -> Callable[[str], Any]:
    """The device of each parameter, by name."""
    from transformers.integrations.accelerate import get_device

    devices = load_config.device_map or {"": "cpu"}
    if list(devices) == [""]:  # there is no need to compile a pattern for each name
        return lambda _: devices[""]
    return partial(get_device, devices, valid_torch_device=True)


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """What a checkpoint's tensors are for a model.

    Attributes:
        tensors: Lazy tensors by the model's names; those that it does not have, by the names that it would give them.
        rules: The rules of Transformers that were used.
    """

    tensors: dict[str, LazyTensor]
    rules: list[Any]


def convert_by_kind(
    model: Any, tensors: Mapping[str, FileTensor], load_config: Any, state: Mapping[str, torch.Tensor]
) -> ConvertedCheckpoint | None:
    """Convert a checkpoint's tensors to the names and the layout of a Transformers model, one block of a kind for all.

    Args:
        model: The model.
        tensors: The checkpoint's, by name.
        load_config: As in `load_lazily`.
        state: The model's `state_dict(keep_vars=True)`.

    Returns:
        `None` if it is not certain that Transformers would make the same of them.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():  # it shares out parameters, and converts for itself
        return None
    try:
        conversion = _Conversion(model, load_config, blocks_of(tensors), state)
        return ConvertedCheckpoint(conversion.tensors(), conversion.renaming.used())
    except _LeftToTransformersError as reason:
        logger.debug("the checkpoint is converted by Transformers, name by name: %s", reason)
        return None


@dataclass
class _Target:
    """A place in the model, or what would be one, and what goes there.

    Attributes:
        converter: The rule that makes it; `None` if a tensor goes there as it is.
        sources: What the rule calls its sources, and the names of those (in their block), in the rule's order.
    """

    converter: Any
    sources: dict[str | None, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of all its sources."""
        return [name for names in self.sources.values() for name in names]

    @cached_property
    def samples(self) -> list[tuple[str | None, str]]:
        """One each of its sources that differ in numbers alone, with what the rule calls it."""
        return [(pattern, name) for pattern, names in self.sources.items() for name in one_of_each(names)]


@dataclass(slots=True)
class _Recipe:
    """A lazy tensor of sources that are only names (in their block), so that it can be made of any block's tensors."""

    names: list[str]
    dims: list[tuple[Dim, ...]]
    into: list[int]
    of: list[int]
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def from_lazy(cls, lazy: LazyTensor) -> "_Recipe":
        moves: Any = lazy.moves
        names = [move.source.name for move in moves]
        dims, into, of = ([getattr(move, column) for move in moves] for column in ("dims", "into", "of"))
        return cls(names, dims, into, of, lazy.shape, lazy.dtype)

    def made_of(self, block: Block) -> LazyTensor:
        moves = tuple(map(Move, map(block.__getitem__, self.names), self.dims, self.into, self.of))
        return LazyTensor(moves, self.shape, self.dtype, FileTensor.device)


@dataclass(frozen=True, slots=True, eq=False)
class _Named:
    """A source that is only a name."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device = FileTensor.device

    def read(self) -> torch.Tensor:
        raise _LeftToTransformersError(f"a rule computes with values of {self.name}")


class _Conversion:
    """One checkpoint on its way into one model."""

    def __init__(self, model: Any, load_config: Any, blocks: Blocks, state: Mapping[str, torch.Tensor]) -> None:
        self.model = model
        self.state = state
        self.renaming = Renaming(model, list(load_config.weight_mapping or ()), state)
        self.blocks = blocks.blocks
        self.kinds = blocks.kinds
        self.single = blocks.single
        self.made: dict[str, LazyTensor] = {}
        self._kept_dtype = compat.loaded_dtypes(load_config)
        self._device = _devices(load_config)

    def tensors(self) -> dict[str, LazyTensor]:
        left = dict(self.single)
        for kind in self.kinds:
            for head in self._by_kind(kind) if len(kind) >= _FEWEST_BLOCKS else kind:
                left |= {head + rest: tensor for rest, tensor in self.blocks[head].items()}
        for name, target in self._targets("", sorted(left, key=self.renaming.order)).items():
            self._put(name, target, left)
        for name in self.made:
            if not self.renaming.is_settled(name):
                raise _LeftToTransformersError(f"{name} is the name of two places")
        return self.made

    def _targets(self, head: str, rests: Sequence[str]) -> dict[str, _Target]:
        """Where the tensors of a block go, whose names are in Transformers' order."""
        targets: dict[str, _Target] = {}
        for rest in rests:
            name, pattern = self.renaming.target(head + rest)
            converter = None if pattern is None else self.renaming.converters[pattern]
            target = targets.setdefault(name, _Target(converter))
            if name in self.state and target.sources and (converter is None or converter is not target.converter):
                raise _LeftToTransformersError(f"{head + rest} and {target.names[0]} both go to {name}")
            target.sources.setdefault(pattern, []).append(rest)
        return targets

    def _by_kind(self, kind: Sequence[str]) -> list[str]:
        """Convert blocks that are alike as the first one; returns those that must be gone through name by name."""
        first, block = kind[0], self.blocks[kind[0]]
        order = {rest: self.renaming.order(rest) for rest in block}
        rests = sorted(block, key=order.__getitem__)
        # Names that are equal in that order, 'a.1' and 'a.01', stay as the file has them.
        if any(order[a] == order[b] for a, b in pairwise(rests)) or not all(
            self.renaming.is_blind_to_numbers(first + rest) for rest in one_of_each(rests)
        ):
            return list(kind)
        targets = self._targets(first, rests)
        found = {head: self._names_in(head, targets) for head in kind}
        same = {head: names for head, names in found.items() if names is not None}
        if len({name for names in same.values() for name in names.values()}) < len(same) * len(targets):
            return list(kind)  # several blocks go to one place
        for name, target in targets.items():
            recipe = self._recipe(target, [(names[name], self.blocks[head]) for head, names in same.items()])
            for head, names in same.items():
                fits = recipe is not None and self._has_same(name, names[name])
                self._put(names[name], target, self.blocks[head], recipe if fits else None)
        return [head for head in kind if head not in same]

    def _names_in(self, head: str, targets: Mapping[str, _Target]) -> dict[str, str] | None:
        """What the targets of the first block are called in another one; `None` if it has others."""
        names: dict[str, str] = {}
        for name, target in targets.items():
            for pattern, rest in target.samples:
                found, by = self.renaming.target(head + rest)
                if by != pattern or names.setdefault(name, found) != found:
                    return None
            known = name in self.state
            if (names[name] in self.state) != known:
                return None
            if not known and any(head + rest in self.state for rest in target.names):
                return None
        return names

    def _recipe(self, target: _Target, places: Sequence[tuple[str, Block]]) -> _Recipe | None:
        """How many tensors are merged in every block: as in the first and in the last one, if that is the same."""
        if target.converter is None or places[0][0] not in self.state or len(target.names) < _FEWEST_SOURCES:
            return None
        if any(type(each).__module__ != _THEIRS for each in target.converter.operations):
            return None
        first, last = (self._convert(name, target, block) for name, block in (places[0], places[-1]))
        if list(first) != [places[0][0]] or list(first.values()) != list(last.values()):
            return None
        return first[places[0][0]]

    def _convert(self, name: str, target: _Target, block: Block) -> dict[str, _Recipe]:
        """What a converter makes of a block's tensors, by the model's names."""
        converter = copy.deepcopy(target.converter)
        for pattern, rests in target.sources.items():
            for rest in rests:
                source = _Named(rest, block[rest].shape, block[rest].dtype)
                converter.add_tensor(name, rest, pattern, LazyTensor.of(source))
        try:
            made = converter.convert(name, model=self.model, config=self.model.config)
        except _LeftToTransformersError:
            raise
        except Exception as error:  # what an operation may raise is anything; Transformers reports it
            raise _LeftToTransformersError(f"converting to {name} fails: {error}") from error
        results = {each: value[0] if isinstance(value, list) else value for each, value in made.items()}
        self._check_only_laid_out(results, {block[rest].dtype for rest in target.names})
        return {each: _Recipe.from_lazy(lazy) for each, lazy in results.items()}

    def _check_only_laid_out(self, results: Mapping[str, Any], dtypes: set[torch.dtype]) -> None:
        """Transformers casts the sources and moves them to a device, and then lays them out: it must be all one."""
        for name, value in results.items():
            if name not in self.state or not isinstance(value, LazyTensor) or {value.dtype} != dtypes:
                raise _LeftToTransformersError(f"{name} is not only laid out anew")
        places = {(self._kept_dtype(name) or self.state[name].dtype, self._device(name)) for name in results}
        if len(places) > 1:
            raise _LeftToTransformersError(f"{', '.join(results)} have their sources in common, but not their places")

    def _has_same(self, name: str, other: str) -> bool:
        """Whether two parameters of the model are alike, by which operations go."""
        one, two = self.state[name], self.state[other]
        return (one.shape, one.dtype) == (two.shape, two.dtype)

    def _put(self, name: str, target: _Target, block: Block, recipe: _Recipe | None = None) -> None:
        """Put into the result what is made of one block for one place."""
        if name not in self.state:
            self._report(name, target, block)
        elif target.converter is None:
            self._add(name, LazyTensor.of(block[target.names[0]]))
        elif recipe is not None:
            self._add(name, recipe.made_of(block))
        else:
            for each, made in self._convert(name, target, block).items():
                self._add(each, made.made_of(block))

    def _add(self, name: str, lazy: LazyTensor) -> None:
        if name in self.made:
            raise _LeftToTransformersError(f"{name} is made twice")
        self.made[name] = lazy

    def _report(self, name: str, target: _Target, block: Block) -> None:
        """Hand over a tensor that the model does not have, so that Transformers reports it."""
        patterns = [] if target.converter is None else target.converter.target_patterns
        for each in [name.replace(patterns[0], pattern) for pattern in patterns] or [name]:
            if each in self.state:
                raise _LeftToTransformersError(f"{each} is made together with {name}, which the model does not have")
            self.made[each] = LazyTensor.of(block[target.names[0]])
