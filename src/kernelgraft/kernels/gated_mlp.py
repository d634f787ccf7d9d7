"""The gated MLP of language models, with an RMS norm in front or without: y = down(act(gate(h)) * up(h)), h = n(x).

gate and up are one product, whose result one kernel activates. For few tokens the activation is part of that product,
and the norm too; for many it is where `many_tokens` has a kernel. In training the norm and the activation are computed
a second time, so that of all that lies between x and y only gate and up wait for the backward. Shapes: x and y
(..., H), gate_up (2 I, H), the gate's rows first, down (H, I), a norm's weight (H).
"""

from typing import Any, ClassVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import activation, compiling, device, few_tokens, first_steps, many_tokens, rms_norm
from .few_tokens import Norm, product, reference, takes


class _Recomputing(torch.autograd.Function):
    """What `gated_mlp` computes, and a backward that keeps x, and gate and up.

    With a residual in front, h = x + residual is kept in the place of x, and y is h + down(act(gate(n(h))) * up(n(h)));
    the gradient of h that comes past the MLP is added inside the norm's backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        scale: torch.Tensor | None,
        gate_up: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down: torch.Tensor,
        down_bias: torch.Tensor | None,
        kind: tuple[float, float, bool],
        act: str,
    ) -> torch.Tensor:
        if residual is None or scale is None:
            h, y = x, x if scale is None else rms_norm.rms_norm(x, scale, *kind)
        else:
            y, h = rms_norm.add_rms_norm(x, residual, scale, *kind)
        both = F.linear(y, gate_up, gate_up_bias)
        del y
        ctx.kind, ctx.act, ctx.adds = kind, act, residual is not None
        ctx.save_for_backward(h, scale, gate_up, down, both)
        y = F.linear(activation.gated_activation(both, act), down, down_bias)
        return few_tokens.plus(y, h) if ctx.adds else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, scale, gate_up, down, both = ctx.saved_tensors
        needs = ctx.needs_input_grad
        rows = _rows(grad)
        grad_down = grad_down_bias = grad_gate_up = grad_gate_up_bias = grad_x = grad_scale = None
        if needs[5]:
            grad_down = rows.t() @ _rows(activation.gated_activation(both, ctx.act))
        if needs[6]:
            grad_down_bias = rows.sum(0)
        if not any(needs[:5]):
            return None, None, None, None, None, grad_down, grad_down_bias, None, None
        grad_both = activation.gradient((rows @ down).view(*both.shape[:-1], down.shape[1]), both, ctx.act)
        if scale is None:
            h, rstd = x, None
        else:
            h, rstd = rms_norm.with_rstd(x, scale, *ctx.kind)
        if needs[3]:
            grad_gate_up = _rows(grad_both).t() @ _rows(h)
        if needs[4]:
            grad_gate_up_bias = _rows(grad_both).sum(0)
        if any(needs[:3]):
            grad_x = grad_both @ gate_up
            if rstd is not None:
                past = grad if ctx.adds else None
                grad_x, grad_scale = rms_norm.gradients(grad_x, past, x, scale, rstd, *ctx.kind[1:])
        grad_residual = grad_x if ctx.adds else None
        return grad_x, grad_residual, grad_scale, grad_gate_up, grad_gate_up_bias, grad_down, grad_down_bias, None, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def launch_few(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    act: str,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    norm: Norm | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Run both products of few tokens. See `gated_mlp`."""
    h = few_tokens.launch(x, gate_up, gate_up_bias, norm, act, None)
    return few_tokens.launch(h, down, down_bias, None, "", residual)


