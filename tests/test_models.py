"""Ten families of models and a plain module: loaded with kernels, run, saved, loaded again, and ungrafted."""

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import kernelgraft
from kernelgraft import KernelConfig

pytestmark = pytest.mark.transformers

REPOSITORIES = Path(__file__).parent / "repositories"


def use(text):
    return f"{REPOSITORIES}/{text}"


def pair(first, second, parent="model.layers.*"):
    return tuple((name, f"{parent}.{child}") for name, child in (first, second))


NORM_MLP = pair(("RMSNorm", "post_attention_layernorm"), ("MLP", "mlp"))
PRE = ("RMSNorm", "pre_feedforward_layernorm")
POST = ("RMSNorm", "post_feedforward_layernorm")
GUIDE = {"RMSNorm": f"{tiny.EXAMPLE}:CustomRMSNorm", NORM_MLP: f"{tiny.EXAMPLE}:RMSNormMLP"}

# kind, what is put in, and whether each kernel does the original's arithmetic in the original's order
CASES = {
    "llama-guide": ("llama", GUIDE, True),
    "llama-rules": ("llama", {NORM_MLP: use("gated.py:NormMLPByRules")}, True),
    "llama-attention": ("llama", {"Attention": use("attention.py:MergedAttention")}, False),
    "qwen2": (
        "qwen2",
        {NORM_MLP: use("gated.py:NormMLP"), "Attention": use("attention.py:MergedAttention")},
        False,
    ),
    "qwen3": (
        "qwen3",
        {NORM_MLP: use("gated.py:NormMLPByRules"), "Attention": use("attention.py:NormedAttention")},
        False,
    ),
    "qwen3-guide": ("qwen3", GUIDE, True),
    "mistral": ("mistral", {NORM_MLP: use("gated.py:NormMLP"), "Attention": use("attention.py:MergedAttention")}, False),
    "gemma3-pre": ("gemma3", {pair(PRE, ("MLP", "mlp")): use("gemma3.py:PreNormMLP")}, True),
    "gemma3-post": ("gemma3", {pair(("MLP", "mlp"), POST): use("gemma3.py:MLPPostNorm")}, True),
    "gemma3-sandwich": (
        "gemma3",
        {
            tuple((name, f"model.layers.*.{child}") for name, child in (PRE, ("MLP", "mlp"), POST)): use(
                "gemma3.py:Sandwich"
            ),
            "RMSNorm": use("gemma3.py:OffsetNorm"),
        },
        True,
    ),
    "phi3-split": ("phi3", {NORM_MLP: use("phi3.py:SplitMLP")}, False),
    "phi3-renamed": ("phi3", {"MLP": use("phi3.py:RenamedMLP")}, True),
    "qwen3_moe": ("qwen3_moe", {"Experts": use("experts.py:TransposedExperts")}, False),
    "mixtral": ("mixtral", {"Experts": use("experts.py:RestackedExperts")}, False),
    "bert": (
        "bert",
        {
            "LayerNorm": use("encoder.py:AffineNorm"),
            pair(
                ("Intermediate", "intermediate"), ("Output", "output"), "bert.encoder.layer.*"
            ): use("encoder.py:BertFeedForward"),
        },
        True,
    ),
    "vit": (
        "vit",
        {pair(("LayerNorm", "layernorm_after"), ("MLP", "mlp"), "vit.layers.*"): use("encoder.py:VitFeedForward")},
        False,
    ),
}


def case(name):
    kind, mapping, exact = CASES[name]
    return kind, KernelConfig(mapping, inherit_mapping=False), exact


