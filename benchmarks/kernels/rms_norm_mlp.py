"""RMS norm and the gated MLP behind it: few tokens by the share of copy bandwidth, many by the time beside others.

PYTHONPATH=src python -m benchmarks.kernels.rms_norm_mlp
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.kernels import ours, qwen3, script
from benchmarks.kernels.measure import DTYPE, Ready, Work, compiled, need

# (tokens, hidden, intermediate, whether in a CUDA graph)
SHAPES = (
    (1, 4096, 12288, False),
    (32, 4096, 12288, False),
    (1, 4096, 12288, True),
    (32, 4096, 12288, True),
    (1, 1024, 3072, True),
    (8192, 1024, 3072, False),
    (8192, 4096, 12288, False),
)
TINY = ((1, 32, 48, True), (9, 32, 48, False))

COPIES_BYTES, MOST_COPIES = 1_200_000_000, 16
"""A graph goes through so many bytes of weights, many times an L2 cache, as long as that is not too many blocks."""

FEW = 64
"""So many tokens at most write nothing beside the weights that are read."""

FUSION = (("RMSNorm", "norm"), ("MLP", "mlp"))


class Block(nn.Module):
    """The two modules that are fused."""

    def __init__(self, norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., H) to (..., H)."""
        return self.mlp(self.norm(x))  # type: ignore[no-any-return]


class Merged(nn.Module):
    """The same with gate and up in one product."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm, self.down = block.norm, block.mlp.down_proj
        self.gate_up = nn.Parameter(torch.cat([block.mlp.gate_proj.weight, block.mlp.up_proj.weight]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., H) to (..., H)."""
        gate, up = F.linear(self.norm(x), self.gate_up).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)  # type: ignore[no-any-return]


def works(asked: argparse.Namespace) -> Iterator[Work]:
    """Every number of tokens and size."""
    for tokens, hidden, intermediate, graph in TINY if asked.tiny else SHAPES:
        yield _work(asked, tokens, hidden, intermediate, graph)


def _work(asked: argparse.Namespace, tokens: int, hidden: int, intermediate: int, graph: bool) -> Work:
    torch.manual_seed(asked.seed)
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate}
    config = qwen3.config("0.6b", asked, **sizes)
    weights = 3 * hidden * intermediate * 2
    copies = 1 if not graph or asked.tiny else min(-(-COPIES_BYTES // weights), MOST_COPIES)
    blocks = [_block(config, asked) for _ in range(copies)]
    x = torch.randn(1, tokens, hidden, device=asked.device).to(DTYPE)

    def ready(made: Sequence[Callable[[torch.Tensor], Any]], graft: Any = None) -> Ready:
        return Ready(lambda: [each(x) for each in made], graft=graft)

    def grafted() -> Ready:
        import kernelgraft

        parent = nn.ModuleList(copy.deepcopy(blocks))
        fusion = tuple((name, f"*.{path}") for name, path in FUSION)
        graft = kernelgraft.graft(parent, {fusion: ours.reference("RMSNormMLP")})
        return ready(list(parent), graft)

    def exact() -> list[torch.Tensor]:
        return [copy.deepcopy(block).float()(x.float()) for block in blocks]

    return Work(
        name=f"{tokens} tokens, H {hidden}, I {intermediate}{', graph' if graph else ''}",
        shape={"tokens": tokens, **sizes, "copies": copies},
        variants={
            "eager": lambda: ready(blocks),
            "merged": lambda: ready([Merged(block) for block in blocks]),
            "compile": lambda: ready([compiled(block, asked) for block in blocks]),
            "liger": lambda: ready([_liger(block, config, asked) for block in blocks]),
            "quack": lambda: ready([_quack(block, asked) for block in blocks]),
            "ours": grafted,
        },
        reference=exact,
        bytes=weights + (2 * tokens + 1) * hidden * 2,
        operations=2 * 3 * tokens * hidden * intermediate,
        units=copies,
        graph=graph,
        reads=tokens <= FEW,
    )


def _block(config: Any, asked: argparse.Namespace) -> Block:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

    with torch.device(asked.device):
        made = Block(Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps), Qwen3MLP(config))
    with torch.no_grad():
        made.norm.weight.uniform_(0.5, 1.5)  # type: ignore[operator,union-attr]
    return made.to(DTYPE).eval()


def _liger(block: Any, config: Any, asked: argparse.Namespace) -> Block:
    need("liger_kernel", "liger-kernel", asked)
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP

    with torch.device("meta"):
        made = Block(LigerRMSNorm(config.hidden_size, config.rms_norm_eps), LigerSwiGLUMLP(config))
    made.load_state_dict(block.state_dict(), assign=True)
    return made.eval()


def _quack(block: Any, asked: argparse.Namespace) -> Callable[[torch.Tensor], Any]:
    """Its norm, and its MLP as it comes: rows of gate and up in turn, the activation in the first product, tuned."""
    need("quack", "quack-kernels", asked)
    from quack import rmsnorm
    from quack.mlp import mlp_func

    norm, mlp = block.norm, block.mlp
    gate_up = torch.stack([mlp.gate_proj.weight, mlp.up_proj.weight], 1).flatten(0, 1).detach()
    down = mlp.down_proj.weight
    return lambda x: mlp_func(rmsnorm(x, norm.weight, eps=norm.variance_epsilon), gate_up, down, "swiglu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    return script.main("rms_norm_mlp", __doc__, works, arguments)


if __name__ == "__main__":
    sys.exit(main())
