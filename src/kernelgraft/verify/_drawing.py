"""Inputs of a whole model: given by the user, or drawn for one that says what it takes, as Transformers models do."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from kernelgraft.errors import VerificationError
from kernelgraft.signature import ALIASES
from kernelgraft.soundness._inputs import _device, _floating_dtype
from kernelgraft.soundness._inputs import _inputs as made_up
from kernelgraft.soundness._sites import mapped, tensors
from kernelgraft.verify._values import Rebuilder, copied

BASE = (2, 24)
"""Batch and tokens of drawn inputs."""


@dataclass(frozen=True)
class ModelInputs:
    """Arguments of one forward of a model."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def on(self, model: nn.Module) -> "ModelInputs":
        """On the device of a model, floating tensors in its dtype."""
        device, dtype = _device(model), _floating_dtype(model)

        def placed(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        return ModelInputs(mapped(self.args, placed), mapped(self.kwargs, placed))

    def having(self, **kwargs: Any) -> "ModelInputs":
        """With more keywords."""
        return replace(self, kwargs={**self.kwargs, **kwargs})

    def run(self, model: nn.Module) -> Any:
        """One forward."""
        return model(*self.args, **self.kwargs)

    def without_cache(self, model: nn.Module) -> "ModelInputs":
        """Without a cache of keys and values, which each layer would hand on to the next one."""
        return self.having(use_cache=False) if takes(model, "use_cache") and "use_cache" not in self.kwargs else self


def given(inputs: Any) -> ModelInputs:
    """What a user gave: keywords in a mapping, a tuple of arguments, or one argument."""
    if isinstance(inputs, Mapping):
        return ModelInputs((), dict(inputs))
    return ModelInputs(tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,))


def takes(model: nn.Module, name: str) -> bool:
    """Whether a model's forward names a parameter so."""
    return name in inspect.signature(model.forward).parameters


