"""RMS norm, forward and backward: the share of copy bandwidth, and the time beside that of other implementations.

PYTHONPATH=src python -m benchmarks.kernels.rms_norm

Its limit is a kernel of torch's that only moves the same bytes: a copy forward, a sum of two tensors backward.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn import functional as F

from benchmarks.kernels import script
from benchmarks.kernels.measure import DTYPE, Ready, Work, compiled, need
from benchmarks.kernels.table import LIMIT

EPS = 1e-6
SHAPES = ((8192, 4096), (8192, 1024), (32, 4096))
TINY = ((7, 48), (3, 64))

Norm = Callable[[torch.Tensor], torch.Tensor]
MakeNorm = Callable[[torch.Tensor], Norm]
"""From a weight to the norm with it."""


def works(asked: argparse.Namespace) -> Iterator[Work]:
    """Every shape forward, then backward."""
    for backward in (False, True):
        for rows, columns in TINY if asked.tiny else SHAPES:
            yield _work(asked, rows, columns, backward)


def _work(asked: argparse.Namespace, rows: int, columns: int, backward: bool) -> Work:
    generator = torch.Generator(asked.device).manual_seed(asked.seed)
    x, upstream = (torch.randn(rows, columns, generator=generator, device=asked.device).to(DTYPE) for _ in range(2))
    weight = (torch.rand(columns, generator=generator, device=asked.device) + 0.5).to(DTYPE)
    size = x.element_size()
    forward_bytes = (2 * rows + 1) * columns * size
    # The other way: x, the gradient of y and rstd are read, the gradients of x and of the weight written.
    backward_bytes = (3 * rows + 2) * columns * size + 4 * rows

    def ready(make: MakeNorm, dtype: torch.dtype = DTYPE) -> Ready:
        leaves = [each.to(dtype, copy=True).requires_grad_(backward) for each in (x, weight)]
        norm = make(leaves[1])
        if not backward:
            return Ready(lambda: norm(leaves[0]))
        y = norm(leaves[0])
        return Ready(lambda: torch.autograd.grad(y, leaves, upstream.to(dtype), retain_graph=True))

    def reference() -> object:
        return ready(_eager, torch.float32).call()

    def limit() -> Ready:
        return Ready((lambda: torch.add(x, upstream)) if backward else x.clone, outputs=reference)

    variants = {name: lambda make=make: ready(make) for name, make in _norms(asked).items()}
    return Work(
        name=f"{rows}x{columns} {'backward' if backward else 'forward'}",
        shape={"rows": rows, "columns": columns},
        variants=variants | {LIMIT: limit},
        reference=reference,
        bytes=backward_bytes if backward else forward_bytes,
        gradients=backward,
    )


def _norms(asked: argparse.Namespace) -> dict[str, MakeNorm]:
    def compile_eager(weight: torch.Tensor) -> Norm:
        norm: Norm = compiled(_eager(weight), asked)
        return norm

    def liger(weight: torch.Tensor) -> Norm:
        need("liger_kernel", "liger-kernel", asked)
        from liger_kernel.transformers import LigerRMSNorm

        # In place, its backward would write into the upstream gradient, which is used again here.
        return _with_weight(LigerRMSNorm(weight.shape[0], eps=EPS, in_place=False), weight)

    def quack(weight: torch.Tensor) -> Norm:
        need("quack", "quack-kernels", asked)
        from quack import rmsnorm

        return lambda x: rmsnorm(x, weight, eps=EPS)

    def ours(weight: torch.Tensor) -> Norm:
        from kernelgraft.kernels.rms_norm import rms_norm

        return lambda x: rms_norm(x, weight, EPS)

    return {
        "eager": _eager,
        "torch": lambda weight: lambda x: F.rms_norm(x, weight.shape, weight, EPS),
        "compile": compile_eager,
        "liger": liger,
        "quack": quack,
        "ours": ours,
    }


def _eager(weight: torch.Tensor) -> Norm:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return _with_weight(LlamaRMSNorm(weight.shape[0], eps=EPS), weight)


def _with_weight(module: torch.nn.Module, weight: torch.Tensor) -> torch.nn.Module:
    """The same tensor as the module's weight, so that gradients reach it."""
    del module.weight
    module.weight = weight  # type: ignore[assignment]
    return module


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    return script.main("rms_norm", __doc__, works, arguments)


if __name__ == "__main__":
    sys.exit(main())
