"""The kernels of this repository: what stands after the colon in `kernelgraft.kernels:RMSNorm`."""

from .decoder_layer import DecoderLayer
from .gated_mlp import GeGLUMLP, SwiGLUMLP
from .linear_cross_entropy import LinearCrossEntropy
from .rms_norm import OffsetRMSNorm, RMSNorm
from .rms_norm_attention import RMSNormAttention
from .rms_norm_mlp import RMSNormMLP

__all__ = [
    "DecoderLayer",
    "GeGLUMLP",
    "LinearCrossEntropy",
    "OffsetRMSNorm",
    "RMSNorm",
    "RMSNormAttention",
    "RMSNormMLP",
    "SwiGLUMLP",
]
