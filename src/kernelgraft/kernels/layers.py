"""The kernels of this repository: what stands after the colon in `kernelgraft.kernels:RMSNorm`."""

from .rms_norm import OffsetRMSNorm, RMSNorm
from .rms_norm_attention import OffsetRMSNormAttention, RMSNormAttention

__all__ = ["OffsetRMSNorm", "OffsetRMSNormAttention", "RMSNorm", "RMSNormAttention"]
