"""Models of which a part is here: half of the heads, of the MLP and of the vocabulary, as tensor parallelism cuts them.

The config keeps the sizes of the whole model, so that nothing that is read off it is right.
"""

import pytest
import torch
from drawn import DEVICE, beside_the_originals
from test_rms_norm_attention import FUSION, step
from torch import nn
from torch.nn import functional as F

import kernelgraft
import tiny
from kernelgraft.kernels.lazy_logits import LazyLogits

pytest.importorskip("triton")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.transformers, pytest.mark.usefixtures("few_are_four", "in_triton")]

NUM_LAYERS = 2
KERNELS = {
    "RMSNormAttention": FUSION,
    "SwiGLUMLP": "MLP",
    "DecoderLayer": "DecoderLayer",
}
MODELS = {
    "llama with biases": {"mlp_bias": True, "attention_bias": True},
    "qwen3": {"head_dim": 64},
}
CASES = [
    ("RMSNormAttention", "qwen3"),
    ("SwiGLUMLP", "llama with biases"),
    ("DecoderLayer", "llama with biases"),
    ("DecoderLayer", "qwen3"),
]


def halve(linear, dim):
    """Keep the first half of a linear layer's outputs (dim 0) or inputs (dim 1)."""
    linear.weight = nn.Parameter(linear.weight.detach().chunk(2, dim)[0].clone())
    if dim == 0 and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach().chunk(2)[0].clone())


def shard(name):
    model = tiny.model(name.partition(" ")[0], **MODELS[name]).to(DEVICE)
    for layer in model.model.layers:
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            halve(layer.get_submodule(part), 0)
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            halve(layer.get_submodule(part), 1)
    return model


def pair(kernel, name):
    """A shard as it is, and its grafted twin."""
    plain, grafted = shard(name), shard(name)
    config = grafted.config.to_dict()
    graft = kernelgraft.graft(grafted, {KERNELS[kernel]: f"kernelgraft.kernels:{kernel}"})
    assert len(graft.plan.sites) == NUM_LAYERS
    assert grafted.config.to_dict() == config == plain.config.to_dict()
    return plain, grafted, graft


@pytest.mark.parametrize(("kernel", "name"), CASES)
def test_half_of_the_heads_and_of_the_mlp(kernel, name):
    plain, grafted, graft = pair(kernel, name)
    for sizes in ({}, {"batch": 1, "length": 3}):  # 14 tokens, and few
        torch.testing.assert_close(tiny.logits(grafted, **sizes), tiny.logits(plain, **sizes))
    for each, grad, exact in beside_the_originals(tiny.gradients(grafted), graft, tiny.gradients(plain)):
        torch.testing.assert_close(grad, exact, atol=2e-6, rtol=1e-4, msg=each)
    assert (graft.calls.kernel, graft.calls.reference) == (3 * NUM_LAYERS, 0)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(("kernel", "name"), [case for case in CASES if case[0] != "SwiGLUMLP"])
def test_a_cache_has_half_of_the_heads(kernel, name, kind):
    plain, grafted, graft = pair(kernel, name)
    parts = tiny.inputs("qwen3", length=7)["input_ids"].split([5, 1, 1], dim=1)
    found = []
    for model in (plain, grafted):
        cache = transformers.DynamicCache() if kind == "dynamic" else transformers.StaticCache(model.config, 12)
        with torch.no_grad():
            logits = [step(model, part, cache).logits for part in parts]
        found.append([*logits, *(held for layer in cache.layers for held in (layer.keys, layer.values))])
    torch.testing.assert_close(found[1], found[0])
    assert {each.shape[1] for each in found[1][len(parts) :]} == {grafted.config.num_key_value_heads // 2}
    assert (graft.calls.kernel, graft.calls.reference) == (len(parts) * NUM_LAYERS, 0)


def test_the_state_is_the_shards():
    plain, grafted, graft = pair("DecoderLayer", "llama with biases")
    saved, wanted = grafted.state_dict(), plain.state_dict()
    assert list(saved) == list(wanted)
    graft.remove()
    for state in (saved, grafted.state_dict()):
        assert all(torch.equal(state[each], wanted[each]) for each in wanted)


def test_half_of_the_vocabulary():
    """The loss is of the classes that are here; a model's own loss views logits by the config's size."""
    found = []
    for grafts in (False, True):
        model = shard("qwen3")
        halve(model.lm_head, 0)
        config = model.config.to_dict()
        if grafts:
            graft = kernelgraft.graft(model, {("Linear", "lm_head"): "kernelgraft.kernels:LinearCrossEntropy"})
            assert len(graft.plan.sites) == 1
        given = tiny.inputs_of(model, "qwen3", batch=5, length=20)
        labels = given["input_ids"] % 32
        labels[:, :3] = -100
        logits = model(**given).logits
        assert (type(logits) is LazyLogits) is grafts
        assert logits.shape == (5, 20, 32)
        loss = F.cross_entropy(logits.float().view(-1, 32), labels.view(-1))
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        assert model.config.to_dict() == config
    assert graft.calls.kernel == 1
    torch.testing.assert_close(*found, atol=2e-6, rtol=1e-4)
