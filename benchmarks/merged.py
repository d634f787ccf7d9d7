"""The kernels that the benchmark loads models with: q, k and v in one matrix, and gate and up in one, in plain torch.

Shapes: hidden_states (B, T, H), N heads and K key heads of dim D, qkv_proj ((N + 2K) * D, H), o_proj (H, N * D),
gate_up_proj (2I, H), down_proj (H, I).
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb


class MergedAttentionLayout(nn.Module):
    """One matrix for query, key and value, and the norms of the heads as they are."""

    packing = {  # noqa: RUF012
        "qkv_proj.weight": ["q_proj.weight", "k_proj.weight", "v_proj.weight"],
        "o_proj.weight": "o_proj.weight",
        "q_norm": "q_norm.weight",
        "k_norm": "k_norm.weight",
    }

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.norm_eps = config.rms_norm_eps
        self.sizes = [n * config.head_dim for n in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)
        self.o_proj = nn.Linear(self.sizes[0], config.hidden_size, bias=False)
        self.q_norm = nn.Parameter(torch.ones(config.head_dim))
        self.k_norm = nn.Parameter(torch.ones(config.head_dim))


def _norm(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    x_fp32 = x.float()
    return scale * (x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class MergedAttention(nn.Module):
    """Qwen3's attention with one matrix product before it."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """As the original's, without attention weights."""
        B_T = hidden_states.shape[:-1]
        query, key, value = (
            part.view(*B_T, -1, self.head_dim)
            for part in F.linear(hidden_states, self.qkv_proj.weight).split(self.sizes, -1)
        )
        query = _norm(query, self.q_norm, self.norm_eps).transpose(1, 2)
        key = _norm(key, self.k_norm, self.norm_eps).transpose(1, 2)
        value = value.transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        causal = attention_mask is None and query.shape[2] > 1
        attended = F.scaled_dot_product_attention(
            query, key, value, attention_mask, is_causal=causal, scale=self.scaling, enable_gqa=True
        )
        return F.linear(attended.transpose(1, 2).reshape(*B_T, -1), self.o_proj.weight), None


class MergedMLPLayout(nn.Module):
    """One matrix for gate and up."""

    packing = {  # noqa: RUF012
        "gate_up_proj.weight": ["gate_proj.weight", "up_proj.weight"],
        "down_proj.weight": "down_proj.weight",
    }

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class MergedMLP(nn.Module):
    """The gated MLP with one matrix product for gate and up."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the original's."""
        gate, up = F.linear(x, self.gate_up_proj.weight).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate.contiguous()) * up, self.down_proj.weight)


class layers:
    """What stands after the colon in `merged.py:MergedMLP`."""

    MergedAttention = MergedAttention
    MergedMLP = MergedMLP
