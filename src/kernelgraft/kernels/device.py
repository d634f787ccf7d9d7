"""Where a kernel runs, and what looks at its call."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch

try:
    import triton

    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:  # a build of torch for CPUs comes without it
    INTERPRETED = False

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the Triton kernels take. In all of them sums are in float32."""

_SCRATCH = 7 << 10
"""Bytes of shared memory for what the compiler and the driver need beside."""

_PLAIN = (torch.Tensor, torch.nn.Parameter)


class _Preparing(threading.local):
    of: torch.device | None = None


_preparing = _Preparing()


@contextlib.contextmanager
def preparing(of: torch.device) -> Iterator[None]:
    """Within the block, in this thread, tensors on the meta device stand for ones on the GPU `of`.

    What would be launched for them is loaded, and compiled where the cache of Triton does not have it.
    """
    before, _preparing.of = _preparing.of, of
    try:
        with torch.cuda.device(of) if of.type == "cuda" else contextlib.nullcontext():
            yield
    finally:
        _preparing.of = before


def is_preparing() -> bool:
    """Whether this thread prepares kernels."""
    return _preparing.of is not None


def in_triton(x: torch.Tensor) -> bool:
    """Whether a kernel runs in Triton on this tensor, or else in plain torch."""
    return x.is_cuda or (x.is_meta and is_preparing())


def of(x: torch.Tensor) -> torch.device:
    """Where the kernels of `x` run."""
    prepared = _preparing.of if x.is_meta else None
    return x.device if prepared is None else prepared


def launches(*tensors: torch.Tensor | None) -> bool:
    """Whether a call may go to the launcher at once, without an operator of `torch.library`.

    To go by the dispatcher costs the host more time than a launch does. It is needed where somebody watches: autograd,
    a compiler, a mode (fake tensors, counters), a function transform, or a tensor of another class.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    recording = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or (recording and tensor.requires_grad)):
            return False
    return True


def elsewhere(x: torch.Tensor) -> bool:
    """Whether `x` is on a GPU that is not the current one, to which alone Triton launches.

    In a model on several GPUs (`device_map="auto"`) most layers' tensors are. `torch.cuda.device_of(x)` changes that.
    """
    return x.is_cuda and x.get_device() != torch.cuda.current_device()


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """How many programs run at the same time, at least; of the interpreter, a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program has for blocks that are on their way, so nearly all that programs of a multiprocessor share.

    220 KB on an H100 or H200, and in the interpreter; 92 KB on an L4 or RTX 4090.
    """
    most = 227 << 10
    if device.type == "cuda" and not INTERPRETED:
        index = torch.cuda.current_device() if device.index is None else device.index
        most = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return most - _SCRATCH


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """(rows, last dimension), each row dense, with any stride between them; a view where there can be one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def refusal(*tensors: Any) -> str | None:
    """Why the Triton kernels do not take these tensors, if they do not."""
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.dtype not in DTYPES:
            return (
                f"it takes {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}, and not {tensor.dtype}"
            )
    return None
