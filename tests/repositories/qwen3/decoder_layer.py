"""Kernels for a whole decoder layer of Qwen3.

Shapes: hidden_states (B, T, H); cos and sin (B, T, D), D the head_dim; N heads, K of them for keys and values.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb


class WholeLayerLayout(nn.Module):
    """Keeps the parts of the layer as they are, and takes them from the layer itself."""

    @classmethod
    def from_module(cls, module):
        made = cls()
        made.attention = module.self_attn
        made.mlp = module.mlp
        made.norm_1 = module.input_layernorm
        made.norm_2 = module.post_attention_layernorm
        return made


class WholeLayer(nn.Module):
    """Written when the cache was called `past_key_values`."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=False,
        position_embeddings=None,
        **kwargs,
    ):
        attended, _ = self.attention(
            self.norm_1(hidden_states), position_embeddings, attention_mask, past_key_values, **kwargs
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.norm_2(hidden_states))


class NewerLayerLayout(WholeLayerLayout):
    """As `WholeLayerLayout`."""


class NewerLayer(nn.Module):
    """Written when the cache was called `cache`."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        cache=None,
        use_cache=False,
        position_embeddings=None,
        **kwargs,
    ):
        attended, _ = self.attention(self.norm_1(hidden_states), position_embeddings, attention_mask, cache, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.norm_2(hidden_states))


class PackedLayerLayout(nn.Module):
    """Made with the arguments of the layer's `__init__`: query, key and value are one matrix, gate and up another."""

    packing = {
        "norm_1": "input_layernorm.weight",
        "norm_2": "post_attention_layernorm.weight",
        "norm_q": "self_attn.q_norm.weight",
        "norm_k": "self_attn.k_norm.weight",
        "qkv": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
        "out": "self_attn.o_proj.weight",
        "gate_up": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        "down": "mlp.down_proj.weight",
    }

    def __init__(self, config, layer_idx):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        hidden, intermediate = config.hidden_size, config.intermediate_size
        shapes = {
            "norm_1": (hidden,),
            "norm_2": (hidden,),
            "norm_q": (self.head_dim,),
            "norm_k": (self.head_dim,),
            "qkv": ((self.num_heads + 2 * self.num_kv_heads) * self.head_dim, hidden),
            "out": (hidden, self.num_heads * self.head_dim),
            "gate_up": (2 * intermediate, hidden),
            "down": (hidden, intermediate),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))


def rms_norm(x, weight, eps):
    x_fp32 = x.float()
    return weight * (x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class PackedLayer(nn.Module):
    """Written when the cache was called `past_key_values`."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=False,
        position_embeddings=None,
        **kwargs,
    ):
        B_T = hidden_states.shape[:-1]
        normalized = rms_norm(hidden_states, self.norm_1, self.eps)
        heads = F.linear(normalized, self.qkv).view(*B_T, -1, self.head_dim)
        query, key, value = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=-2)
        query = rms_norm(query, self.norm_q, self.eps).transpose(1, 2)
        key = rms_norm(key, self.norm_k, self.eps).transpose(1, 2)
        value = value.transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        is_causal = attention_mask is None and query.shape[2] > 1
        attended = F.scaled_dot_product_attention(
            query, key, value, attention_mask, is_causal=is_causal, scale=self.head_dim**-0.5, enable_gqa=True
        )
        hidden_states = hidden_states + F.linear(attended.transpose(1, 2).reshape(*B_T, -1), self.out)
        gate, up = F.linear(rms_norm(hidden_states, self.norm_2, self.eps), self.gate_up).chunk(2, dim=-1)
        return hidden_states + F.linear(F.silu(gate) * up, self.down)


class StatelessLayer(nn.Module):
    """Runs on the layer's own modules, whatever kernels they are by then; written for `past_key_values`."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=False,
        position_embeddings=None,
        **kwargs,
    ):
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings, attention_mask, past_key_values, **kwargs
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class layers:
    StatelessLayer = StatelessLayer
    WholeLayer = WholeLayer
    NewerLayer = NewerLayer
    PackedLayer = PackedLayer
