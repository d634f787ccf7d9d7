"""RMS norm and the self-attention behind it: q, k, v = split(rms_norm(x) W_qkv^T + b); y = attend(q, k, v) W_o^T + b_o.

q, k and v are one product; norms over heads, the rotary embedding and the write into a static cache are one kernel
(`rotary`). Attention itself is Transformers' own function for the implementation that the config names, so that every
implementation, cache and mask works, but for "sdpa" on a GPU: one query token goes to `one_token_attention`, or with a
plain cache all of it is one kernel (`decode_attention`), and a short prompt goes to `short_attention`.

Shapes: x and y (B, T, H), norm_weight (H), qkv_proj ((N + 2 K) * D, H), o_proj (H, N * D), norms of heads (D); N heads,
K key and value heads, cos and sin (B or 1, T, D).
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from . import attention_code, decode_attention, device, first_steps, short_attention
from .attention_code import Library
from .few_tokens import Norm, product
from .gated_mlp import linear, weights_of
from .one_token_attention import one_token_attention
from .one_token_attention import refusal as one_token_refusal
from .rms_norm import Kind, kind_of
from .rms_norm_kernels import MAX_COLUMNS
from .rotary import rotate, rotate_into
from .rotary_kernels import dtypes

_NUM_KEYS = (8, 100, 250, 500)
"""Keys of the decoding that is prepared: in one part, and in 4, 8 and 16 that are attended to side by side."""


def _layer(library: Library, cache: Any, layer_idx: int) -> Any:
    """The layer of a cache whose `update` is known; `None` if it must be left to the cache.

    `StaticLayer.update` writes at `cumulative_length`, a tensor on the device, which it increments in place;
    `DynamicLayer.update` puts what is new behind what is there, in new memory. A class that overrides any of it, and a
    layer on its way to another device, are left to their own code.
    """
    if cache is None or type(cache).update is not library.cache.update or cache.offloading:
        return None
    layer: Any = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    kind = type(layer)
    known = (kind is library.static_layer or kind is library.dynamic_layer) and layer.is_initialized
    return layer if known else None


def _static_layer(library: Library, cache: Any, layer_idx: int, qkv: torch.Tensor, dtype: torch.dtype) -> Any:
    """The layer of a static cache that a kernel can write into; what has a gradient is left to the cache."""
    layer = _layer(library, cache, layer_idx)
    if type(layer) is not library.static_layer:
        return None
    keys, values, length = layer.keys, layer.values, layer.cumulative_length
    fits = keys.dtype == dtype and values.dtype == qkv.dtype and keys.shape[0] == values.shape[0] == qkv.shape[0]
    there = keys.device == values.device == length.device == qkv.device
    dense = keys.stride(-1) == values.stride(-1) == 1
    recorded = torch.is_grad_enabled() and (qkv.requires_grad or keys.requires_grad or values.requires_grad)
    return layer if fits and there and dense and not recorded else None


class RMSNormAttentionLayout(nn.Module):
    """The parameters of `RMSNormAttention`: made from the two modules that it takes over."""

    host = "self_attn"
    packing: ClassVar[dict[str, Any]] = {
        "norm_weight": "norm.weight",
        "qkv_proj.weight": ["attention.q_proj.weight", "attention.k_proj.weight", "attention.v_proj.weight"],
        "qkv_proj.bias": ["attention.q_proj.bias", "attention.k_proj.bias", "attention.v_proj.bias"],
        "o_proj.weight": "attention.o_proj.weight",
        "o_proj.bias": "attention.o_proj.bias",
        "q_norm_weight": "attention.q_norm.weight",
        "k_norm_weight": "attention.k_norm.weight",
    }

    @staticmethod
    def supports(hidden_states: torch.Tensor, position_embeddings: Any = None, *_: Any, **__: Any) -> bool | str:
        """Hidden states (B, T, H) in bfloat16, float16 or float32, and angles without a gradient."""
        if hidden_states.ndim != 3:
            return f"hidden states are (B, T, H), and not {tuple(hidden_states.shape)}"
        if hidden_states.shape[-1] > MAX_COLUMNS:
            return f"its norm takes rows of up to {MAX_COLUMNS} numbers, and not {hidden_states.shape[-1]}"
        if position_embeddings is None or any(each.ndim != 3 for each in position_embeddings):
            return "it needs cos and sin, (B or 1, T, D), as position_embeddings"
        if any(each.requires_grad for each in position_embeddings):
            return "no gradient goes to position_embeddings"
        return device.refusal(hidden_states, *position_embeddings) or True

    def __init__(self, norm: Any, attention: Any):
        """Take over what the forward of `attention` reads, and its weights.

        Raises:
            ValueError: `attention` or a norm computes something else than this kernel does.
        """
        super().__init__()
        calls = attention_code.calls_of(attention)
        # Attention functions read what they like off the module: its index, whether it is causal, its groups.
        for name, value in vars(attention).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        self.eager_attention_forward = calls.eager
        self.options = calls.options
        self.names_cache = calls.names_cache
        self.hands_kwargs_on = calls.hands_kwargs_on
        self.kind = kind_of(norm)
        self.norm_weight = nn.Parameter(torch.empty_like(norm.weight))
        self.qkv_proj, self.o_proj = _merged(attention), linear(attention.o_proj)
        self.head_kind = self.kind
        self.q_norm_weight = self.k_norm_weight = None
        if hasattr(attention, "q_norm"):
            self.head_kind = _head_kind(attention)
            self.q_norm_weight = nn.Parameter(torch.empty_like(attention.q_norm.weight))
            self.k_norm_weight = nn.Parameter(torch.empty_like(attention.k_norm.weight))

    def prepare_kernels(self, device: torch.device) -> None:
        """See `first_steps`."""
        prepare(self, self, device, lambda out, _: product(out, *weights_of(self.o_proj)))


def _merged(attention: Any) -> nn.Linear:
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    if len({each.bias is None for each in projections}) > 1:
        raise ValueError("of q_proj, k_proj and v_proj some have a bias and some have none")
    rows = [each.weight.shape[0] for each in projections]
    dim = attention.head_dim
    if rows[1] != rows[2] or any(each % dim for each in rows) or dim % 2:
        raise ValueError(f"q_proj, k_proj and v_proj give {rows} numbers, which are no heads of {dim}")
    taken = attention.o_proj.weight.shape[1]
    if taken != rows[0]:
        raise ValueError(f"o_proj takes {taken} numbers, and the queries have {rows[0]}")
    return linear(attention.q_proj, sum(rows))


def _head_kind(attention: Any) -> Kind:
    """What the norms of queries and keys compute."""
    norms = {"q_norm": attention.q_norm, "k_norm": attention.k_norm}
    for name, norm in norms.items():
        if norm.weight.shape != (attention.head_dim,):
            raise ValueError(
                f"{name} is over {tuple(norm.weight.shape)} numbers, and the kernel's norm is over one head of "
                f"{attention.head_dim}"
            )
    first, second = ((kind_of(norm), norm.weight.dtype) for norm in norms.values())
    if first != second:
        raise ValueError(f"q_norm and k_norm differ: {first} and {second}")
    return first[0]


class RMSNormAttention(nn.Module):
    """RMS norm, then self-attention, as in Llama, Mistral, Qwen2, Qwen3 and Gemma3."""

    has_backward = True
    can_torch_compile = True

    norm_weight: torch.Tensor
    q_norm_weight: torch.Tensor | None
    k_norm_weight: torch.Tensor | None
    qkv_proj: nn.Linear
    o_proj: nn.Linear
    kind: Kind
    head_kind: Kind
    head_dim: int
    layer_idx: int
    scaling: float
    attention_dropout: float
    config: Any
    eager_attention_forward: Any
    options: dict[str, Any]
    names_cache: bool
    hands_kwargs_on: bool

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, H) to (B, T, H), and the attention's weights where the implementation gives them."""
        out, weights = attended(self, hidden_states, position_embeddings, attention_mask, past_key_values, kwargs)
        return product(out, self.o_proj.weight, self.o_proj.bias), weights


