"""RMS norm and the gated MLP behind it in one module: y = down(act(gate(h)) * up(h)), h = rms_norm(x).

Shapes: x and y (..., H), scale (H), gate_up_proj (2 I, H), down_proj (H, I).
"""

from typing import Any, ClassVar

import torch
from torch import nn

from . import activation, first_steps, rms_norm
from .few_tokens import Norm
from .gated_mlp import activation_of, linear, merged, run


class RMSNormMLPLayout(nn.Module):
    """The parameters of `RMSNormMLP`: made from the two modules that it takes over."""

    packing: ClassVar[dict[str, Any]] = {
        "scale": "norm.weight",
        "gate_up_proj.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        "gate_up_proj.bias": ["mlp.gate_proj.bias", "mlp.up_proj.bias"],
        "down_proj.weight": "mlp.down_proj.weight",
        "down_proj.bias": "mlp.down_proj.bias",
    }

    @staticmethod
    def supports(hidden_states: torch.Tensor) -> bool | str:
        """Rows of up to 32768 numbers in bfloat16, float16 or float32."""
        return rms_norm.refusal(hidden_states) or True

    def __init__(self, norm: Any, mlp: Any) -> None:
        """Take over what the two compute with, and their weights.

        Raises:
            ValueError: One of them computes something else than this kernel does.
        """
        super().__init__()
        self.kind = rms_norm.kind_of(norm)
        self.activation = activation_of(mlp, tuple(activation.ACTIVATIONS))
        self.scale = nn.Parameter(torch.empty_like(norm.weight))
        self.gate_up_proj = merged(mlp.gate_proj, mlp.up_proj)
        self.down_proj = linear(mlp.down_proj)

    def prepare_kernels(self, device: torch.device) -> None:
        """See `first_steps`."""
        first_steps.prepare(
            self, device, self.gate_up_proj.weight, lambda x: [run(self, x, Norm(self.scale, *self.kind))]
        )


class RMSNormMLP(nn.Module):
    """RMS norm, of Llama's kind or Gemma's, then the gated MLP."""

    has_backward = True
    can_torch_compile = True
    scale: torch.Tensor
    kind: rms_norm.Kind
    gate_up_proj: nn.Linear
    down_proj: nn.Linear
    activation: str

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., H) to (..., H)."""
        return run(self, hidden_states, Norm(self.scale, *self.kind))
