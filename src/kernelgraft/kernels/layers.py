"""The kernels of this repository: what stands after the colon in `kernelgraft.kernels:RMSNorm`."""

from .rms_norm import OffsetRMSNorm, RMSNorm

__all__ = ["OffsetRMSNorm", "RMSNorm"]
