"""Whole decoder layers in models: numbers, gradients, caches, and what is refused."""

import copy

import pytest
import torch
from drawn import DEVICE, DTYPES, beside_the_originals, close, few, tensor
from hypothesis import given
from hypothesis import strategies as st

import kernelgraft
import tiny
from kernelgraft.errors import PlanError
from kernelgraft.kernels import decoder_layer, rms_norm

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


def pair(name, dtype=torch.float32, **changes):
    kind = name.partition(" ")[0]
    plain, grafted = (tiny.model(kind, **{**MODELS[name], **changes}).to(DEVICE, dtype) for _ in range(2))
    graft = kernelgraft.graft(grafted, KERNEL)
    assert len(graft.plan.sites) == grafted.config.num_hidden_layers
    return plain, grafted, graft


def one_layer(model, batch, tokens, trains=True):
    """What a model's first layer makes of drawn hidden states, and the gradients of a loss over it, by name."""
    parameter = next(model.parameters())
    x = tensor(batch, tokens, model.config.hidden_size).to(parameter.dtype).requires_grad_(trains)
    angles = model.model.rotary_emb(x.detach(), torch.arange(tokens, device=DEVICE)[None])
    layer = model.model.layers[0]
    with torch.set_grad_enabled(trains):
        y = layer(x, position_embeddings=tuple(each.to(x.dtype) for each in angles))
    if not trains:
        return y, {}
    named = {"x": x} | {f"model.layers.0.{name}": each for name, each in layer.named_parameters() if each.requires_grad}
    grads = torch.autograd.grad(y, named.values(), tensor(*y.shape, seed=1).to(y.dtype))
    return y.detach(), dict(zip(named, grads, strict=True))


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


@pytest.mark.parametrize(
    "learns", ["nothing", "input_layernorm", "post_attention_layernorm", "mlp", "down_proj", "self_attn"]
)
def test_only_gradients_that_are_wanted(learns, in_triton):
    """Of parameters by a part of their original names, and of the layer's input in any case."""
    plain, grafted, graft = pair("llama with biases")
    found, outputs = [], []
    for model in (plain, grafted):
        of = {packed: name for name, parts in graft.names.items() for packed in parts} if model is grafted else {}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learns in of.get(name, name))
        y, grads = one_layer(model, 2, 7)
        outputs.append(y)
        found.append(grads)
    torch.testing.assert_close(*outputs)
    assert (len(found[1]) == 1) is (learns == "nothing")
    for name, grad, exact in beside_the_originals(found[1], graft, found[0]):
        torch.testing.assert_close(grad, exact, atol=2e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("trains", [False, True])
def test_the_first_sum_is_in_the_norm(trains, in_triton, monkeypatch):
    """And in training what comes to it past the MLP is added in the norm's backward."""
    _, grafted, _ = pair("qwen3")
    seen = {"launch": [], "launch_backward": []}
    for name, adds in seen.items():
        run = getattr(rms_norm, name)

        def noted(first, added, *rest, run=run, adds=adds):
            adds.append(added is not None)
            return run(first, added, *rest)

        monkeypatch.setattr(rms_norm, name, noted)
    one_layer(grafted, 2, 7, trains)
    # In training the norm behind the sum is computed again.
    assert seen == {"launch": [False, True, *[False] * trains], "launch_backward": [True, False] if trains else []}


@given(
    name=st.sampled_from([*MODELS]),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    head_dim=st.sampled_from([2, 6, 16, 40, 64]),
    per_head=st.sampled_from([3, 8, 20]),
    width=st.sampled_from([8, 44]),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 6),
)
@few
def test_drawn_sizes(name, kv_heads, groups, head_dim, per_head, width, batch, tokens, in_triton):
    heads = kv_heads * groups
    hidden = heads * per_head
    plain, grafted, graft = pair(
        name,
        num_hidden_layers=1,
        num_key_value_heads=kv_heads,
        num_attention_heads=heads,
        head_dim=head_dim,
        hidden_size=hidden,
        intermediate_size=width,
    )
    exact, wanted = one_layer(plain.double(), batch, tokens)
    terms = max(hidden, width, heads * head_dim)
    for trains in (False, True):
        y, found = one_layer(grafted, batch, tokens, trains)
        close(y, exact, torch.float32, terms, size=2 * exact.abs().max())
    for each, grad, original in beside_the_originals(found, graft, wanted):
        cancels = 10 if each.endswith(("q_norm_weight", "k_norm_weight")) else 2  # far smaller than their terms
        close(grad, original, torch.float32, terms + batch * tokens, size=cancels * original.abs().max())
    assert (graft.calls.kernel, graft.calls.reference) == (2, 0)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["llama with biases", "qwen3"])