class Drawing:
    """Draws inputs for one model, the same for the same seed."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model = model
        self.generator = torch.Generator().manual_seed(seed)

    def inputs(self, batch: int = BASE[0], length: int = BASE[1], model: nn.Module | None = None) -> ModelInputs | None:
        """Inputs of a batch, or `None` for a model that does not say what it takes."""
        model = self.model if model is None else model
        found = made_up(model, torch.device("cpu"))
        if found is None:
            return None
        length = min(length, self.longest)
        drawn = {name: self._drawn(model, like, batch, length) for name, like in found.items()}
        return ModelInputs((), drawn).on(self.model)

    def _drawn(self, model: nn.Module, like: torch.Tensor, batch: int, length: int) -> torch.Tensor:
        if like.is_floating_point():
            return torch.randn(batch, *like.shape[1:], generator=self.generator)
        choices = _tokens(model)
        return choices[torch.randint(len(choices), (batch, length), generator=self.generator)]

    @property
    def longest(self) -> int:
        """The most tokens that the model has positions for. More of them would end a process on a GPU, not a call."""
        config = _text_config(self.model)
        names = ("max_position_embeddings", "max_target_positions", "n_positions")
        known = [value for name in names if isinstance(value := getattr(config, name, None), int) and value > 2]
        return min(known) - 2 if known else 2**20  # some models count positions from 2

    @property
    def draws_tokens(self) -> bool:
        """Whether the model takes tokens of any number."""
        return "input_ids" in (made_up(self.model, torch.device("meta")) or {})

    def odd(self) -> Iterator[tuple[str, Callable[[], ModelInputs | None] | None]]:
        """Inputs of odd shapes, of padded batches, and of positions that differ; `None` for what is too long."""
        if not self.draws_tokens:
            yield "a batch of one", lambda: self.inputs(1)
            return
        for name, (batch, length) in {
            "one token": (1, 1),
            "one token in a batch": (3, 1),
            "37 tokens": (1, 37),
            "a batch of 131 tokens": (2, 131),
        }.items():
            if length > self.longest:
                yield name, None
                continue
            yield name, lambda batch=batch, length=length: self.inputs(batch, length)  # type: ignore[misc]
        if takes(self.model, "attention_mask"):
            yield "a batch padded on the right", lambda: self._padded(right=True)
            yield "a batch padded on the left", lambda: self._padded(right=False)
        if takes(self.model, "position_ids"):
            yield "positions that differ in a batch", self._moved

    def _padded(self, *, right: bool, lengths: tuple[int, ...] = (19, 11, 2)) -> ModelInputs | None:
        inputs = self.inputs(len(lengths), max(lengths))
        if inputs is None:
            return None
        places = torch.arange(max(lengths))
        rows = [places < length if right else places >= max(lengths) - length for length in lengths]
        return inputs.having(attention_mask=torch.stack(rows).long()).on(self.model)

    def _moved(self) -> ModelInputs | None:
        """Positions with gaps that differ: where only distances count, as in rotary embeddings, a start does not."""
        inputs = self.inputs(2, 13)
        if inputs is None:
            return None
        steps = torch.randint(1, max(min(4, self.longest // 13), 2), (13,), generator=self.generator)
        inputs = inputs.having(position_ids=torch.stack([torch.arange(13), steps.cumsum(0) - 1]))
        if takes(self.model, "attention_mask"):
            # Without a mask Transformers reads a gap as the start of another sequence.
            inputs = inputs.having(attention_mask=torch.ones(2, 13, dtype=torch.int64))
        return inputs.on(self.model)

    def after_a_cache(self) -> Iterator[tuple[str, ModelInputs, ModelInputs]]:
        """Of a language model: what a case is called, a prompt, and what comes after it but for the cache."""
        if not self.draws_tokens or not cache_name(self.model):
            return
        for name, batch, count in (("a token after a cache", 2, 1), ("tokens after a cache", 2, 5)):
            yield name, self._tokens(batch, 9), self._tokens(batch, count)
        if takes(self.model, "attention_mask") and takes(self.model, "position_ids"):
            lengths = torch.tensor([9, 5, 2])
            mask = (torch.arange(10) >= 9 - lengths[:, None]).long()
            places = (mask.cumsum(1) - 1).clamp_min(0)
            yield (
                "a token after a padded cache",
                self._tokens(3, 9).having(attention_mask=mask[:, :9], position_ids=places[:, :9]).on(self.model),
                self._tokens(3, 1).having(attention_mask=mask, position_ids=places[:, 9:]).on(self.model),
            )

    def _tokens(self, batch: int, length: int) -> ModelInputs:
        found = self.inputs(batch, length)
        assert found is not None
        return found


def cache_name(model: nn.Module) -> str:
    """Under which name a language model takes a cache; "" if it takes none."""
    if not hasattr(model, "generate") or not takes(model, "use_cache"):
        return ""
    return next((name for pair in ALIASES for name in pair if takes(model, name)), "")


def following(model: nn.Module, out: Any, tokens: torch.Tensor, **kwargs: Any) -> ModelInputs:
    """The tokens that come after a forward with a cache, whose output is `out`; the cache is copied."""
    name, encoded = cache_name(model), getattr(out, "encoder_last_hidden_state", None)
    cache = Rebuilder(lambda _, tensor: copied(tensor)).copy(getattr(out, name), name)
    main: dict[str, Any] = {"input_ids": tokens}
    if encoded is not None:
        main = {"decoder_input_ids": tokens, "encoder_outputs": (encoded,)}
    return ModelInputs((), {**main, **kwargs, name: cache, "use_cache": True})


def base_inputs(model: nn.Module, inputs: Any, drawing: Drawing) -> ModelInputs:
    """What the activations come from.

    Raises:
        VerificationError: None were given, and the model does not say what it takes.
    """
    found = drawing.inputs() if inputs is None else given(inputs).on(model)
    if found is None:
        raise VerificationError(
            f"No inputs of {type(model).__name__} can be made up: it does not say what it takes. Give them: "
            f"graft.verify(x), a tuple of arguments, or a dict of keywords; to kernelgraft.graft as example_inputs."
        )
    return found


def one_of_batch(inputs: ModelInputs) -> ModelInputs | None:
    """The first of a batch alone, where every tensor has the batch first."""
    sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in tensors((inputs.args, inputs.kwargs))}
    if len(sizes) != 1 or max(sizes) < 2:
        return None
    return ModelInputs(mapped(inputs.args, lambda t: t[:1]), mapped(inputs.kwargs, lambda t: t[:1]))


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _tokens(model: nn.Module) -> torch.Tensor:
    """The tokens to draw from: none that means something to the model."""
    configs = [getattr(model, "config", None), _text_config(model)]
    special = {
        value
        for config in configs
        for name, value in vars(config).items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    size = int(getattr(configs[1], "vocab_size", None) or 32)
    return torch.tensor([token for token in range(size) if token not in special] or [0])
