"""Kernels that start before the one in front of them has ended (programmatic dependent launch, from Hopper on).

One that is launched so has its programs on the multiprocessors while the last programs of the kernel in front still
run, and waits for that kernel before it reads what may have been written, or writes anything. Meanwhile it may have
tensors fetched into the L2 cache, which all multiprocessors share: a line that is written after it was fetched is new
there too. Registers do not know of that, so what a kernel loads before it waits must be no output of the kernel in
front, if that is one that lets the next one start early, which only those here do: weights are written by others, which
end before any of these start, and what is in a cache by kernels that ended before the one in front let this one start.
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

if triton is not None:

    @triton.jit
    def wait(LATE: tl.constexpr = False):
        """Until the kernel in front has ended; then the one behind may start, and wait in turn.

        In this order, so that all that ran before the kernel in front is done when the one behind starts. A kernel
        that has it start `LATE` calls `release` itself, when its work is nearly done.
        """
        tl.extra.cuda.gdc_wait()
        if not LATE:
            tl.extra.cuda.gdc_launch_dependents()

    @triton.jit
    def release():
        """The kernel behind may start."""
        tl.extra.cuda.gdc_launch_dependents()

    @triton.jit
    def prefetch_rows(at, num_bytes, COUNT: tl.constexpr):
        """Have so many bytes from each of `COUNT` addresses on fetched into the L2 cache.

        One instruction for each row: one for each cache line came to half the memory's rate, and kept the loads behind
        it waiting. It starts and ends where 16 bytes do, so a row may lack its last few.
        """
        at = at.to(tl.int64) & -16
        tl.inline_asm_elementwise(
            """
            {
                .reg .pred some, mine;
                .reg .u32 thread;
                mov.u32 thread, %tid.x;
                setp.gt.s32 some, $2, 0;
                setp.lt.and.u32 mine, thread, $3, some;
                @mine cp.async.bulk.prefetch.L2.global [$1], $2;
                mov.u32 $0, thread;
            }
            """,
            "=r,l,r,r", [at, num_bytes & -16, COUNT], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@functools.cache
def overlaps(of: torch.device) -> bool:
    """Whether kernels on this device can."""
    if device.INTERPRETED or of.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(of) >= (9, 0)


def options(overlapping: bool) -> dict[str, Any]:
    """The launch options of a kernel that waits."""
    return {"launch_pdl": True} if overlapping else {}
