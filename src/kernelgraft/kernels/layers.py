"""The kernels of this repository: what stands after the colon in `kernelgraft.kernels:RMSNorm`."""

from .gated_mlp import GeGLUMLP, SwiGLUMLP
from .linear_cross_entropy import LinearCrossEntropy
from .rms_norm import OffsetRMSNorm, RMSNorm
from .rms_norm_attention import OffsetRMSNormAttention, RMSNormAttention
from .rms_norm_mlp import RMSNormMLP

__all__ = [
    "GeGLUMLP",
    "LinearCrossEntropy",
    "OffsetRMSNorm",
    "OffsetRMSNormAttention",
    "RMSNorm",
    "RMSNormAttention",
    "RMSNormMLP",
    "SwiGLUMLP",
]
