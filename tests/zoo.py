"""A model of no library in which each module is packed in another way, and kernels for all of them.

Shapes: x (B, H) everywhere; each module's own are beside its layout.
"""

import torch
from torch import nn
from torch.nn import functional as F

import kernelgraft
from kernelgraft import KernelConfig

H, E = 8, 3

# --- the model


class Norm(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(hidden) + 0.5)

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight)


class Gate(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.w1 = nn.Linear(hidden, inner, bias=False)
        self.w2 = nn.Linear(hidden, inner, bias=False)
        self.w3 = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.norm = Norm(hidden)
        self.gate = Gate(hidden, 2 * hidden)

    def forward(self, x):
        return x + self.gate(self.norm(x))


class Mix(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))

    def forward(self, x):
        return x + self.o(torch.sigmoid(self.q(x) * self.k(x)) * self.v(x))


class Experts(nn.Module):
    def __init__(self, hidden, count):
        super().__init__()
        self.list = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in range(count))

    def forward(self, x):
        return torch.stack([expert(x) for expert in self.list]).sum(0)


class Wide(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.both = nn.Linear(hidden, 2 * hidden)

    def forward(self, x):
        left, right = self.both(x).chunk(2, dim=-1)
        return torch.tanh(left) * right


class Twist(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.a, self.b = (nn.Linear(hidden, hidden, bias=False) for _ in range(2))

    def forward(self, x):
        return self.a(x) - self.b(x)


class Legacy(nn.Module):
    """Has a bias that no forward reads."""

    def __init__(self, hidden):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(hidden, hidden))
        self.bias = nn.Parameter(torch.randn(hidden))

    def forward(self, x):
        return F.linear(x, self.weight)


class Stats(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.batch = nn.BatchNorm1d(hidden)

    def forward(self, x):
        return self.batch(x)


class Zoo(nn.Module):
    def __init__(self, hidden=H):
        super().__init__()
        self.embed = nn.Linear(hidden, hidden)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(2))
        self.norm = Norm(hidden)
        self.mix = Mix(hidden)
        self.experts = Experts(hidden, E)
        self.wide = Wide(hidden)
        self.twist = Twist(hidden)
        self.legacy = Legacy(hidden)
        self.stats = Stats(hidden)
        self.head = nn.Linear(hidden, hidden)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        x = self.mix(self.norm(x))
        x = self.twist(self.wide(self.experts(x)))
        return self.head(self.stats(self.legacy(x)))


# --- the kernels


class FastNormLayout(nn.Module):
    """Renamed: scale (H)."""

    packing = {"scale": "weight"}

    def __init__(self, hidden):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(hidden))


class FastNorm(nn.Module):
    can_torch_compile = True

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.scale)


class FastGateLayout(nn.Module):
    """Two modules, two weights merged and transposed: w12 (H, 2I), w3 (I, H)."""

    packing = {
        "scale": "norm.weight",
        "w12": {"sources": ["gate.w1.weight", "gate.w2.weight"], "operations": [["concatenate"], ["transpose", 0, 1]]},
        "w3": {"sources": "gate.w3.weight", "operations": [["transpose", 0, 1]]},
    }

    def __init__(self, norm, gate):
        super().__init__()
        inner, hidden = gate.w1.weight.shape
        self.scale = nn.Parameter(torch.empty(hidden))
        self.w12 = nn.Parameter(torch.empty(hidden, 2 * inner))
        self.w3 = nn.Parameter(torch.empty(inner, hidden))


class FastGate(nn.Module):
    can_torch_compile = True

    def forward(self, x):
        left, right = (F.rms_norm(x, x.shape[-1:], self.scale) @ self.w12).chunk(2, dim=-1)
        return (F.silu(left) * right) @ self.w3


class FastMixLayout(nn.Module):
    """Three merged, with their biases: qkv (3H, H); `o` stays a child of its own."""

    packing = {
        "qkv.weight": ["q.weight", "k.weight", "v.weight"],
        "qkv.bias": ["q.bias", "k.bias", "v.bias"],
    }

    def __init__(self, hidden):
        super().__init__()
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.o = nn.Linear(hidden, hidden)


class FastMix(nn.Module):
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return x + self.o(torch.sigmoid(q * k) * v)


