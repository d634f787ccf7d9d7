"""Qwen3 with random weights in real sizes, and calls of its layers as the model makes them."""

import argparse
import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks import models
from benchmarks.kernels.measure import DTYPE
from kernelgraft.verify._drawing import cache_name

SIZES: dict[str, dict[str, Any]] = {
    "0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "tie_word_embeddings": True,
    },
}
"""Those of the published configs, by what a row calls the model; a trial has "tiny" in the place of each."""


def config(size: str, asked: argparse.Namespace, **changes: Any) -> Any:
    """The config of a model."""
    from transformers import Qwen3Config

    sizes = SIZES["tiny" if asked.tiny else size]
    return Qwen3Config(**{**models.COMMON, **sizes, "bos_token_id": 1, "eos_token_id": 2, **changes})


def model(size: str, asked: argparse.Namespace, **changes: Any) -> Any:
    """A model in eval mode, whose norms are not all ones."""
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(asked.seed)
    with torch.device(asked.device):
        made = Qwen3ForCausalLM._from_config(config(size, asked, **changes), dtype=DTYPE)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return made.eval()


def in_float32(of: nn.Module) -> nn.Module:
    """A copy that computes in float32."""
    return copy.deepcopy(of).float()


@contextlib.contextmanager
def computing_in_float32(of: Any) -> Iterator[None]:
    """The model itself computes in float32: one layer at a time, so that it takes little more memory than it has.

    Each layer's weights are float32 while it is called, and then the very tensors of before.
    """
    kept: dict[nn.Parameter, torch.Tensor] = {}

    def before(layer: nn.Module, _: Any) -> None:
        for parameter in layer.parameters():
            kept[parameter] = parameter.data
            parameter.data = parameter.data.float()

    def after(layer: nn.Module, *_: Any) -> None:
        for parameter in layer.parameters():
            parameter.data = kept.pop(parameter)

    hooks = []
    for layer in (of.model.embed_tokens, *of.model.layers, of.model.norm, of.lm_head):
        hooks += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def digest(of: nn.Module) -> str:
    """What weights drawn alike have in common, and no others."""
    sums = [int(each.detach().view(torch.int16).sum(dtype=torch.int64)) for each in of.parameters()]
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:12]


def token_ids(of: Any, batch: int, length: int, asked: argparse.Namespace) -> torch.Tensor:
    """Random tokens."""
    generator = torch.Generator().manual_seed(asked.seed)
    return torch.randint(3, of.config.vocab_size, (batch, length), generator=generator).to(asked.device)


# --- calls of layers


@dataclass(frozen=True)
class Call:
    """What the model called one of its layers with."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        """Call it so again."""
        return self.layer(*self.args, **self.kwargs)


def layer_calls(of: Any, run: Callable[[], Any]) -> list[Call]:
    """The calls of all decoder layers in a run of the model."""
    found: list[Call] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: found.append(Call(layer, args, kwargs)), with_kwargs=True
        )
        for layer in of.model.layers
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


class StaticDecoding:
    """A static cache that holds a prompt, and single tokens that follow it.

    Args:
        of: The model, which fills the cache.
        prompt: Tokens (1, prompt).
        length: How many the cache has room for.
    """

    def __init__(self, of: Any, prompt: torch.Tensor, length: int) -> None:
        from transformers import StaticCache

        self.model, self.prompt = of, prompt
        self.cache = StaticCache(config=of.config, max_cache_len=length)
        self.keywords = {cache_name(of): self.cache, "use_cache": True}
        with torch.no_grad():
            self.logits = of(prompt, **self.keywords).logits[:, -1:]

    def rewind(self) -> None:
        """The cache as it was after the prompt: what came later is out of sight."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.prompt.shape[1])

    def run(self, token: torch.Tensor) -> Any:
        """The model's outcome for one token (1, 1) more."""
        return self.model(token, **self.keywords)


def num_bytes(parameters: Sequence[torch.Tensor]) -> int:
    """Bytes of distinct parameters."""
    return sum(each.nbytes for each in {id(each): each for each in parameters}.values())
