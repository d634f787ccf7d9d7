"""Attention kernels for Llama: one that is right, and others with one fault each, hard to see in a plain prompt.

Shapes: hidden_states (B, T, H); cos and sin (B or 1, T, D); keys and values (B, K, S, D).
"""

from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

FAULTS = {}


class RightAttention(nn.Module):
    """Each step is a function, so that another kernel can have one of its own."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        return attend(self, hidden_states, position_embeddings, attention_mask, past_key_values)


def heads(module, x):
    return x.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)


def embedded(module, query, key, position_embeddings):
    return apply_rotary_pos_emb(query, key, *position_embeddings)


def stored(module, key, value, cache):
    return (key, value) if cache is None else cache.update(key, value, module.layer_idx)


def repeated(key, times):
    return key.repeat_interleave(times, 1)


def attended(module, query, key, value, mask):
    is_causal = mask is None and query.shape[2] > 1
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=module.scaling)


def attend(module, x, positions, mask, cache, embed=embedded, store=stored, repeat=repeated, attention=attended):
    query, key, value = (heads(module, each(x)) for each in (module.q_proj, module.k_proj, module.v_proj))
    query, key = embed(module, query, key, positions)
    key, value = store(module, key, value, cache)
    times = query.shape[1] // key.shape[1]
    out = attention(module, query, repeat(key, times), repeat(value, times), mask)
    return module.o_proj(out.transpose(1, 2).flatten(2)), None


def fault():
    """Makes a kernel with other steps, under the name of the function that is decorated; it gives the steps."""

    def add(function):
        def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
            return attend(self, hidden_states, position_embeddings, attention_mask, past_key_values, **function())

        name = function.__name__
        FAULTS[name] = type(name.title().replace("_", ""), (nn.Module,), {"forward": forward, "__module__": __name__})
        return function

    return add


@fault()
def rotary_table_of_the_first_call():
    def embed(module, query, key, position_embeddings):
        if not hasattr(module, "table") or module.table[0].shape[1] < query.shape[2]:
            module.table = tuple(each[:1].detach() for each in position_embeddings)
        table = [each[:, : query.shape[2]].to(query.dtype) for each in module.table]
        return apply_rotary_pos_emb(query, key, *table)

    return {"embed": embed}


@fault()
def positions_of_the_first_in_the_batch():
    def embed(module, query, key, position_embeddings):
        return apply_rotary_pos_emb(query, key, *(each[:1] for each in position_embeddings))

    return {"embed": embed}


@fault()
def mask_ignored():
    def attention(module, query, key, value, mask):
        tokens, length = query.shape[2], key.shape[2]
        causal = query.new_ones(tokens, length, dtype=bool).tril(length - tokens)
        return F.scaled_dot_product_attention(query, key, value, causal, scale=module.scaling)

    return {"attention": attention}


@fault()
def mask_of_the_first_in_the_batch():
    def attention(module, query, key, value, mask):
        return attended(module, query, key, value, None if mask is None else mask[:1])

    return {"attention": attention}


@fault()
def causal_from_the_first_key():
    """As FlashAttention's first version: with fewer queries than keys, the mask starts at the wrong end."""

    def attention(module, query, key, value, mask):
        is_causal = query.shape[2] > 1 and (mask is None or query.shape[2] != key.shape[2])
        return F.scaled_dot_product_attention(
            query, key, value, None if is_causal else mask, is_causal=is_causal, scale=module.scaling
        )

    return {"attention": attention}


@fault()
def keys_stored_before_they_are_embedded():
    def embed(module, query, key, position_embeddings):
        module.plain = key
        return embedded(module, query, key, position_embeddings)

    def store(module, key, value, cache):
        if cache is None:
            return key, value
        before = cache.update(module.plain, value, module.layer_idx)
        return (key, value) if before[0].shape == key.shape else before

    return {"embed": embed, "store": store}


@fault()
def cache_not_written():
    def store(module, key, value, cache):
        import copy

        return stored(module, key, value, copy.deepcopy(cache))

    return {"store": store}


@fault()
def heads_in_turns():
    return {"repeat": lambda key, times: key.repeat(1, times, 1, 1)}


@fault()
def keys_past_128_left_out():
    def attention(module, query, key, value, mask):
        if key.shape[2] <= 128:
            return attended(module, query, key, value, mask)
        causal = query.new_ones(query.shape[2], key.shape[2], dtype=bool).tril(key.shape[2] - query.shape[2])
        causal[:, 128:] = False
        return F.scaled_dot_product_attention(query, key, value, causal, scale=module.scaling)

    return {"attention": attention}


@fault()
def scores_in_bfloat16():
    def attention(module, query, key, value, mask):
        ahead = query.new_ones(query.shape[2], key.shape[2], dtype=bool).tril(key.shape[2] - query.shape[2])
        scores = (query @ key.transpose(-1, -2) * module.scaling).bfloat16().to(query.dtype)
        return scores.masked_fill(~(ahead if mask is None else mask), -1e4).softmax(-1) @ value

    return {"attention": attention}