class FastExpertsLayout(nn.Module):
    """A list stacked: weights (E, H, H)."""

    packing = {"weights": {"sources": "list.*.weight", "operations": [["stack", 0]]}}

    def __init__(self, hidden, count):
        super().__init__()
        self.weights = nn.Parameter(torch.empty(count, hidden, hidden))


class FastExperts(nn.Module):
    def forward(self, x):
        return torch.einsum("bh,eoh->ebo", x, self.weights).sum(0)


class FastWideLayout(nn.Module):
    """One split over two: left and right (H, H), and their biases."""

    packing = {
        f"{side}.{name}": {"sources": f"both.{name}", "operations": [["chunk", index, 2]]}
        for index, side in enumerate(("left", "right"))
        for name in ("weight", "bias")
    }

    def __init__(self, hidden):
        super().__init__()
        self.left = nn.Linear(hidden, hidden)
        self.right = nn.Linear(hidden, hidden)


class FastWide(nn.Module):
    def forward(self, x):
        return torch.tanh(self.left(x)) * self.right(x)


class FastTwistLayout(nn.Module):
    """Rows in turns: weight (2H, H)."""

    packing = {"weight": {"sources": ["a.weight", "b.weight"], "operations": [["interleave", 0]]}}

    def __init__(self, hidden):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * hidden, hidden))


class FastTwist(nn.Module):
    def forward(self, x):
        a, b = F.linear(x, self.weight).unflatten(-1, (-1, 2)).unbind(-1)
        return a - b


class FastLegacyLayout(nn.Module):
    """Transposed, without the bias: matrix (H, H)."""

    packing = {"matrix": {"sources": "weight", "operations": [["transpose", 0, 1]]}}
    dropped = ("bias",)

    def __init__(self, hidden):
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(hidden, hidden))


class FastLegacy(nn.Module):
    def forward(self, x):
        return x @ self.matrix


class FastStatsLayout(nn.Module):
    """Persistent buffers renamed, and scale and shift (H) in one: affine (2, H)."""

    packing = {
        "affine": {"sources": ["batch.weight", "batch.bias"], "operations": [["stack", 0]]},
        "mean": "batch.running_mean",
        "var": "batch.running_var",
        "count": "batch.num_batches_tracked",
    }

    def __init__(self, hidden):
        super().__init__()
        self.affine = nn.Parameter(torch.empty(2, hidden))
        self.register_buffer("mean", torch.empty(hidden))
        self.register_buffer("var", torch.empty(hidden))
        self.register_buffer("count", torch.tensor(0))


class FastStats(nn.Module):
    def forward(self, x):
        if self.training:
            self.count.add_(1)
        return F.batch_norm(x, self.mean, self.var, *self.affine.unbind(), training=self.training)


FUSION = (("Norm", "blocks.*.norm"), ("Gate", "blocks.*.gate"))
MAPPING = {
    "Norm": FastNorm,
    FUSION: FastGate,
    "Mix": FastMix,
    "Experts": FastExperts,
    "Wide": FastWide,
    "Twist": FastTwist,
    "Legacy": FastLegacy,
    "Stats": FastStats,
}


def model(seed=0):
    with torch.random.fork_rng(devices=[]), kernelgraft.recorded():
        torch.manual_seed(seed)
        return Zoo()


def inputs(seed=0):
    return torch.randn(5, H, generator=torch.Generator().manual_seed(seed))


def config():
    return KernelConfig(MAPPING)


def graft(model):
    return kernelgraft.graft(model, config(), example_inputs=inputs())


# --- rules without an inverse


class NarrowedLegacyLayout(FastLegacyLayout):
    packing = {"matrix": {"sources": "weight", "operations": [["transpose", 0, 1], ["cast", "bfloat16"]]}}

    def __init__(self, hidden):
        super().__init__(hidden)
        self.to(torch.bfloat16)


class NarrowedLegacy(nn.Module):
    def forward(self, x):
        return x @ self.matrix.to(x.dtype)


# For each way of packing: the original's path, one name in it, and how that reads from the packed ones.
PLACES = {
    "blocks.0.norm": ("weight", "whole"),
    "blocks.0.gate": ("w1.weight", "view"),
    "norm": ("weight", "whole"),
    "mix": ("k.weight", "view"),
    "experts": ("list.1.weight", "view"),
    "wide": ("both.weight", "assembled"),
    "twist": ("b.weight", "view"),
    "legacy": ("weight", "view"),
    "stats": ("batch.running_var", "whole"),
}
