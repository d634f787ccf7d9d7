"""What an attention module of Transformers computes, read off its code: whether a kernel may stand for it.

Hundreds of classes have the same four projections, and some of them clip, gate, scale or leave out the rotation. What
such a forward does besides Llama's shows in the names that it reads and in its branches; how it rotates is tried on a
few numbers.
"""

import dis
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import nn

from . import rotary

_ALWAYS = frozenset(
    {"shape", "head_dim", "q_proj", "k_proj", "v_proj", "o_proj", "view", "transpose", "apply_rotary_pos_emb"}
    | {"update", "layer_idx", "ALL_ATTENTION_FUNCTIONS", "get_interface", "config", "_attn_implementation"}
    | {"eager_attention_forward", "training", "attention_dropout", "scaling", "reshape", "contiguous"}
)
_SOMETIMES = frozenset({"q_norm", "k_norm", "sliding_window", "getattr"})
_WRITTEN = frozenset({"dropout", "scaling", "kwargs", "sliding_window"})
_NUM_BRANCHES = 2  # is there a cache; does it train


@dataclass(frozen=True)
class Calls:
    """How an attention module calls what it does not compute itself.

    Attributes:
        eager: The function that its own file has for the implementation "eager".
        options: What it hands to attention functions besides Llama's arguments.
        names_cache: Whether its forward calls the cache `cache`, which was `past_key_values` before Transformers 5.23.
        hands_kwargs_on: Whether the cache's `update` gets the keywords of the call.
    """

    eager: Callable[..., Any]
    options: dict[str, Any]
    names_cache: bool
    hands_kwargs_on: bool


class Library(NamedTuple):
    """What attention needs of Transformers, whose models alone have such attention.

    Attributes:
        functions: The attention functions by implementation.
        sdpa: That of "sdpa".
        cache: The class of caches.
        static_layer: The class of their layers of a fixed length.
        dynamic_layer: That of those that grow.
        paged: The class that older versions leave to the attention function, as `cache`.
    """

    functions: Any
    sdpa: Callable[..., Any]
    cache: Any
    static_layer: Any
    dynamic_layer: Any
    paged: Any


_library: Library | None = None
# Not by `functools.cache`, which compilers look through, and warn of.


def library() -> Library:
    """What is there in Transformers; looked up once, since it takes as long as a launch.

    Raises:
        ImportError: It is not installed, or has not these.
    """
    global _library
    if _library is not None:
        return _library
    try:
        from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
        from transformers.generation.continuous_batching.cache import PagedAttentionCache
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError as error:
        raise ImportError(
            f"this kernel stands for an attention of Transformers 5.22.2 or newer, and there is none: {error}"
        ) from error
    _library = Library(
        ALL_ATTENTION_FUNCTIONS, sdpa_attention_forward, Cache, StaticLayer, DynamicLayer, PagedAttentionCache
    )
    return _library


def calls_of(attention: nn.Module) -> Calls:
    """Read an attention module's forward.

    Args:
        attention: A module with Llama's projections, whose forward is the code that shall be replaced.

    Raises:
        ValueError: It does something else than Llama's, Mistral's, Qwen's or Gemma3's attention.
    """
    name = type(attention).__name__
    forward = inspect.unwrap(type(attention).forward)
    code = getattr(forward, "__code__", None)
    if code is None:
        raise ValueError(f"what {name} computes cannot be read: its forward is no Python function")
    names, written = _read(name, code)
    globals_of = forward.__globals__
    if globals_of["ALL_ATTENTION_FUNCTIONS"] is not library().functions:
        raise ValueError(f"{name} has attention functions of its own instead of those of Transformers")
    _check_rotation(name, globals_of["apply_rotary_pos_emb"])
    options = {}
    if "sliding_window" in names:
        options["sliding_window"] = getattr(attention, "sliding_window", None)
    elif "sliding_window" in written:
        options["sliding_window"] = getattr(attention.config, "sliding_window", None)
    arguments = inspect.signature(forward).parameters
    return Calls(globals_of["eager_attention_forward"], options, "cache" in arguments, "kwargs" in written)


@functools.lru_cache(maxsize=64)  # a model's layers have one forward
def _read(name: str, code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """What a forward reads, and the words that are written in it; refused if it is another attention than Llama's."""
    names, written = frozenset(code.co_names), frozenset(_written_in(code))
    for what, found in (
        ("also reads", (names - _ALWAYS - _SOMETIMES) | (written - _WRITTEN)),
        ("does not read", _ALWAYS - names),
    ):
        if found:
            raise ValueError(f"{name}.forward {what} {', '.join(sorted(found))}, so it is another attention")
    if sum("JUMP" in step.opname and "IF" in step.opname for step in dis.get_instructions(code)) != _NUM_BRANCHES:
        raise ValueError(f"{name}.forward has other branches than whether there is a cache and whether it trains")
    if "q_norm" in names and code.co_names.index("q_norm") > code.co_names.index("apply_rotary_pos_emb"):
        raise ValueError(f"{name}.forward normalizes after the rotation, and the kernel does before")
    return names, written


def _written_in(code: CodeType) -> set[str]:
    """The words that stand as constants in a function: keywords of its calls, and names it gives to `getattr`."""
    constants: list[Any] = [text for each in code.co_consts for text in (each if isinstance(each, tuple) else (each,))]
    return {text for text in constants if isinstance(text, str) and text.isidentifier()}


def _check_rotation(name: str, apply: Callable[..., Any]) -> None:
    q, k, cos, sin = (torch.linspace(low, low + 2, 8, device="cpu").view(1, 1, 1, 8) for low in (-1, 0, 0.5, -0.7))
    cos, sin = cos[0], sin[0]
    qkv = torch.cat([q, k, k], dim=-1)[0]
    wanted = rotary.reference(qkv, cos, sin, 1, 8)[:2]
    with torch.no_grad():
        found = apply(q, k, cos, sin)
    if not all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True)):
        raise ValueError(f"{name} rotates in another order than the two halves of a head")
