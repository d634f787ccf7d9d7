"""Attention with q, k and v in one matrix product, for Llama, Qwen2 (with biases), Mistral and Qwen3 (with norms).

Shapes: hidden_states (B, T, H); qkv_proj ((N + 2K) * D, H) for N heads, K key heads of dim D; o_proj (H, N * D).
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

KEPT = {"o_proj.weight": "o_proj.weight", "o_proj.bias": "o_proj.bias"}
MERGED = {
    f"qkv_proj.{name}": [f"q_proj.{name}", f"k_proj.{name}", f"v_proj.{name}"] for name in ("weight", "bias")
}


class MergedAttentionLayout(nn.Module):
    """Takes what the original's `__init__` takes; what only the forward reads is left to the original."""

    packing = {**MERGED, **KEPT}

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.sizes = [n * head_dim for n in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
        out_bias = bool(getattr(config, "attention_bias", False))
        bias = config.model_type == "qwen2" or out_bias
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=bias)
        self.o_proj = nn.Linear(self.sizes[0], config.hidden_size, bias=out_bias)


class MergedAttention(nn.Module):
    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = F.linear(hidden_states, self.qkv_proj.weight, self.qkv_proj.bias).split(self.sizes, -1)
        query, key, value = query.reshape(shape), key.reshape(shape), value.reshape(shape).transpose(1, 2)
        if hasattr(self, "q_norm"):
            query, key = norm(query, self.q_norm, self.norm_eps), norm(key, self.k_norm, self.norm_eps)
        query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        window = {"sliding_window": self.sliding_window} if hasattr(self, "sliding_window") else {}
        if self.config.model_type == "mistral":
            window = {"sliding_window": getattr(self.config, "sliding_window", None)}
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **window, **kwargs
        )
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


def norm(x, scale, eps):
    x_fp32 = x.to(torch.float32)
    normalized = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    return scale * normalized.to(x.dtype)


class NormedAttentionLayout(MergedAttentionLayout):
    """A bare parameter where the original has a submodule: `q_norm` for `q_norm.weight`."""

    packing = {**MERGED, **KEPT, "q_norm": "q_norm.weight", "k_norm": "k_norm.weight"}

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.norm_eps = config.rms_norm_eps
        self.q_norm = nn.Parameter(torch.ones(config.head_dim))
        self.k_norm = nn.Parameter(torch.ones(config.head_dim))


class NormedAttention(MergedAttention):
    pass


class layers:
    MergedAttention = MergedAttention
    NormedAttention = NormedAttention
