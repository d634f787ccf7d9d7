"""Gemma 3: norms whose weight has an offset of 1, before and behind the MLP.

Shapes: x (..., H), scale (H), gate_up_proj (2I, H), down_proj (H, I).
"""

import torch
from torch import nn
from torch.nn import functional as F


def rms_norm(x, weight, eps):
    x_fp32 = x.float()
    normalized = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    return (normalized * (1.0 + weight.float())).type_as(x)


def gated(x, gate_up, down, act):
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(act(gate.contiguous()) * up, down)


MLP = {
    "gate_up_proj": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "down_proj": "mlp.down_proj.weight",
}


def add_mlp(layout, mlp):
    layout.act_fn = mlp.act_fn
    layout.gate_up_proj = nn.Parameter(torch.empty(2 * mlp.intermediate_size, mlp.hidden_size))
    layout.down_proj = nn.Parameter(torch.empty(mlp.hidden_size, mlp.intermediate_size))


class PreNormMLPLayout(nn.Module):
    packing = {"scale": "norm.weight", **MLP}

    def __init__(self, norm, mlp):
        super().__init__()
        self.eps = norm.eps
        self.scale = nn.Parameter(torch.zeros(norm.weight.shape[0]))
        add_mlp(self, mlp)


class PreNormMLP(nn.Module):
    def forward(self, x):
        return gated(rms_norm(x, self.scale, self.eps), self.gate_up_proj, self.down_proj, self.act_fn)


class MLPPostNormLayout(nn.Module):
    packing = {"scale": "norm.weight", **MLP}

    def __init__(self, mlp, norm):
        super().__init__()
        self.eps = norm.eps
        self.scale = nn.Parameter(torch.zeros(norm.weight.shape[0]))
        add_mlp(self, mlp)


class MLPPostNorm(nn.Module):
    def forward(self, x):
        return rms_norm(gated(x, self.gate_up_proj, self.down_proj, self.act_fn), self.scale, self.eps)


class SandwichLayout(nn.Module):
    """Norm, MLP and norm; the kernel stands where the MLP stood, with both scales in one parameter."""

    host = "mlp"
    packing = {"scales": {"sources": ["before.weight", "after.weight"], "operations": [["stack", 0]]}, **MLP}

    def __init__(self, before, mlp, after):
        super().__init__()
        self.before_eps, self.after_eps = before.eps, after.eps
        self.scales = nn.Parameter(torch.zeros(2, before.weight.shape[0]))
        add_mlp(self, mlp)


class Sandwich(nn.Module):
    def forward(self, x):
        x = rms_norm(x, self.scales[0], self.before_eps)
        x = gated(x, self.gate_up_proj, self.down_proj, self.act_fn)
        return rms_norm(x, self.scales[1], self.after_eps)


class OffsetNormLayout(nn.Module):
    packing = {"scale": "weight"}

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.zeros(dim))


class OffsetNorm(nn.Module):
    def forward(self, x):
        return rms_norm(x, self.scale, self.eps)


class layers:
    PreNormMLP = PreNormMLP
    MLPPostNorm = MLPPostNorm
    Sandwich = Sandwich
    OffsetNorm = OffsetNorm
