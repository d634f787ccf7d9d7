"""A decoding step's attention behind the product of q, k and v: norms of heads, rotation, cache and attention in one.

q, k, v = split(qkv), q and k normalized where a model does, and rotated; k and v go into the cache, and
y = softmax(scale * q K^T + mask) V over all that is in it. It is `rotary` followed by `one_token_attention`, forward
only, for one token of each sequence.

Shapes: qkv (B, 1, (N + 2 K) * D), cos and sin (B or 1, 1, D), weights of the norms (D), keys and values (B, K, S, D),
mask (B or 1, N or 1, 1, S), or S + 1 where the cache grows, y (B, 1, N, D); N heads, K key and value heads.
"""

from typing import Any

import torch

from . import compiling, device, one_token_attention, rotary
from .decode_attention_kernels import launch
from .rotary_kernels import dtypes

# --- operators: what compilers see. Their names hold that of this module, so that two builds of the repository can be
# in one process.


@torch.library.custom_op(f"{__name__.replace('.', '_')}::into", mutates_args=("keys", "values"))
def _into(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    num_heads: int,
    head_dim: int,
    eps: float,
    offset: float,
    rounds_first: bool,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    held = (keys, values)
    kind = (eps, offset, rounds_first)
    return launch(
        qkv, cos, sin, q_weight, k_weight, num_heads, head_dim, *kind, held, held, position, scale, mask, counts=False
    )


@compiling.fake(_into)
def _(qkv, cos, sin, q_weight, k_weight, num_heads, head_dim, eps, offset, rounds_first, keys, values, position, scale,
      mask):  # fmt: skip
    return qkv.new_empty(qkv.shape[0], 1, num_heads, head_dim)


@torch.library.custom_op(f"{__name__.replace('.', '_')}::longer", mutates_args=())
def _longer(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    num_heads: int,
    head_dim: int,
    eps: float,
    offset: float,
    rounds_first: bool,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kind = (eps, offset, rounds_first)
    return _launch_longer(qkv, cos, sin, q_weight, k_weight, num_heads, head_dim, *kind, keys, values, scale, mask)


@compiling.fake(_longer)
def _(qkv, cos, sin, q_weight, k_weight, num_heads, head_dim, eps, offset, rounds_first, keys, values, scale, mask):
    return qkv.new_empty(qkv.shape[0], 1, num_heads, head_dim), *_empty_longer(keys, values)


def _empty_longer(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*keys.shape[:2], keys.shape[2] + 1, keys.shape[3])
    return keys.new_empty(shape), values.new_empty(shape)


def _launch_longer(*arguments: Any, follows: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *before, keys, values, scale, mask = arguments
    keys_now, values_now = _empty_longer(keys, values)
    run: Any = launch
    y = run(*before, (keys, values), (keys_now, values_now), None, scale, mask, follows=follows)
    return y, keys_now, values_now


# --- what models call


def reference(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    head_dim: int,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    kind: tuple[float, float, bool],
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor | None,
    scale: float,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`attend_into` or, without a position, `attend_longer`, in plain torch; keys and values are written nowhere."""
    q, k, v = rotary.reference(qkv, cos, sin, num_heads, head_dim, q_weight, k_weight, *kind)
    if position is None:
        keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
    else:
        keys, values = (held.index_copy(2, position.reshape(1), each) for held, each in ((keys, k), (values, v)))
    return one_token_attention.reference(q, keys, values, scale, mask), keys, values


def refusal(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    head_dim: int,
    q_weight: torch.Tensor | None,
    rounds_first: bool,
    keys: Any,
    values: Any,
    num_keys: int,
    mask: torch.Tensor | None,
) -> str | None:
    """Why the kernels do not take these tensors, if they do not.

    Args:
        qkv: Of any number of tokens.
        cos: The angles' cosines.
        head_dim: D.
        q_weight: Of the norm of heads, if there is one.
        rounds_first: Whether that rounds before it multiplies by its weight.
        keys: The cache's, if it has any.
        values: The same.
        num_keys: How many there are with this token's.
        mask: As above.
    """
    if qkv.shape[1] != 1:
        return f"it takes one query token, and not {qkv.shape[1]}"
    if head_dim not in one_token_attention.HEAD_DIMS:
        return f"it takes heads of {', '.join(map(str, one_token_attention.HEAD_DIMS))} numbers, and not {head_dim}"
    for held in (keys, values):
        if not isinstance(held, torch.Tensor) or held.ndim != 4 or not held.shape[2]:
            return "it takes a cache with tokens in it"
        if held.dtype != qkv.dtype or held.device != qkv.device or held.stride(-1) != 1:
            return "its cache is dense, on the same device and of the same dtype"
        if held.shape[0] != qkv.shape[0] or held.shape[3] != head_dim:
            return f"its cache is ({qkv.shape[0]}, K, S, {head_dim}), and not {tuple(held.shape)}"
    if dtypes(qkv, cos, q_weight, rounds_first)[1] != qkv.dtype:
        return "what is rotated has another dtype"
    if mask is not None and (mask.ndim != 4 or mask.shape[-2:] != (1, num_keys)):
        return f"its mask is (B or 1, N or 1, 1, {num_keys}), and not {tuple(mask.shape)}"
    return device.refusal(qkv)


def attend_into(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    head_dim: int,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    kind: tuple[float, float, bool],
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    follows: bool = False,
) -> torch.Tensor:
    """The step with a cache of fixed length, in Triton. Not differentiable.

    Args:
        qkv: (B, 1, (N + 2 K) * D), bfloat16, float16 or float32; D one of `one_token_attention.HEAD_DIMS`.
        cos: (B or 1, 1, D).
        sin: The same.
        num_heads: N.
        head_dim: D.
        q_weight: (D), if heads are normalized.
        k_weight: The same.
        kind: Of that norm: eps, offset, and whether it rounds first.
        keys: (B, K, S, D); this token's key is written into it.
        values: The same, for the value.
        position: One integer on the device, where they are written; it is incremented.
        scale: What the products of queries and keys are multiplied by.
        mask: (B or 1, N or 1, 1, S): true where a key is seen, or numbers that are added to the scaled products.
        follows: Whether the kernel that was launched last gave `qkv`, and nothing was since; all else is then read
            before that one has ended.

    Returns:
        (B, 1, N, D), contiguous; not a number where the position is behind the cache's end.
    """
    arguments = (qkv, cos, sin, q_weight, k_weight, num_heads, head_dim, *kind)
    if device.launches(qkv, cos, sin, q_weight, k_weight, keys, values, position, mask):
        return launch(*arguments, (keys, values), (keys, values), position, scale, mask, follows=follows)
    y: torch.Tensor = _into(*arguments, keys, values, position, scale, mask)
    # Not by the operator: angles and masks of later layers are computed from this too, and the inductor puts off what
    # it computes past an operator that writes, though not past this.
    position.add_(1)
    return y


def attend_longer(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    head_dim: int,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    kind: tuple[float, float, bool],
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    follows: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The step with a cache that grows; arguments as of `attend_into`, and a mask of S + 1 keys.

    Returns:
        (B, 1, N, D), and the keys and values with this token's, (B, K, S + 1, D), in new memory.
    """
    arguments = (qkv, cos, sin, q_weight, k_weight, num_heads, head_dim, *kind, keys, values, scale, mask)
    if device.launches(qkv, cos, sin, q_weight, k_weight, keys, values, mask):
        return _launch_longer(*arguments, follows=follows)
    y, keys_now, values_now = _longer(*arguments)
    return y, keys_now, values_now
