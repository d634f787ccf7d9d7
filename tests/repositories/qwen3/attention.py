"""Attention kernels: the arithmetic of Qwen3's attention in Transformers 5.22, stateless, on the original's parameters.

Shapes: hidden_states (B, T, H); cos and sin (B, T, D) with D the head_dim.
"""

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb, eager_attention_forward


def attend(module, hidden_states, position_embeddings, attention_mask, cache, **kwargs):
    shape = (*hidden_states.shape[:-1], -1, module.head_dim)
    query = module.q_norm(module.q_proj(hidden_states).view(shape)).transpose(1, 2)
    key = module.k_norm(module.k_proj(hidden_states).view(shape)).transpose(1, 2)
    value = module.v_proj(hidden_states).view(shape).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention_forward)
    dropout = module.attention_dropout if module.training else 0.0
    out, weights = attention(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=module.scaling,
        sliding_window=module.sliding_window,
        **kwargs,
    )
    return module.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class OlderAttention(nn.Module):
    """Written when the cache was called `past_key_values`."""

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **kwargs):
        return attend(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)


class NewerAttention(nn.Module):
    """Written when the cache was called `cache`."""

    def forward(self, hidden_states, position_embeddings, attention_mask, cache=None, **kwargs):
        return attend(self, hidden_states, position_embeddings, attention_mask, cache, **kwargs)


class OtherOrderAttention(nn.Module):
    """Names what the original names, in another order."""

    def forward(
        self, past_key_values=None, attention_mask=None, position_embeddings=None, hidden_states=None, **kwargs
    ):
        return attend(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)


class CacheInKwargs(nn.Module):
    """Would get the cache among `kwargs` only, under whatever name the installed Transformers has for it."""

    def forward(self, hidden_states, position_embeddings, attention_mask, **kwargs):
        cache = kwargs.pop("past_key_values", None)
        return attend(self, hidden_states, position_embeddings, attention_mask, cache, **kwargs)


class CacheNotTaken(nn.Module):
    """Takes no cache at all."""

    def forward(self, hidden_states, position_embeddings, attention_mask):
        return attend(self, hidden_states, position_embeddings, attention_mask, None)


class layers:
    OlderAttention = OlderAttention
    NewerAttention = NewerAttention
    OtherOrderAttention = OtherOrderAttention
    CacheInKwargs = CacheInKwargs
    CacheNotTaken = CacheNotTaken