@torch.library.custom_op(f"{__name__.replace('.', '_')}::few", mutates_args=())
def _few(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    act: str,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
    offset: float,
    rounds_first: bool,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """One operator for two products, so that the second overlaps the first under a compiler too."""
    norm = None if scale is None else Norm(scale, eps, offset, rounds_first)
    return launch_few(x, gate_up, down, act, gate_up_bias, down_bias, norm, residual)


@compiling.fake(_few)
def _(x, gate_up, down, act, gate_up_bias, down_bias, scale, eps, offset, rounds_first, residual):
    return x.new_empty(*x.shape[:-1], down.shape[0])


def gated_mlp(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    act: str,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """down(act(gate(n(x))) * up(n(x))) + residual.

    Args:
        x: (..., H).
        gate_up: (2 I, H), the gate's rows first.
        down: (H, I).
        act: One of `activation.ACTIVATIONS`.
        gate_up_bias: (2 I).
        down_bias: (H).
        norm: An RMS norm of `x`.
        residual: (..., H).

    Returns:
        (..., H) in the dtype of `x`.
    """
    if not device.in_triton(x):
        return reference(reference(x, gate_up, gate_up_bias, norm, act), down, down_bias, None, "", residual)
    scale = None if norm is None else norm.weight
    if takes(x, gate_up, gate_up_bias, scale, down, down_bias, residual):
        if device.launches(x, gate_up, gate_up_bias, scale, down, down_bias, residual):
            return launch_few(x, gate_up, down, act, gate_up_bias, down_bias, norm, residual)
        kind = (0.0, 0.0, True) if norm is None else norm[1:]
        few: torch.Tensor = _few(x, gate_up, down, act, gate_up_bias, down_bias, scale, *kind, residual)
        return few
    if _recomputes(x, scale, gate_up, gate_up_bias, down, down_bias) and not takes(x, gate_up):
        kind = (0.0, 0.0, True) if norm is None else norm[1:]
        y: torch.Tensor = _Recomputing.apply(x, None, scale, gate_up, gate_up_bias, down, down_bias, kind, act)
        return y if residual is None else residual + y
    return product(product(x, gate_up, gate_up_bias, norm, act), down, down_bias, None, "", residual)


def _recomputes(*tensors: torch.Tensor | None) -> bool:
    """Whether a gradient is recorded, by the backward that is here: of one dtype, which autocast does not change."""
    there = [each for each in tensors if each is not None]
    if not torch.is_grad_enabled() or not any(each.requires_grad for each in there):
        return False
    alike = all(each.dtype == there[0].dtype for each in there)
    return alike and not torch.is_autocast_enabled(device.of(there[0]).type)


def merged(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """A layer that holds the rows of both; on meta, as layouts are made."""
    return linear(first, first.weight.shape[0] + second.weight.shape[0])


def linear(like: nn.Linear, out_features: int | None = None) -> nn.Linear:
    """A layer like another, of as many rows or of so many; read off its weight, which in a shard is smaller."""
    weight = like.weight
    rows, columns = weight.shape
    return nn.Linear(
        columns, out_features or rows, bias=like.bias is not None, device=weight.device, dtype=weight.dtype
    )


def activation_of(mlp: Any, wanted: tuple[str, ...]) -> str:
    """The name of an MLP's activation.

    Raises:
        ValueError: It is none of the wanted ones.
    """
    act_fn = getattr(mlp, "act_fn", None)
    name = activation.name_of(act_fn)
    if name not in wanted:
        said = f"its act_fn is {act_fn!r}" + (f", which is {name}" if name else "")
        raise ValueError(f"the MLP's activation has to be {' or '.join(wanted)}, and {said}")
    return name


class _Merged(nn.Module):
    """gate and up of an MLP in one parameter, and down."""

    packing: ClassVar[dict[str, Any]] = {
        "gate_up_proj.weight": ["gate_proj.weight", "up_proj.weight"],
        "gate_up_proj.bias": ["gate_proj.bias", "up_proj.bias"],
    }
    activations: tuple[str, ...] = ()
    activation: str

    @staticmethod
    def supports(x: torch.Tensor) -> bool | str:
        """bfloat16, float16 or float32."""
        return device.refusal(x) or True

    @classmethod
    def from_module(cls, mlp: Any) -> "_Merged":
        """For an MLP with `gate_proj`, `up_proj`, `down_proj` and `act_fn`, with or without biases.

        Raises:
            ValueError: It has another activation than this layout is for.
        """
        layout = cls()
        layout.activation = activation_of(mlp, cls.activations)
        layout.gate_up_proj = merged(mlp.gate_proj, mlp.up_proj)
        layout.down_proj = linear(mlp.down_proj)
        return layout

    def prepare_kernels(self, device: torch.device) -> None:
        """See `first_steps`."""
        first_steps.prepare(self, device, weights_of(self.gate_up_proj)[0], lambda x: [run(self, x)])


class SwiGLUMLPLayout(_Merged):
    """The parameters of `SwiGLUMLP`."""

    activations = ("silu",)


class GeGLUMLPLayout(_Merged):
    """The parameters of `GeGLUMLP`."""

    activations = ("gelu", "gelu_tanh")


class SwiGLUMLP(nn.Module):
    """The MLP of Llama, Mistral and Qwen: down(silu(gate(x)) * up(x))."""

    has_backward = True
    can_torch_compile = True
    gate_up_proj: nn.Linear
    down_proj: nn.Linear
    activation: str

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., H) to (..., H)."""
        return run(self, x)


class GeGLUMLP(nn.Module):
    """The MLP of Gemma: down(gelu(gate(x)) * up(x)), with either form of gelu, as the original has it."""

    has_backward = True
    can_torch_compile = True
    gate_up_proj: nn.Linear
    down_proj: nn.Linear
    activation: str

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., H) to (..., H)."""
        return run(self, x)


def run(layout: Any, x: torch.Tensor, norm: Norm | None = None, residual: torch.Tensor | None = None) -> torch.Tensor:
    """`gated_mlp` with what a layout holds."""
    gate_up, gate_up_bias = weights_of(layout.gate_up_proj)
    down, down_bias = weights_of(layout.down_proj)
    return gated_mlp(x, gate_up, down, layout.activation, gate_up_bias, down_bias, norm, residual)


def run_behind(layout: Any, held: list[torch.Tensor], residual: torch.Tensor, norm: Norm) -> torch.Tensor:
    """What is h + gated_mlp(norm(h)) of h = x + residual, for many tokens; the first addition is part of the norm.

    Args:
        layout: As in `run`.
        held: x (..., H), taken out of the list, so that its memory is free as soon as it was used.
        residual: (..., H).
        norm: An RMS norm of h.
    """
    gate_up, gate_up_bias = weights_of(layout.gate_up_proj)
    down, down_bias = weights_of(layout.down_proj)
    weights = (norm.weight, gate_up, gate_up_bias, down, down_bias)
    if _recomputes(held[0], residual, *weights):
        y: torch.Tensor = _Recomputing.apply(held.pop(), residual, *weights, norm[1:], layout.activation)
        return y
    x, h = rms_norm.add_rms_norm(held.pop(), residual, *norm)
    held.append(x)  # `*held, h = ...` would be shorter, and held a tuple to the compiler of torch 2.11
    del x  # each is let go as soon as the next one is there
    held.append(many_tokens.product(held.pop(), gate_up, gate_up_bias, layout.activation))
    return few_tokens.plus(many_tokens.product(held.pop(), down, down_bias), h)


def weights_of(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight and the bias of a linear layer.

    Where they are its own, without `nn.Module.__getattr__`, which takes the host as long as a check of seven tensors.
    """
    held = layer._parameters
    if "weight" in held and "bias" in held:
        return held["weight"], held["bias"]
    return layer.weight, layer.bias
