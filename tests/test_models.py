"""Kernels in every kind of model: loaded from a checkpoint, run, saved, loaded by plain Transformers, taken out."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import kernelgraft
import tiny
from kernelgraft import KernelConfig
from kernelgraft.errors import PlanError
from kernelgraft.soundness import FusionSite, check_soundness, forward_runner

pytestmark = pytest.mark.transformers

REPOSITORIES = Path(__file__).parent / "repositories"
LAYER = "model.layers.*"
NORM_MLP = (("RMSNorm", f"{LAYER}.post_attention_layernorm"), ("MLP", f"{LAYER}.mlp"))
BEFORE = ("RMSNorm", f"{LAYER}.pre_feedforward_layernorm")
MLP = ("MLP", f"{LAYER}.mlp")
AFTER = ("RMSNorm", f"{LAYER}.post_feedforward_layernorm")
BERT_LAYER = "bert.encoder.layer.*"
BERT_FEED_FORWARD = (("Intermediate", f"{BERT_LAYER}.intermediate"), ("Output", f"{BERT_LAYER}.output"))
VIT_FEED_FORWARD = (("LayerNorm", "vit.layers.*.layernorm_after"), ("MLP", "vit.layers.*.mlp"))


def use(text):
    """A reference to a kernel in `repositories/`."""
    return f"{REPOSITORIES}/{text}"


@dataclass
class Case:
    """One kind of model with kernels in it.

    Attributes:
        kind: The model, by its name in `tiny`.
        kernels: A `kernel_mapping` whose references are relative to `repositories/`.
        num_sites: How many sites there shall be.
        exact: Whether the kernels do the original's arithmetic in its order.
        changes: What is changed in the model's config.
        same_blas: Whether the original, on views of the packed weights, gets gradients bit for bit. Where a weight is
            transposed in memory, matrix products add up in another order.
    """

    kind: str
    kernels: dict
    num_sites: int
    exact: bool = True
    changes: dict = field(default_factory=dict)
    same_blas: bool = True

    @property
    def config(self):
        mapping = {key: use(reference) for key, reference in self.kernels.items()}
        return KernelConfig(mapping, inherit_mapping=False)

    def __str__(self):
        names = "+".join(reference.partition(":")[2] for reference in self.kernels.values())
        return f"{self.kind}-{names}{''.join(f'-{name}' for name in self.changes)}"


CASES = [
    Case("llama", {NORM_MLP: "gated.py:NormMLP"}, 2),
    Case("llama", {NORM_MLP: "gated.py:NormMLPByRules"}, 2),
    Case("llama", {"Attention": "attention.py:MergedAttention"}, 2),
    Case("llama", {"Attention": "attention.py:MergedAttention"}, 2, changes={"attention_bias": True}),
    Case("qwen2", {NORM_MLP: "gated.py:NormMLPByRules", "Attention": "attention.py:MergedAttention"}, 4),
    Case("qwen3", {NORM_MLP: "gated.py:NormMLP", "Attention": "attention.py:NormedAttention"}, 4),
    Case("qwen3", {NORM_MLP: "gated.py:NormMLPByRules"}, 2, changes={"tie_word_embeddings": True}),
    Case("mistral", {NORM_MLP: "gated.py:NormMLP", "Attention": "attention.py:MergedAttention"}, 4),
    Case("phi3", {NORM_MLP: "phi3.py:SplitMLP"}, 2, exact=False),
    Case("phi3", {"MLP": "phi3.py:RenamedMLP"}, 2),
    Case("gemma3", {(BEFORE, MLP): "gemma3.py:PreNormMLP", "RMSNorm": "gemma3.py:OffsetNorm"}, 13),
    Case("gemma3", {(MLP, AFTER): "gemma3.py:MLPPostNorm"}, 2),
    Case("gemma3", {(BEFORE, MLP, AFTER): "gemma3.py:Sandwich"}, 2),
    Case("qwen3_moe", {"Experts": "experts.py:TransposedExperts"}, 2, exact=False, same_blas=False),
    Case(
        "qwen3_moe", {"Experts": "experts.py:RestackedExperts", "Attention": "attention.py:NormedAttention"}, 4, False
    ),
    Case(
        "mixtral",
        {"Experts": "experts.py:TransposedExperts", "Attention": "attention.py:MergedAttention"},
        4,
        False,
        same_blas=False,
    ),
    Case("mixtral", {"Experts": "experts.py:RestackedExperts"}, 2, exact=False),
    Case("bert", {"LayerNorm": "encoder.py:AffineNorm"}, 6),
    Case("bert", {BERT_FEED_FORWARD: "encoder.py:BertFeedForward", "LayerNorm": "encoder.py:AffineNorm"}, 6),
    Case("vit", {"LayerNorm": "encoder.py:AffineNorm"}, 5),
    Case(
        "vit",
        {VIT_FEED_FORWARD: "encoder.py:VitFeedForward", "LayerNorm": "encoder.py:AffineNorm"},
        5,
        exact=False,
        same_blas=False,
    ),
]


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def backward(model, kind):
    model(**tiny.inputs(kind)).logits.pow(2).mean().backward()


def grads(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(found, expected):
    """Two dicts of tensors with the same keys in the same order, bit for bit; `None` where there is no tensor."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        if tensor is None:
            assert found[name] is None, name
        else:
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name


