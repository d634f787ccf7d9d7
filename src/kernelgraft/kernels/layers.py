"""The kernels of this repository: what stands after the colon in `kernelgraft.kernels:RMSNorm`."""

from .linear_cross_entropy import LinearCrossEntropy
from .rms_norm import OffsetRMSNorm, RMSNorm

__all__ = ["LinearCrossEntropy", "OffsetRMSNorm", "RMSNorm"]
