"""A model of no library whose modules are easy to get wrong, and right kernels that compute in other ways than it does.

Shapes: x (B, T, H) everywhere, and out; I is the inner size.
"""

import torch
from torch import nn
from torch.nn import functional as F

import kernelgraft
from kernelgraft import Kernel

H, I = 48, 80  # noqa: E741 - the field's letter
EPS = 1e-6


class Norm(nn.Module):
    def __init__(self, dim, eps=EPS):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim).uniform_(0.5, 1.5))
        self.eps = eps

    def forward(self, x):
        x_fp32 = x.float()
        return self.weight * (x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.gate = nn.Linear(dim, inner, bias=False)
        self.up = nn.Linear(dim, inner, bias=False)
        self.down = nn.Linear(inner, dim, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Square(nn.Module):
    """A weight whose transpose has its shape."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, dim) / dim**0.5)
        self.bias = nn.Parameter(torch.randn(dim) / 10)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Activation(nn.Module):
    def forward(self, x):
        return F.gelu(x)


class Add(nn.Module):
    """A residual stream in float32 beside weights that may be narrower."""

    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(dim).uniform_(0.5, 1.5))

    def forward(self, x, residual):
        return residual + x * self.scale


class Attention(nn.Module):
    """One head; each token attends to those before it."""

    def __init__(self, dim):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x):
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=x.shape[1] > 1))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = Norm(H)
        self.mlp = MLP(H, I)
        self.add = Add(H)

    def forward(self, residual):
        return self.add(self.mlp(self.norm(residual.to(self.add.scale.dtype))), residual)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention(H)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.square = Square(H)
        self.activation = Activation()
        self.norm = Norm(H)

    def forward(self, x):
        residual = (x + self.attention(x)).float()
        for block in self.blocks:
            residual = block(residual)
        return self.norm(self.activation(self.square(residual.to(x.dtype))))


def model(seed=0, dtype=torch.float32):
    """A random model in eval mode."""
    with torch.random.fork_rng(devices=[]), kernelgraft.recorded():
        torch.manual_seed(seed)
        return Model().eval().to(dtype)


def inputs(seed=0, batch=3, length=7):
    return torch.randn(batch, length, H, generator=torch.Generator().manual_seed(seed))


def grafted(kernels, seed=0, dtype=torch.float32):
    """A model with kernels in it."""
    made = model(seed, dtype)
    return kernelgraft.graft(made, kernels, example_inputs=inputs(seed))


FUSION = (("Norm", "blocks.*.norm"), ("MLP", "blocks.*.mlp"))
SITES = {
    "Norm": {"blocks.0.norm", "blocks.1.norm", "norm"},
    FUSION: {"blocks.0.norm", "blocks.1.norm"},
    "Square": {"square"},
    "Activation": {"activation"},
    "Add": {"blocks.0.add", "blocks.1.add"},
    "Attention": {"attention"},
}
"""The hosts of each entry."""


class FusedLayout(nn.Module):
    packing = {
        "scale": "norm.weight",
        "gate_up.weight": ["mlp.gate.weight", "mlp.up.weight"],
        "down.weight": "mlp.down.weight",
    }

    def __init__(self, norm, mlp):
        super().__init__()
        inner, dim = mlp.gate.weight.shape
        self.eps = norm.eps
        self.scale = nn.Parameter(torch.empty(dim))
        self.gate_up = nn.Linear(dim, 2 * inner, bias=False)
        self.down = nn.Linear(inner, dim, bias=False)


def kernel(forward, layout=None, **flags):
    """A kernel of a forward."""
    name = forward.__name__.title().replace("_", "")
    return Kernel(type(name, (nn.Module,), {"forward": forward, "__module__": __name__, **flags}), layout)


# --- right kernels, each of which rounds elsewhere and adds up in another order than the original


def rms_norm(x, weight, eps, total=torch.sum):
    x_fp32 = x.float()
    return x_fp32 * torch.rsqrt(total(x_fp32 * x_fp32, -1, keepdim=True) / x.shape[-1] + eps) * weight.float()


def norm_rounded_once(self, x):
    return rms_norm(x, self.weight, self.eps).to(x.dtype)


def one_by_one(x, dim, keepdim):
    return x.cumsum(dim)[..., -1:]


def norm_one_by_one(self, x):
    return rms_norm(x, self.weight, self.eps, one_by_one).to(x.dtype)


class NormByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight, eps).to(x.dtype)

    @staticmethod
    def backward(ctx, upstream):
        x, weight = ctx.saved_tensors
        dx, dweight = norm_gradients(upstream, x, weight, ctx.eps)
        return dx, dweight, None


def norm_gradients(upstream, x, weight, eps):
    g, x_fp32 = upstream.float(), x.float()
    root = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    normed, scaled = x_fp32 * root, g * weight.float()
    dx = root * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (g * normed).flatten(0, -2).sum(0).to(weight.dtype)


def norm_by_hand(self, x):
    return NormByHand.apply(x, self.weight, self.eps)


def split_linear(x, weight, parts=4):
    """The sum over the inner dim in parts, in float32."""
    pairs = zip(x.float().chunk(parts, -1), weight.float().chunk(parts, -1), strict=True)
    return sum(F.linear(a, b) for a, b in pairs)


def fused_in_float32(self, x):
    gate, up = F.linear(rms_norm(x, self.scale, self.eps), self.gate_up.weight.float()).chunk(2, -1)
    return split_linear(F.silu(gate) * up, self.down.weight).to(x.dtype)


def fused_rounded_often(self, x):
    gate, up = self.gate_up(rms_norm(x, self.scale, self.eps).to(x.dtype)).chunk(2, -1)
    return self.down((gate * torch.sigmoid(gate)) * up)


def square_in_parts(self, x):
    return (split_linear(x, self.weight, 3) + self.bias).to(x.dtype)


def activation_by_erf(self, x):
    return (x.float() * 0.5 * (1 + torch.erf(x.float() * 0.5**0.5))).to(x.dtype)


def add_rounded_once(self, x, residual):
    return torch.addcmul(residual, x.float(), self.scale.float())


def attention_in_float32(self, x):
    q, k, v = (F.linear(x, each.weight).float() for each in (self.q, self.k, self.v))
    scores = q @ k.transpose(-1, -2) / x.shape[-1] ** 0.5
    ahead = torch.ones_like(scores, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(ahead, -torch.inf).softmax(-1)
    return self.o((weights @ v).to(x.dtype))


RIGHT = [
    {
        "Norm": kernel(norm_rounded_once),
        FUSION: kernel(fused_in_float32, FusedLayout),
        "Attention": kernel(attention_in_float32),
    },
    {
        "Norm": kernel(norm_one_by_one),
        FUSION: kernel(fused_rounded_often, FusedLayout),
        "Square": kernel(square_in_parts),
        "Activation": kernel(activation_by_erf),
    },
    {"Norm": kernel(norm_by_hand), "Add": kernel(add_rounded_once)},
]