def run(model, kind):
    with torch.no_grad():
        return model(**tiny.inputs(kind)).logits


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_loaded_run_saved_and_ungrafted(name, checkpoint, tmp_path):
    kind, config, exact = case(name)
    folder = checkpoint(kind)
    plain = tiny.model_class(kind).from_pretrained(folder)
    model = kernelgraft.from_pretrained(tiny.model_class(kind), folder, kernel_config=config)
    graft = kernelgraft.graft_of(model)
    assert graft.plan.sites
    expected = run(plain, kind)

    out = run(model, kind)
    if exact:
        assert torch.equal(out, expected)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert graft.calls.reference == 0
    assert all(kernel >= 1 for kernel, _ in graft.calls.sites.values())

    with graft.reference():
        assert torch.equal(run(model, kind), expected)
        ours, theirs = original_gradients(model, graft, kind), tiny.gradients(plain, kind)
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        assert (gradient is None) == (ours[key] is None), key
        assert gradient is None or torch.equal(ours[key], gradient), key

    model.save_pretrained(tmp_path / "grafted")
    plain.save_pretrained(tmp_path / "plain")
    assert_same_files(tmp_path / "grafted", tmp_path / "plain")
    assert torch.equal(run(tiny.model_class(kind).from_pretrained(tmp_path / "grafted"), kind), expected)

    graft.remove()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert torch.equal(run(model, kind), expected)
    for (key, ours), (_, theirs) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), key


def original_gradients(model, graft, kind):
    """Gradients by original name: those of the packed parameters, read as the originals read from their values."""
    packed = tiny.gradients(model, kind)
    found = {}
    slots = graft._slots()
    for name, _ in plain_names(model):
        found[name] = packed.get(name)
        path = next((path for path in slots if name.startswith(f"{path}.")), None)
        if path is not None and name not in packed:
            slot = slots[path]
            part = slot.parts[name.removeprefix(f"{path}.")]
            host = slot.site.host
            if any(packed[f"{host}.{each}"] is None for each in part.packed):
                continue
            found[name] = part.read(lambda each, host=host: packed[f"{host}.{each}"])
    return found


def plain_names(model):
    state = model.state_dict(keep_vars=True)
    buffers = {name for name, _ in model.named_buffers()}
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    return [(name, tensor) for name, tensor in state.items() if name not in buffers and name not in tied]


def assert_same_files(folder, other):
    names = sorted(path.name for path in other.glob("*.safetensors"))
    assert sorted(path.name for path in folder.glob("*.safetensors")) == names
    for name in names:
        ours, theirs = load_file(folder / name), load_file(other / name)
        assert list(ours) == list(theirs)
        assert all(ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]) for key in theirs)


# --- a module that is not of Transformers


class Norm(nn.Module):
    def __init__(self, hidden, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.rand(hidden) + 0.5)

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Gate(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.w1 = nn.Linear(hidden, inner, bias=False)
        self.w2 = nn.Linear(hidden, inner, bias=False)
        self.w3 = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.norm, self.mlp = Norm(hidden), Gate(hidden, inner)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, x):
        return x + self.scale * self.mlp(self.norm(x))


class Tower(nn.Module):
    def __init__(self, hidden=16, inner=24, num_blocks=3):
        super().__init__()
        self.blocks = nn.ModuleList(Block(hidden, inner) for _ in range(num_blocks))
        self.head = nn.Linear(hidden, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


FUSED = KernelConfig({(("Norm", "blocks.*.norm"), ("Gate", "blocks.*.mlp")): use("plain.py:FastBlock")})
SINGLE = KernelConfig({"Gate": use("plain.py:FastMLP")})


@pytest.mark.parametrize("config", [FUSED, SINGLE], ids=["fused", "single"])
def test_a_plain_module_is_loaded_run_saved_and_ungrafted(config, tmp_path):
    torch.manual_seed(0)
    plain = Tower().eval()
    kernelgraft.save_pretrained(plain, tmp_path / "plain")
    with kernelgraft.recorded(), torch.device("meta"):
        model = Tower().eval()
    x = torch.randn(2, 5, 16)
    kernelgraft.load(model, tmp_path / "plain", config, example_inputs=torch.zeros(1, 16, device="meta"))
    graft = kernelgraft.graft_of(model)
    assert len(graft.plan.sites) == 3

    assert torch.equal(model(x), plain(x))
    assert graft.calls.kernel == 3
    with graft.reference():
        loss = model(x).square().mean()
    loss.backward()
    plain(x).square().mean().backward()

    kernelgraft.save_pretrained(model, tmp_path / "grafted")
    assert_same_files(tmp_path / "grafted", tmp_path / "plain")
    again = kernelgraft.load(Tower().eval(), tmp_path / "grafted")
    assert torch.equal(again(x), plain(x))

    graft.remove()  # gives the gradients back under original names too
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert torch.equal(ours.grad, theirs.grad), name
    assert torch.equal(model(x), plain(x))
