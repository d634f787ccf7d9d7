"""Kernels for a whole decoder layer of Qwen3, written when the cache was called `past_key_values`.

Shapes: hidden_states (B, T, H); cos and sin (B, T, D) with D the head_dim; N heads, K of them for key and value.
"""

import torch
from attention import attend
from torch import nn


class PackedLayerLayout(nn.Module):
    """Made with the arguments of the layer's `__init__`; query, key and value are one matrix, gate and up another."""

    packing = {  # noqa: RUF012
        "norm_1": "input_layernorm.weight",
        "norm_2": "post_attention_layernorm.weight",
        "qkv": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
        "norm_q": "self_attn.q_norm.weight",
        "norm_k": "self_attn.k_norm.weight",
        "out": "self_attn.o_proj.weight",
        "gate_up": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        "down": "mlp.down_proj.weight",
    }
