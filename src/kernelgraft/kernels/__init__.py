"""The kernels that come with kernelgraft: a kernel repository, which imports nothing of the rest of the package.

Triton on a GPU, plain torch on a CPU. `layers` lists what stands after the colon in `kernelgraft.kernels:RMSNorm`.
"""

from . import layers

__all__ = ["layers"]
