"""Kernels loaded before they are called, in the forms in which a model's first steps call them.

At a first launch Triton hashes itself (0.4 s), imports what it asks arguments about (0.1 s), hashes the kernel's source
and loads what its cache has, or compiles it (the host of an H200, Triton 3.6, 2026-11-29). For that a layout on the
meta device and tensors of the shapes that a step has are enough; the library of products is begun with a small one.
Layouts of this repository do so in `prepare_kernels`, which a graft calls while weights are read.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from . import device

STEPS = {False: (1, 8, 16, 512, 4096), True: (512, 8192)}
"""Tokens of the steps, for inference and for training: one, some (see `few_tokens`), and many."""


def prepare(
    layout: nn.Module,
    of: torch.device,
    like: torch.Tensor,
    step: Callable[[torch.Tensor], Sequence[torch.Tensor]],
) -> None:
    """Run a step of a layout on the meta device, forward and in training backward too, as if it were on `of`.

    Args:
        layout: With its parameters on the meta device.
        of: A GPU.
        like: (..., H), of the dtype and with the last dimension of the hidden states.
        step: Takes hidden states (1, T, H), and gives all outputs through which gradients come.
    """
    trains = layout.training and any(each.requires_grad for each in layout.parameters())
    if of.type == "cuda":
        few = torch.ones(16, 16, dtype=like.dtype, device=of)
        few @ few
    with device.preparing(of), torch.set_grad_enabled(trains):
        for num_tokens in STEPS[trains]:
            x = like.new_empty(1, num_tokens, like.shape[-1]).requires_grad_(trains)
            outputs = step(x)
            if trains:
                wanted = [x, *(parameter for parameter in layout.parameters() if parameter.requires_grad)]
                torch.autograd.grad(outputs, wanted, [torch.empty_like(y) for y in outputs], allow_unused=True)
