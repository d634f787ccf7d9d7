"""RMS norm and the gated MLP behind it in one module: h = rms_norm(x); y = down(act(gate(h)) * up(h)).

gate and up are one matrix product. Shapes: x and y (..., H), scale (H), gate_up_proj (2I, H), down_proj (H, I).
"""

import torch
from torch import nn

from .rms_norm import rms_norm

try:
    from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming
except ImportError:  # Transformers need not be there: kernelgraft reads `packing`
    WeightConverter = None


def _rules():
    """The same for Transformers, whose rules hold over full names: the fused module stands where the norm stood.

    Without `.weight` at the end they carry the biases too, where a model has them.
    """
    if WeightConverter is None:
        return []
    host = "post_attention_layernorm"
    return [
        WeightRenaming(f"{host}.weight", f"{host}.scale"),
        WeightRenaming("mlp.down_proj", f"{host}.down_proj"),
        WeightConverter(["mlp.gate_proj", "mlp.up_proj"], f"{host}.gate_up_proj", [Concatenate(dim=0)]),
    ]


class RMSNormMLPLayout(nn.Module):
    """The parameters of `RMSNormMLP`: made from the two modules that it takes over."""

    packing = {  # noqa: RUF012
        "scale": "norm.weight",
        "gate_up_proj.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        "gate_up_proj.bias": ["mlp.gate_proj.bias", "mlp.up_proj.bias"],
        "down_proj.weight": "mlp.down_proj.weight",
        "down_proj.bias": "mlp.down_proj.bias",
    }
    conversion_mapping = _rules()

    def __init__(self, norm, mlp):
        super().__init__()
        self.variance_epsilon = norm.variance_epsilon
        self.scale = nn.Parameter(torch.empty_like(norm.weight))
        self.gate_up_proj = _linear(mlp.gate_proj, mlp.gate_proj.out_features + mlp.up_proj.out_features)
        self.down_proj = _linear(mlp.down_proj, mlp.down_proj.out_features)
        self.act_fn = mlp.act_fn


def _linear(like, out_features):
    weight = like.weight
    return nn.Linear(
        like.in_features, out_features, bias=like.bias is not None, device=weight.device, dtype=weight.dtype
    )


class RMSNormMLP(nn.Module):
    """RMS norm, then the gated MLP."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normalized = rms_norm(hidden_states, self.scale, self.variance_epsilon)
        gate, up = self.gate_up_proj(normalized).chunk(2, dim=-1)
        # On the CPU torch computes the last few numbers of a run by another exp than the rest. Made contiguous, the
        # gate is one run, as in the original, and the result is equal bit for bit for every I.
        return self.down_proj(self.act_fn(gate.contiguous()) * up)
