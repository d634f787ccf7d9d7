"""RMS norm whose weight is called `scale`: y = scale * x / sqrt(mean(x^2) + eps).

Shapes: x and y (..., H), scale (H).
"""

import torch
from torch import nn

try:
    from transformers.core_model_loading import WeightRenaming
except ImportError:  # Transformers need not be there: kernelgraft reads `packing`
    WeightRenaming = None


def rms_norm(x, scale, eps):
    """Normalizes in float32 and rounds once before the scale, step by step as Transformers' LlamaRMSNorm does."""
    x_fp32 = x.to(torch.float32)
    mean_square = x_fp32.pow(2).mean(-1, keepdim=True)
    normalized = x_fp32 * torch.rsqrt(mean_square + eps)
    return scale * normalized.to(x.dtype)


class CustomRMSNormLayout(nn.Module):
    """The parameters of `CustomRMSNorm`: made with the arguments of the norm that it replaces."""

    packing = {"scale": "weight"}  # noqa: RUF012
    conversion_mapping = (  # every norm of a Llama or Qwen: input_layernorm, post_attention_layernorm, q_norm, norm
        [WeightRenaming(r"(\w*norm)\.weight", r"\1.scale")] if WeightRenaming else []
    )

    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps


class CustomRMSNorm(nn.Module):
    """RMS norm over the last dimension."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.scale, self.variance_epsilon)
