"""Attention with q, k and v in one matrix product, for Llama, Qwen2 (with biases), Mistral and Qwen3 (with norms).

Shapes: hidden_states (B, T, H); qkv_proj ((N + 2K) * D, H) for N heads, K key heads of dim D; o_proj (H, N * D).
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

KEPT = {"o_proj.weight": "o_proj.weight", "o_proj.bias": "o_proj.bias"}
MERGED = {f"qkv_proj.{name}": [f"q_proj.{name}", f"k_proj.{name}", f"v_proj.{name}"] for name in ("weight", "bias")}


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


def attend(module, hidden_states, query, key, value, position_embeddings, attention_mask, past_key_values, kwargs):
    """From the projections (B, T, heads, D) to the output: rotary embedding, cache, attention, output projection."""
    query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
    value = value.transpose(1, 2)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    window = {}
    if module.config.model_type != "llama":
        of = module if hasattr(module, "sliding_window") else module.config
        window = {"sliding_window": getattr(of, "sliding_window", None)}
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention_forward)
    dropout = module.attention_dropout if module.training else 0.0
    out, weights = interface(
        module, query, key, value, attention_mask, dropout=dropout, scaling=module.scaling, **window, **kwargs
    )
    return module.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


def project(module, hidden_states):
    shape = (*hidden_states.shape[:-1], -1, module.head_dim)
    merged = F.linear(hidden_states, module.qkv_proj.weight, module.qkv_proj.bias)
    return (part.reshape(shape) for part in merged.split(module.sizes, -1))


class MergedAttention(nn.Module):
    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        query, key, value = project(self, hidden_states)
        return attend(
            self, hidden_states, query, key, value, position_embeddings, attention_mask, past_key_values, kwargs
        )


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


class NormedAttention(nn.Module):
    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        query, key, value = project(self, hidden_states)
        query, key = norm(query, self.q_norm, self.norm_eps), norm(key, self.k_norm, self.norm_eps)
        return attend(
            self, hidden_states, query, key, value, position_embeddings, attention_mask, past_key_values, kwargs
        )


class layers:
    MergedAttention = MergedAttention
    NormedAttention = NormedAttention
