"""BERT and ViT: layer norms with renamed parameters, and the two halves of a feed-forward in one kernel.

Shapes: x (..., H), gamma and beta (H), up (I, H), down (H, I).
"""

import torch
from torch import nn
from torch.nn import functional as F


class AffineNormLayout(nn.Module):
    packing = {"gamma": "weight", "beta": "bias"}

    def __init__(self, normalized_shape, eps=1e-5):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(normalized_shape)), nn.Parameter(torch.zeros(normalized_shape))


class AffineNorm(nn.Module):
    def forward(self, input):
        return F.layer_norm(input, self.normalized_shape, self.gamma, self.beta, self.eps)


class BertFeedForwardLayout(nn.Module):
    """The output module, with its residual, is the host: what flows into it is absorbed."""

    host = "output"
    packing = {
        "up.weight": "intermediate.dense.weight",
        "up.bias": "intermediate.dense.bias",
        "down.weight": "output.dense.weight",
        "down.bias": "output.dense.bias",
        "affine": {"sources": ["output.LayerNorm.weight", "output.LayerNorm.bias"], "operations": [["stack", 0]]},
    }

    def __init__(self, intermediate, output):
        super().__init__()
        hidden, inner = output.dense.weight.shape
        self.act, self.eps, self.rate = intermediate.intermediate_act_fn, output.LayerNorm.eps, output.dropout.p
        self.up, self.down = nn.Linear(hidden, inner), nn.Linear(inner, hidden)
        self.affine = nn.Parameter(torch.empty(2, hidden))


class BertFeedForward(nn.Module):
    def forward(self, hidden_states, input_tensor):
        out = F.dropout(self.down(self.act(self.up(hidden_states))), self.rate, self.training)
        return F.layer_norm(out + input_tensor, (out.shape[-1],), *self.affine, self.eps)


class VitFeedForwardLayout(nn.Module):
    packing = {
        "gamma": "norm.weight",
        "beta": "norm.bias",
        "up.weight": "mlp.fc1.weight",
        "up.bias": "mlp.fc1.bias",
        "down": {"sources": "mlp.fc2.weight", "operations": [["transpose", 0, 1]]},
        "down_bias": "mlp.fc2.bias",
    }

    def __init__(self, norm, mlp):
        super().__init__()
        inner, hidden = mlp.fc1.weight.shape
        self.eps, self.act = norm.eps, mlp.activation_fn
        self.gamma, self.beta = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.zeros(hidden))
        self.up = nn.Linear(hidden, inner)
        self.down = nn.Parameter(torch.empty(inner, hidden))
        self.down_bias = nn.Parameter(torch.zeros(hidden))


class VitFeedForward(nn.Module):
    def forward(self, input):
        normalized = F.layer_norm(input, (input.shape[-1],), self.gamma, self.beta, self.eps)
        return F.linear(self.act(self.up(normalized)), self.down.t(), self.down_bias)


class layers:
    AffineNorm = AffineNorm
    BertFeedForward = BertFeedForward
    VitFeedForward = VitFeedForward
