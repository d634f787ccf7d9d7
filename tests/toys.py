"""A small model that is none of Transformers', and kernels for it.

Shapes: x (..., H), w12 (2I, H), w3 (H, I).
"""

import torch
from torch import nn
from torch.nn import functional as F

import kernelgraft
from kernelgraft import Kernel

H, I = 8, 12  # noqa: E741 - the field's letter
FUSION = (("Norm", "layers.*.norm"), ("MLP", "layers.*.mlp"))


class Norm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, hidden_states):
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


class MLP(nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.w1 = nn.Linear(dim, inner, bias=False)
        self.w2 = nn.Linear(dim, inner, bias=False)
        self.w3 = nn.Linear(inner, dim, bias=False)

    def forward(self, hidden_states):
        return self.w3(F.silu(self.w1(hidden_states)) * self.w2(hidden_states))


class Block(nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.norm = Norm(dim)
        self.mlp = MLP(dim, inner)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    def __init__(self, num_layers=2):
        super().__init__()
        self.layers = nn.ModuleList(Block(H, I) for _ in range(num_layers))
        self.norm = Norm(H)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def model(num_layers=2, seed=0):
    """A random model in eval mode whose constructor arguments are known."""
    with torch.random.fork_rng(devices=[]), kernelgraft.recorded():
        torch.manual_seed(seed)
        made = Model(num_layers)
        for name, parameter in made.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.uniform_(parameter, 0.5, 1.5)
    return made.eval()


def inputs(seed=0):
    return torch.randn(3, 5, H, generator=torch.Generator().manual_seed(seed))


class FastNormLayout(nn.Module):
    packing = {"scale": "weight"}

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.eps = eps


class FastNorm(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states):
        return F.rms_norm(hidden_states, self.scale.shape, self.scale, self.eps)


class NormMLPLayout(nn.Module):
    packing = {
        "scale": "norm.weight",
        "w12": ["mlp.w1.weight", "mlp.w2.weight"],
        "w3": "mlp.w3.weight",
    }

    def __init__(self, norm, mlp):
        super().__init__()
        inner, dim = mlp.w1.weight.shape
        self.eps = norm.eps
        self.scale = nn.Parameter(torch.ones(dim))
        self.w12 = nn.Parameter(torch.empty(2 * inner, dim))
        self.w3 = nn.Parameter(torch.empty(dim, inner))


def norm_mlp(self, hidden_states):
    x = F.rms_norm(hidden_states, self.scale.shape, self.scale, self.eps)
    gate, up = F.linear(x, self.w12).chunk(2, dim=-1)
    return F.linear(F.silu(gate.contiguous()) * up, self.w3)


class NormMLP(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states):
        return norm_mlp(self, hidden_states)


class LaterHostLayout(NormMLPLayout):
    """The same, whose host is the second member."""

    host = "mlp"


def short_only(hidden_states):
    """As `supports`: up to 5 tokens."""
    return hidden_states.shape[1] <= 5 or f"{hidden_states.shape[1]} tokens are too many"


def kernel(forward, layout=None, name="Fast", **flags):
    """A kernel of a class that is made of a forward and flags."""
    return Kernel(type(name, (nn.Module,), {"forward": forward, "__module__": __name__, **flags}), layout)


def state(model):
    """All that every module of a model holds, by identity, and the classes; with the bytes of every tensor."""
    found = {}
    for path, module in model.named_modules():
        found[path] = (type(module), {name: _held(value) for name, value in vars(module).items()})
    return found


def _held(value):
    if isinstance(value, dict):
        return {name: _held(inner) for name, inner in value.items()}
    if isinstance(value, torch.Tensor):
        return id(value), value.data_ptr(), value._version, value.requires_grad, value.tolist()
    return id(value) if not isinstance(value, bool | int | float | str | None) else value
