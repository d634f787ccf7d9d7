"""A language-model head whose logits are computed when somebody reads them, and whose loss does not.

y = x @ weight^T + bias. Shapes: x (..., H), weight (V, H), bias (V), y (..., V).
"""

from typing import Any

import torch
from torch import nn

from .cross_entropy import for_autocast
from .lazy_logits import lazy_logits

FEW_ROWS = 64
"""Up to so many rows the logits are computed at once. Their bytes are few: at V 151936 in bfloat16 19 MB, where the
weight has 311. And to make and read lazy ones takes the host 0.27 ms, measured with one thread of a server's CPU, which
generation would pay for every token."""

_ROWS, _CLASSES = 2048, 4096
"""At most, of the loss that is computed before the first step: 185 MB at H 4096 in bfloat16."""

_PLAIN = (torch.Tensor, nn.Parameter)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_TRACERS = tuple(getattr(torch._C._TorchDispatchModeKey, name) for name in ("FUNCTIONAL", "PROXY", "FAKE"))


class LinearCrossEntropyLayout(nn.Module):
    """The weight and the bias of `LinearCrossEntropy`: those of the linear layer, as they are."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def from_module(cls, module: nn.Linear) -> "LinearCrossEntropyLayout":
        """For a linear layer, whoever has made it or given it another size since."""
        rows, columns = module.weight.shape
        return cls(columns, rows, module.bias is not None)

    def prepare_kernels(self, device: torch.device) -> None:
        """Compute a loss as models do, and its gradients, of so many rows and classes that products are those of more.

        Inference has no kernels here.
        """
        if not self.training:
            return
        like: dict[str, Any] = {"dtype": self.weight.dtype, "device": device}
        hidden = torch.zeros(_ROWS, self.weight.shape[1], **like).requires_grad_()
        weight = torch.zeros(min(_CLASSES, self.weight.shape[0]), self.weight.shape[1], **like).requires_grad_()
        target = torch.zeros(_ROWS, dtype=torch.int64, device=device)
        logits = lazy_logits(hidden, weight, None).float()
        torch.autograd.grad(nn.functional.cross_entropy(logits, target), (hidden, weight))


class LinearCrossEntropy(nn.Module):
    """The head of a language model, at `lm_head`: its logits, for the model's own loss, are never in memory together.

    What it gives are `LazyLogits`. `torch.nn.functional.cross_entropy`, as the losses of Transformers call it, computes
    the loss and the gradients of hidden states and weight from them a chunk of rows at a time; whoever reads the
    logits gets them computed then, once, with their gradient. They cannot be had any more after the weight has changed:
    reading them after a step of the optimizer raises.

    It gives plain logits for up to 64 rows; in a graph of CUDA that is being recorded; for tensors of classes of their
    own; and under `torch.compile`, which sees the product and the loss as they are. There `linear_cross_entropy` can be
    called instead.
    """

    has_backward = True
    can_torch_compile = True
    weight: torch.Tensor
    bias: torch.Tensor | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., H) to (..., V)."""
        if torch.compiler.is_compiling() or not _can_wait(input, self.weight, self.bias):
            return nn.functional.linear(input, self.weight, self.bias)
        return lazy_logits(*for_autocast(input, self.weight, self.bias))


def _can_wait(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether logits of these can be computed later, with the same result."""
    operands = [each for each in (hidden, weight, bias) if each is not None]
    if any(type(each) not in _PLAIN for each in operands) or hidden.shape[:-1].numel() <= FEW_ROWS:
        return False
    if any(each.device != hidden.device or each.is_meta for each in operands) or hidden.dtype not in _FLOATS:
        return False
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or not weight.numel():
        return False
    same = all(each.dtype == hidden.dtype for each in operands)
    if not same and not torch.is_autocast_enabled(hidden.device.type):
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._is_tracing():
        return False
    if any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS):
        return False
    # In a graph that is recorded, what is computed later would be missing from every replay.
    return not (hidden.is_cuda and torch.cuda.is_current_stream_capturing())
