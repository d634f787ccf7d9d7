"""Whole decoder layers in models: numbers, gradients, caches, and what is refused."""

import pytest
import torch
from drawn import DEVICE, beside_the_originals

import kernelgraft
import tiny
from kernelgraft.errors import PlanError
from kernelgraft.kernels import decoder_layer

pytest.importorskip("triton")
pytestmark = [pytest.mark.transformers, pytest.mark.usefixtures("few_are_four")]

KERNEL = {"DecoderLayer": "kernelgraft.kernels:DecoderLayer"}
MODELS = {
    "llama": {},
    "llama with biases": {"mlp_bias": True, "attention_bias": True},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
}


def pair(name):
    kind = name.partition(" ")[0]
    plain, grafted = (tiny.model(kind, **MODELS[name]).to(DEVICE) for _ in range(2))
    graft = kernelgraft.graft(grafted, KERNEL)
    assert len(graft.plan.sites) == 2
    return plain, grafted, graft


@pytest.mark.skipif(DEVICE != "cpu", reason="bit for bit is a promise of the CPU")
@pytest.mark.parametrize("name", MODELS)
def test_on_a_cpu_it_is_the_original_bit_for_bit(name):
    plain, grafted, graft = pair(name)
    assert torch.equal(tiny.logits(grafted), tiny.logits(plain))
    assert torch.equal(tiny.generate(grafted), tiny.generate(plain))
    assert graft.calls.reference == 0
    state = grafted.state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    graft.remove()
    assert torch.equal(tiny.logits(grafted), tiny.logits(plain))


@pytest.mark.parametrize("name", MODELS)
def test_in_triton(name, in_triton):
    plain, grafted, graft = pair(name)
    torch.testing.assert_close(tiny.logits(grafted), tiny.logits(plain))  # 14 tokens
    torch.testing.assert_close(tiny.logits(grafted, batch=1, length=3), tiny.logits(plain, batch=1, length=3))
    assert (graft.calls.kernel, graft.calls.reference) == (4, 0)


@pytest.mark.parametrize("name", ["llama with biases", "qwen3"])
def test_gradients_in_triton(name, in_triton):
    plain, grafted, graft = pair(name)
    for name, grad, exact in beside_the_originals(tiny.gradients(grafted), graft, tiny.gradients(plain)):
        torch.testing.assert_close(grad, exact, atol=2e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_in_triton(cache, in_triton):
    plain, grafted, graft = pair("qwen3")
    prompt = tiny.inputs("qwen3", batch=2, length=2)["input_ids"].to(DEVICE)
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    wanted = plain.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(grafted.generate(prompt, attention_mask=torch.ones_like(prompt), **options), wanted)
    assert (graft.calls.kernel, graft.calls.reference) == (6, 0)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("trains", [False, True])
def test_compiled_in_one_piece(trains, in_triton):
    _, grafted, _ = pair("qwen3")
    given = {name: each.to(DEVICE) for name, each in tiny.inputs("qwen3", batch=1, length=6).items()}
    compiled = torch.compile(grafted, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(trains):
        torch.testing.assert_close(compiled(**given, use_cache=False).logits, grafted(**given, use_cache=False).logits)


def test_with_activation_checkpointing():
    plain, grafted, graft = pair("qwen3")
    tiny.switch_checkpointing(grafted, True)
    grafted.train()
    for name, grad, exact in beside_the_originals(tiny.gradients(grafted), graft, tiny.gradients(plain.train())):
        torch.testing.assert_close(grad, exact, msg=name)


def test_verified():
    _, _, graft = pair("qwen3")
    graft.verify(every_site=False).raise_for_failures()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("gemma3", "reads .*pre_feedforward_layernorm.*, and a pre-norm layer as Llama's reads input_layernorm"),
        ("cohere", "and a pre-norm layer as Llama's reads input_layernorm, mlp, post_attention_layernorm, self_attn"),
        ("phi3", "reads .*resid_attn_dropout"),
    ],
)
def test_other_layers_are_refused(kind, said):
    with pytest.raises(PlanError, match=said):
        kernelgraft.graft(tiny.model(kind), KERNEL)


def test_other_sums_are_refused():
    class Layer(torch.nn.Module):
        def forward(self, hidden_states):
            h = hidden_states + self.self_attn(self.input_layernorm(hidden_states))
            return h - self.mlp(self.post_attention_layernorm(h))

    with pytest.raises(ValueError, match=r"Layer.forward does not add two residuals and nothing else: \['\+', '-'\]"):
        decoder_layer._check_layer(Layer())