def assert_close(found, expected, rtol):
    """The same, but each value may be off by `rtol` of it or of the largest in its tensor.

    What is nothing but rounding, as the gradient of a key's bias before a softmax, is measured on all tensors.
    """
    assert list(found) == list(expected)
    given = [tensor for tensor in expected.values() if tensor is not None]
    nothing = 1e-3 * torch.finfo(given[0].dtype).eps * max(float(tensor.abs().max()) for tensor in given)
    for name, tensor in expected.items():
        if tensor is None:
            assert found[name] is None, name
        else:
            atol = max(rtol * float(tensor.abs().max()), nothing)
            torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_load_run_save_reload_remove(case, checkpoint, tmp_path):
    folder, kind = checkpoint(case.kind, **case.changes), case.kind
    cls = tiny.model_class(kind)
    plain = cls.from_pretrained(folder)
    model = kernelgraft.from_pretrained(cls, folder, kernel_config=case.config)
    graft = kernelgraft.graft_of(model)
    assert len(graft.plan.sites) == case.num_sites
    assert isinstance(model, cls)
    assert not model.training

    expected = tiny.logits(plain, kind)
    found = tiny.logits(model, kind)
    assert (graft.calls.kernel, graft.calls.reference) == (case.num_sites, 0)
    if case.exact:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    with graft.reference():
        found = tiny.logits(model, kind)
    if case.same_blas:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    assert_same(model.state_dict(), plain.state_dict())
    kernelgraft.save_pretrained(model, tmp_path)
    assert_same(load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors"))
    assert (tmp_path / "config.json").read_text() == (folder / "config.json").read_text()
    reloaded = cls.from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(reloaded, kind), expected)

    backward(plain, kind)
    with graft.reference():
        backward(model, kind)
    graft.remove()
    assert kernelgraft.graft_of(model) is None
    assert {name: type(m) for name, m in model.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
    if case.same_blas:
        assert_same(grads(model), grads(plain))
    else:
        assert_close(grads(model), grads(plain), 1e-5)
    assert_same(model.state_dict(), plain.state_dict())
    assert torch.equal(tiny.logits(model, kind), expected)


@pytest.mark.parametrize("kind", dict.fromkeys(case.kind for case in CASES))
def test_weights_are_those_of_a_plain_load(kind, tmp_path):
    """Whatever dtype the file has and whatever is asked for, the state dict has the bits that Transformers gives."""
    cls, cases = tiny.model_class(kind), [case for case in CASES if case.kind == kind]
    for (number, case), stored in itertools.product(enumerate(cases), DTYPES):
        folder = tmp_path / f"{number}-{stored}"
        tiny.model(kind, **case.changes).to(stored).save_pretrained(folder)
        for asked in (None, "auto", *DTYPES):
            plain = cls.from_pretrained(folder, dtype=asked)
            model = kernelgraft.from_pretrained(cls, folder, kernel_config=case.config, dtype=asked)
            assert len(kernelgraft.graft_of(model).plan.sites) == case.num_sites
            assert_same(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_through_the_kernels_are_close(case, checkpoint):
    """The same loss in float64, where nothing but the order of operations differs."""
    folder, cls = checkpoint(case.kind, **case.changes), tiny.model_class(case.kind)
    options = {"dtype": torch.float64}
    if "Experts" in case.kernels:
        options["experts_implementation"] = "eager"  # the others know no float64
    plain = cls.from_pretrained(folder, **options)
    model = kernelgraft.from_pretrained(cls, folder, kernel_config=case.config, **options)
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in tiny.inputs(case.kind).items()}
    for each in (plain, model):
        each(**inputs).logits.pow(2).mean().backward()
    graft = kernelgraft.graft_of(model)
    assert (graft.calls.kernel, graft.calls.reference) == (case.num_sites, 0)
    graft.remove()
    assert_close(grads(model), grads(plain), 1e-5)  # the norms of these models compute in float32 whatever the dtype is


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "mixtral"])
def test_tokens_are_the_originals_with_a_cache(kind, checkpoint):
    case = next(case for case in CASES if case.kind == kind)
    cls, folder = tiny.model_class(kind), checkpoint(kind)
    plain = cls.from_pretrained(folder)
    model = kernelgraft.from_pretrained(cls, folder, kernel_config=case.config)
    assert torch.equal(tiny.generate(model), tiny.generate(plain))
    assert kernelgraft.graft_of(model).calls.reference == 0


