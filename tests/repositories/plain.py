"""A norm and an MLP of a model that is not of Transformers, in one kernel; and a merged linear for the MLP alone.

Shapes: x (..., H), w12 (2I, H), w3 (H, I).
"""

import torch
from torch import nn
from torch.nn import functional as F


class FastBlockLayout(nn.Module):
    packing = {"scale": "norm.weight", "w12": ["mlp.w1.weight", "mlp.w2.weight"], "w3": "mlp.w3.weight"}

    def __init__(self, norm, mlp):
        super().__init__()
        inner, hidden = mlp.w1.weight.shape
        self.eps = norm.eps
        self.scale = nn.Parameter(torch.ones(hidden))
        self.w12 = nn.Parameter(torch.empty(2 * inner, hidden))
        self.w3 = nn.Parameter(torch.empty(hidden, inner))


class FastBlock(nn.Module):
    def forward(self, x):
        x = F.rms_norm(x, (x.shape[-1],), self.scale, self.eps)
        gate, up = F.linear(x, self.w12).chunk(2, dim=-1)
        return F.linear(F.silu(gate.contiguous()) * up, self.w3)


class FastMLPLayout(nn.Module):
    packing = {"w12": ["w1.weight", "w2.weight"], "w3": "w3.weight"}

    def __init__(self, hidden, inner):
        super().__init__()
        self.w12 = nn.Parameter(torch.empty(2 * inner, hidden))
        self.w3 = nn.Parameter(torch.empty(hidden, inner))


class FastMLP(nn.Module):
    def forward(self, x):
        gate, up = F.linear(x, self.w12).chunk(2, dim=-1)
        return F.linear(F.silu(gate.contiguous()) * up, self.w3)


class layers:
    FastBlock = FastBlock
    FastMLP = FastMLP
