"""Kernels that start before the one in front of them has ended (programmatic dependent launch, from Hopper on).

One that is launched so has its programs on the multiprocessors while the last programs of the kernel in front still
run, and waits for that kernel before it reads what may have been written, or writes anything. Meanwhile it may have
weights fetched into the L2 cache, which all multiprocessors share: a line that is written after it was fetched is new
there too.
"""

import functools
from typing import Any

import torch

from . import device

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

CACHE_LINE = 128
"""Bytes that a prefetch fetches."""


if triton is not None:

    @triton.jit
    def wait():
        """Until the kernel in front has ended; then the one behind may start, and wait in turn.

        In this order, so that all that ran before the kernel in front is done when the one behind starts.
        """
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    @triton.jit
    def prefetch(lines):
        """Have the cache lines at these addresses fetched into the L2 cache."""
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // $0", "=r,l", [lines.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )


@functools.cache
def overlaps(of: torch.device) -> bool:
    """Whether kernels on this device can."""
    if device.INTERPRETED or of.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(of) >= (9, 0)


def options(overlapping: bool) -> dict[str, Any]:
    """The launch options of a kernel that waits."""
    return {"launch_pdl": True} if overlapping else {}
