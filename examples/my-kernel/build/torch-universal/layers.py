"""The kernels of this repository: what stands after the colon in `owner/my-kernel:CustomRMSNorm`."""

from .rms_norm import CustomRMSNorm
from .rms_norm_mlp import RMSNormMLP

__all__ = ["CustomRMSNorm", "RMSNormMLP"]
