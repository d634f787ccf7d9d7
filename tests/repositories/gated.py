"""RMS norm and gated MLP of Llama, Qwen2, Qwen3 and Mistral in one kernel, with each form of rule.

Shapes: x (..., H), scale (H), gate_up_proj (2I, H), down_proj (H, I).
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming


def rms_norm(x, scale, eps):
    x_fp32 = x.to(torch.float32)
    normalized = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    return scale * normalized.to(x.dtype)


class NormMLPLayout(nn.Module):
    packing = {
        "scale": "norm.weight",
        "gate_up_proj.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        "down_proj.weight": "mlp.down_proj.weight",
    }

    def __init__(self, norm, mlp):
        super().__init__()
        self.variance_epsilon = norm.variance_epsilon
        self.act_fn = mlp.act_fn
        self.scale = nn.Parameter(torch.ones(norm.weight.shape[0]))
        self.gate_up_proj = nn.Linear(mlp.hidden_size, 2 * mlp.intermediate_size, bias=False)
        self.down_proj = nn.Linear(mlp.intermediate_size, mlp.hidden_size, bias=False)

    def forward(self, hidden_states):
        pass


class NormMLP(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states):
        normalized = rms_norm(hidden_states, self.scale, self.variance_epsilon)
        gate, up = F.linear(normalized, self.gate_up_proj.weight).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate.contiguous()) * up, self.down_proj.weight)


class NormMLPByRulesLayout(NormMLPLayout):
    """The same by Transformers' rules: one over a whole path, the others over endings, without `.weight`."""

    packing = None
    conversion_mapping = [
        WeightRenaming(
            r"model\.layers\.(\d+)\.post_attention_layernorm\.weight",
            r"model.layers.\1.post_attention_layernorm.scale",
        ),
        WeightRenaming(r"mlp\.down_proj", "post_attention_layernorm.down_proj"),
        WeightConverter(
            ["mlp.gate_proj", "mlp.up_proj"], "post_attention_layernorm.gate_up_proj", [Concatenate(dim=0)]
        ),
    ]


class NormMLPByRules(NormMLP):
    pass


class layers:
    NormMLP = NormMLP
    NormMLPByRules = NormMLPByRules
