"""The norms that `kernelgraft new` knows, each as a function that is written into a new repository as it stands here.

Which one a module computes is found by trying it. They differ in where they round, which shows in bfloat16 only.
Shapes: x (..., H), weight and bias (H).
"""

import torch
from torch.nn import functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The RMS norm of x (..., H) in float32, rounded once before the weight (H)."""
    x_fp32 = x.to(torch.float32)
    normalized = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normalized.to(x.dtype)


def rms_norm_float32_weight(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The RMS norm of x (..., H) and its weight (H) in float32, rounded once at the end."""
    x_fp32 = x.to(torch.float32)
    normalized = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.to(torch.float32) * normalized).to(x.dtype)


def rms_norm_offset(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The RMS norm of x (..., H) with the weight 1 + weight (H), all in float32, rounded once at the end."""
    x_fp32 = x.to(torch.float32)
    normalized = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    return (normalized * (1.0 + weight.to(torch.float32))).to(x.dtype)


def layer_norm_float32(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The layer norm of x (..., H) without a bias, it and its weight (H) in float32, rounded once at the end."""
    x_fp32 = x.to(torch.float32)
    centered = x_fp32 - x_fp32.mean(-1, keepdim=True)
    normalized = centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.to(torch.float32) * normalized).to(x.dtype)


def torch_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The RMS norm of x (..., H) as torch computes it."""
    return F.rms_norm(x, weight.shape, weight, eps)


def torch_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """The layer norm of x (..., H) as torch computes it."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


NORMS = (rms_norm, rms_norm_float32_weight, rms_norm_offset, layer_norm_float32, torch_rms_norm)
NORMS_WITH_BIAS = (torch_layer_norm,)

IN_TRITON = {
    "rms_norm": {"offset": "0.0", "rounds_first": "True"},
    "rms_norm_float32_weight": {"offset": "0.0", "rounds_first": "False"},
    "rms_norm_offset": {"offset": "1.0", "rounds_first": "False"},
}
"""The settings of the Triton template for those that it can compute."""