GEMMA3_PAIRS = {
    ("input_layernorm", "self_attn"): True,
    ("self_attn", "post_attention_layernorm"): True,
    ("pre_feedforward_layernorm", "mlp"): True,
    ("mlp", "post_feedforward_layernorm"): True,
    ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"): True,
    ("input_layernorm", "mlp"): False,  # attention stands between them
    ("post_attention_layernorm", "mlp"): False,  # a residual is added between them
    ("post_attention_layernorm", "pre_feedforward_layernorm"): False,
}


@pytest.mark.parametrize("children", GEMMA3_PAIRS, ids="+".join)
def test_which_pairs_of_gemma3_are_sound(children):
    with torch.device("meta"):
        model = tiny.model_class("gemma3")(tiny.config("gemma3"))
    sites = [
        FusionSite(parent, tuple(f"{parent}.{child}" for child in children), f"{parent}.{children[0]}")
        for parent in ("model.layers.0", "model.layers.1")
    ]
    verdicts = check_soundness(model, sites, forward_runner(model), live=False)
    assert [verdicts[site].sound for site in sites] == [GEMMA3_PAIRS[children]] * 2


def test_an_unsound_pair_of_gemma3_is_refused(checkpoint):
    pair = (("RMSNorm", f"{LAYER}.post_attention_layernorm"), MLP)
    config = KernelConfig({pair: use("gemma3.py:PreNormMLP")}, inherit_mapping=False)
    with pytest.raises(PlanError, match="not sound: the output of 'post_attention_layernorm' is also used by add"):
        kernelgraft.from_pretrained(tiny.model_class("gemma3"), checkpoint("gemma3"), kernel_config=config)


def test_the_kinds_are_those_that_are_promised():
    promised = ["llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "qwen3_moe", "mixtral", "bert", "vit"]
    assert {case.kind for case in CASES} == set(promised)


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
    assert_same(*(load_file(tmp_path / name / "model.safetensors") for name in ("grafted", "plain")))
    again = kernelgraft.load(Tower().eval(), tmp_path / "grafted")
    assert torch.equal(again(x), plain(x))

    graft.remove()  # gives the gradients back under original names too
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert torch.equal(ours.grad, theirs.grad), name
    assert torch.equal(model(x), plain(x))
