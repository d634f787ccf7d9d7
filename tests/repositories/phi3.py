"""RMS norm and MLP of Phi-3, whose checkpoint has gate and up merged: split here, or taken as it is.

Shapes: x (..., H), gate and up (I, H), gate_up (2I, H), down (H, I).
"""

import torch
from torch import nn
from torch.nn import functional as F


def rms_norm(x, scale, eps):
    x_fp32 = x.to(torch.float32)
    normalized = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    return scale * normalized.to(x.dtype)


class SplitMLPLayout(nn.Module):
    packing = {
        "scale": "norm.weight",
        "gate": {"sources": "mlp.gate_up_proj.weight", "operations": [["chunk", 0, 2, 0]]},
        "up": {"sources": "mlp.gate_up_proj.weight", "operations": [["chunk", 1, 2, 0]]},
        "down": "mlp.down_proj.weight",
    }

    def __init__(self, norm, mlp):
        super().__init__()
        hidden, inner = mlp.down_proj.weight.shape
        self.variance_epsilon, self.activation_fn = norm.variance_epsilon, mlp.activation_fn
        self.scale = nn.Parameter(torch.ones(hidden))
        self.gate = nn.Parameter(torch.empty(inner, hidden))
        self.up = nn.Parameter(torch.empty(inner, hidden))
        self.down = nn.Parameter(torch.empty(hidden, inner))


class SplitMLP(nn.Module):
    def forward(self, hidden_states):
        normalized = rms_norm(hidden_states, self.scale, self.variance_epsilon)
        gate, up = F.linear(normalized, self.gate), F.linear(normalized, self.up)
        return F.linear(up * self.activation_fn(gate), self.down)


class RenamedMLPLayout(nn.Module):
    """For the MLP alone: its first parameter under another name, which is all that differs."""

    packing = {"w12": "gate_up_proj.weight", "w3": "down_proj.weight"}

    def __init__(self, config):
        super().__init__()
        self.w12 = nn.Parameter(torch.empty(2 * config.intermediate_size, config.hidden_size))
        self.w3 = nn.Parameter(torch.empty(config.hidden_size, config.intermediate_size))


class RenamedMLP(nn.Module):
    def forward(self, hidden_states):
        gate, up = F.linear(hidden_states, self.w12).chunk(2, dim=-1)
        return F.linear(up * self.activation_fn(gate), self.w3)


class layers:
    SplitMLP = SplitMLP
    RenamedMLP = RenamedMLP
