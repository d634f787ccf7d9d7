"""Queries, keys and values out of one product: split into heads, normalized per head, rotated by their positions.

q = n(x_q) * cos + rotate_half(n(x_q)) * sin, k the same, v as it is; n is an RMS norm over a head, where a model has
one, and rotate_half(x) = (-x[D/2:], x[:D/2]).

Shapes: qkv (B, T, (N + 2 K) * D), cos and sin (B or 1, T, D), weights of the norms (D), q (B, N, T, D), k and v
(B, K, T, D); N heads, K key and value heads.

In memory q, k and v are (B, T, heads, D), as the product is and as the original's own are: each program reads and
writes runs of whole heads, flash attention takes and gives that order without a copy, and a cache that grows copies in
any case. v is a view of qkv where nobody differentiates, and a copy where it would keep the whole product alive.
"""

import torch

from . import compiling, device, rms_norm
from .rotary_backward_kernels import launch_backward
from .rotary_kernels import dtypes, empty_heads, kv_heads_of, launch, launch_into

# --- operators: what autograd and compilers see. Their names hold that of this module, so that two builds of the
# repository can be in one process.


@torch.library.custom_op(f"{__name__.replace('.', '_')}::forward", mutates_args=())
def _rotate(
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
    copies: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return launch(qkv, cos, sin, q_weight, k_weight, num_heads, head_dim, eps, offset, rounds_first, copies)


@compiling.fake(_rotate)
def _(qkv, cos, sin, q_weight, k_weight, num_heads, head_dim, eps, offset, rounds_first, copies):
    num_kv_heads = kv_heads_of(qkv, num_heads, head_dim)
    dtype = dtypes(qkv, cos, q_weight, rounds_first)[1]
    return (
        empty_heads(qkv, num_heads, head_dim, dtype),
        empty_heads(qkv, num_kv_heads, head_dim, dtype),
        empty_heads(qkv, num_kv_heads if copies else 0, head_dim, qkv.dtype),
    )


@torch.library.custom_op(f"{__name__.replace('.', '_')}::into", mutates_args=("keys", "values"))
def _rotate_into(
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
) -> torch.Tensor:
    return launch_into(
        qkv, cos, sin, q_weight, k_weight, num_heads, head_dim, eps, offset, rounds_first, keys, values, position
    )


@compiling.fake(_rotate_into)
def _(qkv, cos, sin, q_weight, k_weight, num_heads, head_dim, eps, offset, rounds_first, keys, values, position):
    return empty_heads(qkv, num_heads, head_dim, dtypes(qkv, cos, q_weight, rounds_first)[1])


@torch.library.custom_op(f"{__name__.replace('.', '_')}::backward", mutates_args=())
def _rotate_backward(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    qkv: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    dtype: torch.dtype,
    eps: float,
    offset: float,
    rounds_first: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return launch_backward(grad_q, grad_k, grad_v, qkv, cos, sin, q_weight, k_weight, dtype, eps, offset, rounds_first)


@compiling.fake(_rotate_backward)
def _(grad_q, grad_k, grad_v, qkv, cos, sin, q_weight, k_weight, dtype, eps, offset, rounds_first):
    batch, num_heads, num_tokens, head_dim = grad_q.shape
    grad_qkv = grad_q.new_empty(batch, num_tokens, (num_heads + 2 * grad_k.shape[1]) * head_dim, dtype=dtype)
    grads = [grad_q.new_empty(0) if each is None else torch.empty_like(each) for each in (q_weight, k_weight)]
    return grad_qkv, *grads


def _keep(ctx, inputs, output):
    qkv, cos, sin, q_weight, k_weight, _, _, ctx.eps, ctx.offset, ctx.rounds_first, copies = inputs
    if not copies:
        raise RuntimeError("Without a copy of the values nothing is differentiated.")
    ctx.dtype = qkv.dtype
    ctx.save_for_backward(None if q_weight is None else qkv, cos, sin, q_weight, k_weight)


def _differentiate(ctx, grad_q, grad_k, grad_v):
    qkv, cos, sin, q_weight, k_weight = ctx.saved_tensors
    grad_qkv, grad_q_weight, grad_k_weight = _rotate_backward(
        grad_q, grad_k, grad_v, qkv, cos, sin, q_weight, k_weight, ctx.dtype, ctx.eps, ctx.offset, ctx.rounds_first
    )
    norms = q_weight is not None
    weights = (grad_q_weight, grad_k_weight) if norms else (None, None)
    return grad_qkv, None, None, *weights, None, None, None, None, None, None


_rotate.register_autograd(_differentiate, setup_context=_keep)


# --- what models and other kernels call


def values_of(qkv: torch.Tensor, num_heads: int, head_dim: int) -> torch.Tensor:
    """The values in `qkv`, (B, K, T, D), as a view."""
    num_kv_heads = kv_heads_of(qkv, num_heads, head_dim)
    start = (num_heads + num_kv_heads) * head_dim
    values = qkv.narrow(-1, start, qkv.shape[-1] - start)
    return values.view(*qkv.shape[:-1], num_kv_heads, head_dim).transpose(1, 2)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(-x[D/2:], x[:D/2]) along the last dimension."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


def reference(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    head_dim: int,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    rounds_first: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`rotate` in plain torch, step by step as the attention of Transformers' Llama, Qwen3 and Gemma3."""
    num_kv_heads = kv_heads_of(qkv, num_heads, head_dim)
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, head_dim))
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=2)
    if q_weight is not None and k_weight is not None:
        q = rms_norm.reference(q, q_weight, eps, offset, rounds_first)
        k = rms_norm.reference(k, k_weight, eps, offset, rounds_first)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin, v.transpose(1, 2)


