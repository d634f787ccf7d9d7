"""Experts of Qwen3-MoE and Mixtral on tensors laid out anew.

Shapes: gate_up_proj (E, 2I, H) and down_proj (E, H, I) in the model; w13 (E, H, 2I) and w2 (E, I, H) transposed;
halves (2, E, I, H) restacked. hidden_states (T, H), top_k_index and top_k_weights (T, K).
"""

import torch
from torch import nn
from torch.nn import functional as F


def run_experts(hidden_states, top_k_index, top_k_weights, num_experts, one):
    """Each expert on its tokens, in the order of Transformers' eager loop."""
    out = torch.zeros_like(hidden_states)
    for index in range(num_experts):
        place, token = torch.where((top_k_index == index).transpose(0, 1))
        if token.numel():
            weighted = one(index, hidden_states[token]) * top_k_weights[token, place, None]
            out.index_add_(0, token, weighted.to(out.dtype))
    return out


def sizes_of(config):
    num_experts = getattr(config, "num_local_experts", None) or config.num_experts
    return num_experts, config.hidden_size, getattr(config, "moe_intermediate_size", config.intermediate_size)


class TransposedExpertsLayout(nn.Module):
    packing = {
        "w13": {"sources": "gate_up_proj", "operations": [["transpose", 1, 2]]},
        "w2": {"sources": "down_proj", "operations": [["transpose", 1, 2]]},
    }

    def __init__(self, config):
        super().__init__()
        num_experts, hidden, inner = sizes_of(config)
        self.w13 = nn.Parameter(torch.empty(num_experts, hidden, 2 * inner))
        self.w2 = nn.Parameter(torch.empty(num_experts, inner, hidden))


class TransposedExperts(nn.Module):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        def one(index, x):
            gate, up = (x @ self.w13[index]).chunk(2, dim=-1)
            return (self.act_fn(gate) * up) @ self.w2[index]

        return run_experts(hidden_states, top_k_index, top_k_weights, self.num_experts, one)


class RestackedExpertsLayout(nn.Module):
    packing = {
        "halves": {
            "sources": "gate_up_proj",
            "operations": [["reshape", [4, 2, -1, 32]], ["permute", [1, 0, 2, 3]]],
        },
        "down": "down_proj",
    }

    def __init__(self, config):
        super().__init__()
        num_experts, hidden, inner = sizes_of(config)
        self.halves = nn.Parameter(torch.empty(2, num_experts, inner, hidden))
        self.down = nn.Parameter(torch.empty(num_experts, hidden, inner))


class RestackedExperts(nn.Module):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        def one(index, x):
            gate, up = F.linear(x, self.halves[0, index]), F.linear(x, self.halves[1, index])
            return F.linear(self.act_fn(gate) * up, self.down[index])

        return run_experts(hidden_states, top_k_index, top_k_weights, self.num_experts, one)


class layers:
    TransposedExperts = TransposedExperts
    RestackedExperts = RestackedExperts