def attended(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: Any,
    attention_mask: torch.Tensor | None,
    cache: Any,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All that comes before the last product.

    Args:
        self: What `RMSNormAttentionLayout` holds.
        hidden_states: (B, T, H), before the norm.
        position_embeddings: cos and sin.
        attention_mask: As the implementation wants it.
        cache: A cache of Transformers, or `None`.
        kwargs: The rest of the call, for the implementation and the cache.

    Returns:
        (B, T, N * D), and the attention's weights where the implementation gives them.
    """
    library, attend = _attention_of(self)
    if not self.names_cache and isinstance(cache, library.paged):
        cache, kwargs = None, {**kwargs, "cache": cache}
    dropout = self.attention_dropout if self.training else 0.0
    rotation = _rotation(self, hidden_states, position_embeddings)
    qkv, num_heads = rotation[0], rotation[3]
    shape = (*hidden_states.shape[:-1], num_heads * self.head_dim)
    plain = attend is library.sdpa and not dropout
    if plain and hidden_states.shape[1] == 1 and device.in_triton(qkv):
        out = _decoded(self, library, rotation, attention_mask, cache, kwargs)
        if out is not None:
            return out.view(shape), None
    q, k, v = _states(self, library, rotation, cache, kwargs)
    if plain and _is_one_token(q, k, v, attention_mask, kwargs):
        out, weights = one_token_attention(q, k, v, self.scaling, attention_mask), None
    elif plain and (short := _short(self, q, k, v, attention_mask, kwargs)) is not None:
        out, weights = short, None
    else:
        out, weights = attend(
            self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **self.options, **kwargs
        )
    return out.reshape(shape).contiguous(), weights


def _attention_of(self: Any) -> tuple[Library, Any]:
    """Transformers' part in it, and its function for the implementation that the config names."""
    library = attention_code.library()
    return library, library.functions.get_interface(self.config._attn_implementation, self.eager_attention_forward)


def _rotation(self: Any, hidden_states: torch.Tensor, position_embeddings: Any) -> Any:
    """The arguments of `rotate`, but for the kind of its norm."""
    weight, bias = weights_of(self.qkv_proj)
    qkv = product(hidden_states, weight, bias, Norm(self.norm_weight, *self.kind))
    # Read off the weights: a shard has fewer heads than the config says.
    num_heads = weights_of(self.o_proj)[0].shape[1] // self.head_dim
    return qkv, *position_embeddings, num_heads, self.head_dim, self.q_norm_weight, self.k_norm_weight


def prepare(
    self: Any, layout: nn.Module, of: torch.device, behind: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    """Load what a step of `layout` launches, see `first_steps`.

    Args:
        self: What `RMSNormAttentionLayout` holds, in `layout` or that itself.
        layout: With its parameters on the meta device.
        of: A GPU.
        behind: Makes the outcome of what `attended` gives, and of the hidden states.
    """

    def step(x: torch.Tensor) -> list[torch.Tensor]:
        out, *states = _attended_on_meta(self, x)
        return [behind(out, x), *states]

    _attend_once(self, of, trains=layout.training and weights_of(self.qkv_proj)[0].requires_grad)
    first_steps.prepare(layout, of, weights_of(self.qkv_proj)[0], step)


def _attended_on_meta(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`attended` on the meta device, without the library's function: queries in its outcome's place, and k and v.

    One token is decoded too, with a growing cache.
    """
    angle = hidden_states.new_empty(1, hidden_states.shape[1], self.head_dim, requires_grad=False)
    rotation = _rotation(self, hidden_states, (angle, angle))
    q, k, v = rotate(*rotation, *self.head_kind)
    if hidden_states.shape[1] == 1 and not torch.is_grad_enabled():
        qkv, cos, _, _, dim, norm, _ = rotation
        for num_keys in _NUM_KEYS:
            held = k.new_empty(1, k.shape[1], num_keys, dim)
            if not decode_attention.refusal(
                qkv, cos, dim, norm, self.head_kind.rounds_first, held, held, num_keys + 1, None
            ):
                arguments = (*rotation, self.head_kind, held, held, self.scaling, None, True)
                decode_attention.attend_longer(*arguments)
    return q.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1), k, v


def _attend_once(self: Any, of: torch.device, trains: bool) -> None:
    """Call torch's attention on a few zeros, if it is that which is asked for: it has code to load too."""
    library, attend = _attention_of(self)
    if attend is not library.sdpa:
        return
    weight, last = weights_of(self.qkv_proj)[0], weights_of(self.o_proj)[0]
    num_heads, rows = last.shape[1] // self.head_dim, weight.shape[0] // self.head_dim
    q, k = (
        torch.zeros(1, each, 16, self.head_dim, dtype=weight.dtype, device=of, requires_grad=trains)
        for each in (num_heads, (rows - num_heads) // 2)
    )
    with torch.set_grad_enabled(trains):
        ways = [attend(self, q, k, k, None, dropout=0.0, scaling=self.scaling, **self.options)[0]]
        if short_attention.is_planned(of) and short_attention.takes(q, k, k):
            ways.append(short_attention.attend(q, k, k, self.scaling, True))
        if trains:
            for out in ways:
                torch.autograd.grad(out, (q, k), torch.ones_like(out))


def _decoded(
    self: Any,
    library: Library,
    rotation: Any,
    mask: torch.Tensor | None,
    cache: Any,
    kwargs: dict[str, Any],
) -> torch.Tensor | None:
    """One token, with all that is between two products in one kernel; `None` where that is not for it."""
    layer = _layer(library, cache, self.layer_idx)
    if layer is None or not _is_bare(kwargs):
        return None
    qkv, cos, sin, num_heads, head_dim, q_weight, k_weight = rotation
    keys, values = layer.keys, layer.values
    grows = type(layer) is library.dynamic_layer
    num_keys = keys.shape[-2] + int(grows)  # a truth added to a symbol is none that torch's compilers know
    kind = self.head_kind
    if decode_attention.refusal(qkv, cos, head_dim, q_weight, kind.rounds_first, keys, values, num_keys, mask):
        return None
    if torch.is_grad_enabled() and any(
        each is not None and each.requires_grad for each in (qkv, q_weight, k_weight, keys, values)
    ):
        return None
    if grows:
        out, layer.keys, layer.values = decode_attention.attend_longer(
            qkv, cos, sin, num_heads, head_dim, q_weight, k_weight, kind, keys, values, self.scaling, mask, follows=True
        )
        return out
    position = layer.cumulative_length
    if position.device != qkv.device:
        return None
    return decode_attention.attend_into(
        qkv, cos, sin, num_heads, head_dim, q_weight, k_weight, kind, keys, values, position, self.scaling, mask,
        follows=True,
    )  # fmt: skip


def _states(
    self: Any, library: Library, rotation: Any, cache: Any, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The queries, and the keys and values with those before them."""
    qkv, cos = rotation[:2]
    arguments = (*rotation, *self.head_kind)
    if device.in_triton(qkv):
        rotated_dtype = dtypes(qkv, cos, self.q_norm_weight, self.head_kind.rounds_first)[1]
        layer = _static_layer(library, cache, self.layer_idx, qkv, rotated_dtype)
        if layer is not None:
            q = rotate_into(layer.keys, layer.values, layer.cumulative_length, *arguments)
            layer.cumulative_length.add_(qkv.shape[1])
            return q, layer.keys, layer.values
    q, k, v = rotate(*arguments)
    if cache is not None:
        extra = {"kwargs": kwargs} if self.hands_kwargs_on else {}
        k, v = cache.update(k, v, self.layer_idx, **extra)
    return q, k, v


def _is_one_token(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> bool:
    """Whether `one_token_attention` does what Transformers' function for "sdpa" would do."""
    if not device.in_triton(q) or one_token_refusal(q, k, v, mask) is not None:
        return False
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False
    return _is_bare(kwargs)


def _short(
    self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> torch.Tensor | None:
    """What Transformers' function for "sdpa" gives for a short sequence; `None` where that is left to it."""
    length = q.shape[2]
    if mask is not None or not short_attention.is_planned(q.device) or length == 1 or not _is_bare(kwargs):
        return None
    asked = kwargs.get("is_causal")
    is_causal = bool(getattr(self, "is_causal", True) if asked is None else asked)
    if is_causal and k.shape[2] > length:  # a cache with room for more
        k, v = k[:, :, :length], v[:, :, :length]
    return short_attention.attend(q, k, v, self.scaling, is_causal) if short_attention.takes(q, k, v) else None


def _is_bare(kwargs: dict[str, Any]) -> bool:
    """Whether a call has nothing that changes attention itself."""
    return kwargs.get("position_bias") is None and kwargs.get("softcap") is None and kwargs.get("cache") is None