def rotate(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    head_dim: int,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    rounds_first: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, normalized per head and rotated.

    Args:
        qkv: (B, T, (N + 2 K) * D): queries, keys and values side by side; any strides.
        cos: (B or 1, T, D), and no gradient goes to it.
        sin: The same.
        num_heads: N; what is left of the columns is keys and values.
        head_dim: D, an even number; all of it is rotated.
        q_weight: (D), the weight of the queries' norm; `None` where there is no norm.
        k_weight: The same for the keys, of the dtype of `q_weight`; both or neither are given.
        eps: Added to the mean of the squares, as in `rms_norm`.
        offset: Added to the weights, as in `rms_norm`.
        rounds_first: Whether the norm rounds before its weight, as in `rms_norm`.

    Returns:
        q (B, N, T, D), k and v (B, K, T, D), each (B, T, heads, D) in memory. v can be a view of `qkv`.

    Raises:
        ValueError: cos and sin have fewer columns than a head.
    """
    _check_angles(cos, head_dim)
    if not device.in_triton(qkv):
        return reference(qkv, cos, sin, num_heads, head_dim, q_weight, k_weight, eps, offset, rounds_first)
    watched = not device.launches(qkv, cos, sin, q_weight, k_weight)
    copies = (
        watched
        and torch.is_grad_enabled()
        and any(each is not None and each.requires_grad for each in (qkv, q_weight, k_weight))
    )
    run = _rotate if watched else launch
    q, k, v = run(qkv, cos, sin, q_weight, k_weight, num_heads, head_dim, eps, offset, rounds_first, copies)
    return q, k, v if copies else values_of(qkv, num_heads, head_dim)


def rotate_into(
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    head_dim: int,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    rounds_first: bool = True,
) -> torch.Tensor:
    """`rotate`, with the keys and values written into a cache instead of new tensors. Not differentiable.

    Args:
        keys: (B, K, L, D), of the dtype that k would have, written at [:, :, position : position + T].
        values: The same, of that of `qkv`.
        position: One integer, on the device; it is not read on the host. What would lie beyond L is not written, and
            its query is NaN: without waiting for the device it cannot be refused.
        qkv: As the other arguments, see `rotate`.
        cos: See `rotate`.
        sin: See `rotate`.
        num_heads: See `rotate`.
        head_dim: See `rotate`.
        q_weight: See `rotate`.
        k_weight: See `rotate`.
        eps: See `rotate`.
        offset: See `rotate`.
        rounds_first: See `rotate`.

    Returns:
        q (B, N, T, D).

    Raises:
        ValueError: cos and sin have fewer columns than a head.
    """
    _check_angles(cos, head_dim)
    if not device.in_triton(qkv):
        q, k, v = reference(qkv, cos, sin, num_heads, head_dim, q_weight, k_weight, eps, offset, rounds_first)
        at = torch.arange(k.shape[2], device=k.device) + position
        keys.index_copy_(2, at, k)
        values.index_copy_(2, at, v)
        return q
    arguments = (qkv, cos, sin, q_weight, k_weight, num_heads, head_dim, eps, offset, rounds_first)
    if not device.launches(qkv, cos, sin, q_weight, k_weight, keys, values, position):
        written: torch.Tensor = _rotate_into(*arguments, keys, values, position)
        return written
    if not keys.is_inference():
        # The operator does so too: autograd notices if it kept the cache as it was before.
        torch.autograd.graph.increment_version((keys, values))
    return launch_into(*arguments, keys, values, position)


def _check_angles(cos: torch.Tensor, head_dim: int) -> None:
    if cos.shape[-1] != head_dim:
        raise ValueError(f"The whole head is rotated: cos and sin have {head_dim} columns, and not {cos.shape[-1]}.")
