"""Kernels loaded before they are called, in the forms in which a model's first steps call them.

At a first launch Triton hashes itself (0.4 s), imports what it asks arguments about (0.1 s), hashes the kernel's source
and loads what its cache has, or compiles it (the host of an H200, Triton 3.6, 2026-11-29). For that a layout on the
meta device and tensors of the shapes that a step has are enough. Torch's own kernels are loaded at their first call as
well, so those that a language model calls around ours are called once.
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
        call_around(of, like.dtype, trains)
    with device.preparing(of), torch.set_grad_enabled(trains):
        for num_tokens in STEPS[trains]:
            x = like.new_empty(1, num_tokens, like.shape[-1]).requires_grad_(trains)
            outputs = step(x)
            if trains:
                wanted = [x, *(parameter for parameter in layout.parameters() if parameter.requires_grad)]
                torch.autograd.grad(outputs, wanted, [torch.empty_like(y) for y in outputs], allow_unused=True)


def call_around(of: torch.device, dtype: torch.dtype, trains: bool) -> None:
    """Call on a few numbers what a language model calls around these kernels: embedding, rotation, mask, product."""
    with torch.set_grad_enabled(trains):
        positions = torch.arange(16, device=of)[None] + 0
        table = torch.ones(16, 16, dtype=dtype, device=of, requires_grad=trains)
        hidden = nn.functional.embedding(positions, table)
        angles = (torch.ones(1, 8, 1, device=of) @ positions[:, None, :].float()).transpose(1, 2)
        angles = torch.cat((angles, angles), dim=-1)
        rotation = ((angles.cos() * 1.0).to(dtype), (angles.sin() * 1.0).to(dtype))
        # Whether sequences are packed is asked of the positions.
        steps = torch.diff(positions, prepend=positions[:, :1] - 1) != 1
        (steps.cumsum(-1)[:, -1] == 0).all()
        for each in rotation:
            hidden = nn.functional.linear(hidden + each, table)
        if trains:
            torch.autograd.grad(hidden, table, torch.ones_like(hidden))