def test_in_half_precision(name, dtype, in_triton):
    plain, grafted, graft = pair(name, dtype)
    exact, exact_grads = one_layer(copy.deepcopy(plain).float(), 2, 7)
    y, found = one_layer(grafted, 2, 7)
    eager, eager_grads = one_layer(plain, 2, 7)
    assert y.dtype == dtype
    assert (y - exact).norm() < 2 * (eager - exact).norm()
    wanted, original = (
        {each: grad for each, _, grad in beside_the_originals(found, graft, grads)}
        for grads in (exact_grads, eager_grads)
    )
    assert {grad.dtype for grad in found.values()} == {dtype}
    ours = {each: (found[each] - grad).norm() for each, grad in wanted.items()}
    theirs = {each: (original[each] - grad).norm() for each, grad in wanted.items()}
    assert torch.stack([*ours.values()]).norm() < 2 * torch.stack([*theirs.values()]).norm()
    assert all(ours[each] < 2 * theirs[each] for each in wanted)


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
    inputs = {name: each.to(DEVICE) for name, each in tiny.inputs("qwen3", batch=1, length=6).items()}
    compiled = torch.compile(grafted, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(trains):
        out, wanted = (model(**inputs, use_cache=False).logits for model in (compiled, grafted))
    torch.testing.assert_close(out, wanted)
    if trains:
        parameters = [*grafted.parameters()]
        grads, exact = (torch.autograd.grad(each.pow(2).mean(), parameters) for each in (out, wanted))
        torch.testing.assert_close(grads, exact, atol=2e-6, rtol=1e-4)


def test_with_activation_checkpointing():
    plain, grafted, graft = pair("qwen3")
    tiny.switch_checkpointing(grafted, True)
    grafted.train()
    for name, grad, exact in beside_the_originals(tiny.gradients(grafted), graft, tiny.gradients(plain.train())):
        torch.testing.assert_close(grad, exact, msg=name)


def test_verified():
    _, _, graft = pair("qwen3")
    graft.verify(every_site=False).raise_for_failures()


def test_what_it_takes_and_what_not_is_said():
    def said(*shape, dtype=torch.float32, angles=((1, 3, 8), (1, 3, 8)), of_angles=torch.float32, requires_grad=False):
        given = tuple(torch.empty(*each, dtype=of_angles, requires_grad=requires_grad) for each in angles)
        return decoder_layer.DecoderLayerLayout.supports(
            torch.empty(*shape, dtype=dtype, requires_grad=True), None, position_embeddings=given or None
        )

    assert said(2, 3, 16) is said(0, 3, 16) is said(2, 3, 32768) is True
    for dtype in DTYPES:
        assert said(2, 3, 16, dtype=dtype) is said(2, 3, 16, dtype=dtype, of_angles=dtype) is True
    assert said(2, 3, 16, angles=((2, 3, 8), (2, 3, 8))) is True
    assert said(3, 16) == "hidden states are (B, T, H), and not (3, 16)"
    assert "rows of up to 32768 numbers, and not 40000" in said(1, 3, 40000)
    assert said(2, 3, 16, angles=()) == said(2, 3, 16, angles=((3, 8), (3, 8)))
    assert "needs cos and sin, (B or 1, T, D), as position_embeddings" in said(2, 3, 16, angles=())
    assert said(2, 3, 16, requires_grad=True) == "no gradient goes to position_embeddings"
    assert "and not torch.float64" in said(2, 3, 16, dtype=torch.float64)
    assert "and not torch.float64" in said(2, 3, 16, of_angles=torch.float64)


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
