"""What tests of io_uring need: a mark for machines without it, and what of it a process has open."""

import os

import pytest

from kernelgraft.checkpoint.ring import Ring, RingError


def refusal():
    """Why this process gets no ring, if it gets none."""
    try:
        Ring(1).close()
    except RingError as error:
        return str(error)
    return None


_REASON = refusal()

needs_a_ring = pytest.mark.skipif(_REASON is not None, reason=f"this machine grants no ring: {_REASON}")


def ring_of(entries, workers=2):
    """A ring for which no more than so many of the kernel's threads read in this thread."""
    ring = Ring(entries)
    ring.limit(workers)
    return ring


def open_rings():
    """How many descriptors of rings this process has."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            found += "io_uring" in os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
    return found


def io_workers(thread):
    """How many of the kernel's threads read for a thread of this process."""
    found = 0
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/comm") as comm:
                found += comm.read().strip() == f"iou-wrk-{thread}"
        except OSError:
            continue
    return found
