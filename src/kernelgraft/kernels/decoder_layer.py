"""A whole pre-norm decoder layer: h = x + attention(rms_norm(x)); y = h + mlp(rms_norm(h)).

Attention and MLP are those of `rms_norm_attention` and `rms_norm_mlp`. For few tokens each norm is part of the product
behind it and each residual addition part of the product before it, so that a layer is four products, rotation and
attention; for many the addition is part of the norm. Shapes: x, h and y (B, T, H).
"""

import dis
import inspect
from typing import Any, ClassVar

import torch
from torch import nn

from . import device
from .few_tokens import Norm, product, taken, takes
from .gated_mlp import run, run_behind, weights_of
from .rms_norm_attention import RMSNormAttentionLayout, attended, prepare
from .rms_norm_mlp import RMSNormMLPLayout

_READ = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


def _check_layer(layer: nn.Module) -> None:
    """Compare what a layer's forward reads with what Llama's does.

    Raises:
        ValueError: It does something else, or more.
    """
    name = type(layer).__name__
    code = getattr(inspect.unwrap(type(layer).forward), "__code__", None)
    if code is None:
        raise ValueError(f"what {name} computes cannot be read: its forward is no Python function")
    read = set(code.co_names)
    if read != _READ:
        raise ValueError(
            f"{name}.forward reads {', '.join(sorted(read))}, and a pre-norm layer as Llama's reads "
            f"{', '.join(sorted(_READ))} and nothing else"
        )
    steps = list(dis.get_instructions(code))
    branches = [step for step in steps if "JUMP" in step.opname and "IF" in step.opname]
    sums = [step.argrepr for step in steps if step.opname == "BINARY_OP"]
    if branches or sums != ["+", "+"]:
        raise ValueError(f"{name}.forward does not add two residuals and nothing else: {sums or 'no sums'}")


class DecoderLayerLayout(nn.Module):
    """The parameters of `DecoderLayer`: those of an attention and of an MLP, each with the norm in front of it."""

    packing: ClassVar[dict[str, Any]] = {
        "attention.norm_weight": "input_layernorm.weight",
        "attention.qkv_proj.weight": [f"self_attn.{name}_proj.weight" for name in "qkv"],
        "attention.qkv_proj.bias": [f"self_attn.{name}_proj.bias" for name in "qkv"],
        "attention.o_proj.weight": "self_attn.o_proj.weight",
        "attention.o_proj.bias": "self_attn.o_proj.bias",
        "attention.q_norm_weight": "self_attn.q_norm.weight",
        "attention.k_norm_weight": "self_attn.k_norm.weight",
        "feed_forward.scale": "post_attention_layernorm.weight",
        "feed_forward.gate_up_proj.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        "feed_forward.gate_up_proj.bias": ["mlp.gate_proj.bias", "mlp.up_proj.bias"],
        "feed_forward.down_proj.weight": "mlp.down_proj.weight",
        "feed_forward.down_proj.bias": "mlp.down_proj.bias",
    }

    @staticmethod
    def supports(hidden_states: torch.Tensor, *_: Any, position_embeddings: Any = None, **__: Any) -> bool | str:
        """As `RMSNormAttentionLayout.supports`."""
        return RMSNormAttentionLayout.supports(hidden_states, position_embeddings)

    @classmethod
    def from_module(cls, layer: Any) -> "DecoderLayerLayout":
        """For a layer with `input_layernorm`, `self_attn`, `post_attention_layernorm` and `mlp`.

        Raises:
            ValueError: The layer, or a part of it, computes something else than this kernel does.
        """
        _check_layer(layer)
        layout = cls()
        layout.attention = RMSNormAttentionLayout(layer.input_layernorm, layer.self_attn)
        layout.feed_forward = RMSNormMLPLayout(layer.post_attention_layernorm, layer.mlp)
        return layout

    def prepare_kernels(self, device: torch.device) -> None:
        """See `first_steps`."""
        prepare(self.attention, self, device, lambda out, x: _behind(self, out, x))


class DecoderLayer(nn.Module):
    """A decoder layer of Llama, Mistral, Qwen2, Qwen3, and what has their shape."""

    has_backward = True
    can_torch_compile = True
    attention: RMSNormAttentionLayout
    feed_forward: RMSNormMLPLayout

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(B, T, H) to (B, T, H)."""
        kwargs.update(position_ids=position_ids, use_cache=use_cache)
        states = (hidden_states, position_embeddings, attention_mask, past_key_values, kwargs)
        return _behind(self, attended(self.attention, *states)[0], hidden_states)


def _behind(self: Any, out: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """What comes behind attention, whose outcome is `out`."""
    weight, bias = weights_of(self.attention.o_proj)
    mlp = self.feed_forward
    norm = Norm(mlp.scale, *mlp.kind)
    few = takes(out, weight, bias, hidden_states)
    if few or not device.in_triton(out):
        h = (taken if few else product)(out, weight, bias, residual=hidden_states)
        return run(mlp, h, norm, residual=h)
    held = [product(out, weight, bias)]
    del out  # it would lie there beside all that the MLP needs
    return run_behind(mlp, held, hidden_states, norm)
