"""RMS norm and attention in one: in models of Transformers, in plain torch bit for bit, and in Triton."""

import copy
import inspect

import pytest
import torch
from drawn import DEVICE, DTYPES, beside_the_originals, by_inductor
from torch import nn

import kernelgraft
from kernelgraft.errors import PlanError
from kernelgraft.kernels import rms_norm_attention

pytest.importorskip("triton")
tiny = pytest.importorskip("tiny")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.transformers

FUSION = (("RMSNorm", "model.layers.*.input_layernorm"), ("Attention", "model.layers.*.self_attn"))
KINDS = ["llama", "qwen2", "qwen3", "mistral", "gemma3"]
NUM_LAYERS = 2
SLIDING = {"mistral": {"sliding_window": 4}, "gemma3": {"sliding_window": 4}}
MODELS = {
    **{kind: (kind, {}) for kind in KINDS},
    "llama with biases": ("llama", {"attention_bias": True}),
    "qwen3 with a sliding window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mistral with a sliding window": ("mistral", SLIDING["mistral"]),
    "heads of 64": ("qwen3", {"head_dim": 64}),
}


def pair(name, implementation="sdpa", dtype=torch.float32, **changes):
    """A model as it is, and its grafted twin."""
    kind, own = MODELS[name]
    plain, grafted = (tiny.model(kind, **{**own, **changes}).to(DEVICE, dtype) for _ in range(2))
    for model in (plain, grafted):
        model.set_attn_implementation(implementation)
    graft = kernelgraft.graft(grafted, {FUSION: "kernelgraft.kernels:RMSNormAttention"})
    assert len(graft.plan.sites) == NUM_LAYERS
    return plain, grafted, graft


def batch(padded=None, length=7):
    """Two prompts, of which the first is padded."""
    given = {"input_ids": tiny.inputs("llama", length=length)["input_ids"].to(DEVICE)}
    if padded is not None:
        mask = torch.ones_like(given["input_ids"])
        mask[0, slice(None, 3) if padded == "left" else slice(-3, None)] = 0
        given["attention_mask"] = mask
    return given


def step(model, part, cache):
    """One forward that goes on with a cache, whose name differs between versions of Transformers."""
    arguments = inspect.signature(model.forward).parameters
    return model(part.to(DEVICE), **{"cache" if "cache" in arguments else "past_key_values": cache})


def logits(model, **given):
    with torch.no_grad():
        return model(**given).logits


def generated(model, cache, num_tokens=6, padded="left", **options):
    return model.generate(
        **batch(padded), max_new_tokens=num_tokens, do_sample=False, cache_implementation=cache, disable_compile=True,
        **options,
    )  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="bit for bit is a promise of the CPU")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_on_a_cpu_it_is_the_original_bit_for_bit(name, implementation):
    plain, grafted, graft = pair(name, implementation)
    positions = torch.arange(7).expand(2, -1) * 2 + torch.tensor([[3], [0]])
    calls = [batch(), batch("left"), batch("right"), {**batch(), "position_ids": positions}]
    for given in calls:
        assert torch.equal(logits(grafted, **given), logits(plain, **given))
    assert graft.calls.kernel == NUM_LAYERS * len(calls)
    for cache in ("dynamic", "static"):
        assert torch.equal(generated(grafted, cache), generated(plain, cache))
    assert graft.calls.reference == 0


IN_TRITON = ["llama", "qwen2", "qwen3", "gemma3", "mistral with a sliding window"]


@pytest.mark.parametrize(("name", "implementation"), [*((name, "sdpa") for name in IN_TRITON), ("qwen3", "eager")])
def test_in_triton(name, implementation, in_triton):
    plain, grafted, graft = pair(name, implementation)
    positions = (torch.arange(7).expand(2, -1) * 2 + torch.tensor([[3], [0]])).to(DEVICE)
    given = {**batch("left"), "position_ids": positions}
    torch.testing.assert_close(logits(grafted, **given), logits(plain, **given))
    assert (graft.calls.kernel, graft.calls.reference) == (NUM_LAYERS, 0)


@pytest.mark.parametrize(
    ("name", "cache", "later_by"),
    [
        ("heads of 64", "dynamic", "decode_attention.launch"),
        ("heads of 64", "static", "decode_attention.launch"),
        # The other models' heads are too short for it.
        ("mistral with a sliding window", "dynamic", "rotary.launch"),
        ("mistral with a sliding window", "static", "rotary.launch"),  # it rolls, by code of its own
        ("llama", "static", "rotary.launch_into"),
    ],
)
def test_tokens_in_triton(name, cache, later_by, in_triton, launched):
    plain, grafted, _ = pair(name)
    num_tokens = 3
    assert torch.equal(generated(grafted, cache, num_tokens), generated(plain, cache, num_tokens))
    wanted = dict.fromkeys(launched, 0)
    wanted["rotary.launch"] = NUM_LAYERS  # at the first step a cache is not there yet
    wanted[later_by] += (num_tokens - 1) * NUM_LAYERS
    assert launched == wanted


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["qwen3", "heads of 64"])
def test_the_cache_holds_what_it_holds_without(name, kind, in_triton):
    plain, grafted, _ = pair(name)
    caches = []
    for model in (plain, grafted):
        cache = transformers.DynamicCache() if kind == "dynamic" else transformers.StaticCache(model.config, 12)
        given = batch(length=9)["input_ids"]
        with torch.no_grad():
            for part in (given[:, :6], given[:, 6:8], given[:, 8:]):
                step(model, part, cache)
        caches.append(cache)
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close(other.keys, one.keys)
        torch.testing.assert_close(other.values, one.values)
        assert int(one.get_seq_length()) == int(other.get_seq_length()) == 9


def original_gradients(model, graft=None, kind="llama"):
    """Gradients under the original names, which a grafted model's parameters take on when the graft is removed."""
    grads = tiny.gradients(model.float(), kind)
    model = copy.deepcopy(model) if graft is None else model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(grads[name])
    if graft is not None:
        assert (graft.calls.kernel, graft.calls.reference) == (NUM_LAYERS, 0)
        graft.remove()
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    ("name", "triton"), [*((name, False) for name in MODELS), *((name, True) for name in ("qwen2", "qwen3", "gemma3"))]
)
def test_gradients_under_the_original_names(name, triton, request):
    if triton:
        request.getfixturevalue("in_triton")
    plain, grafted, graft = pair(name)
    kind = MODELS[name][0]
    wanted, found = original_gradients(plain, kind=kind), original_gradients(grafted, graft, kind)
    assert found.keys() == wanted.keys()
    for each, grad in wanted.items():
        torch.testing.assert_close(found[each], grad, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", [None, "dynamic", "static"], ids=["no cache", "dynamic", "static"])
def test_one_token_with_a_gradient(kind, in_triton, launched):
    """The kernels of a decoding step record no gradient, and are not launched."""
    plain, grafted, graft = pair("heads of 64")
    found = []
    for model in (plain, grafted):
        before, token = batch()["input_ids"].split([6, 1], dim=1)
        if kind:
            cache = transformers.DynamicCache() if kind == "dynamic" else transformers.StaticCache(model.config, 12)
            with torch.no_grad():
                step(model, before, cache)
        counts = dict(launched)
        out = (step(model, token, cache) if kind else model(token, use_cache=False)).logits
        parameters = dict(model.named_parameters())
        grads = torch.autograd.grad(out.float().pow(2).mean(), parameters.values(), allow_unused=True)
        found.append((out, dict(zip(parameters, grads, strict=True))))
    torch.testing.assert_close(found[1][0], found[0][0])
    for name, grad, exact in beside_the_originals(found[1][1], graft, found[0][1]):
        torch.testing.assert_close(grad, exact, atol=2e-6, rtol=1e-4, msg=name)
    assert launched == {**counts, "rotary.launch": counts["rotary.launch"] + NUM_LAYERS}
    assert launched["one_token_attention.launch"] == launched["decode_attention.launch"] == 0


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_in_half_precision(dtype, in_triton):
    plain, grafted, _ = pair("qwen3", dtype=dtype)
    exact = logits(copy.deepcopy(plain).float(), **batch())
    ours, theirs = ((logits(each, **batch()).float() - exact).abs().mean() for each in (grafted, plain))
    assert ours < 2 * theirs + 1e-4


def test_under_autocast(in_triton):
    plain, grafted, _ = pair("qwen3")
    with torch.autocast(DEVICE, torch.bfloat16):
        found, wanted = logits(grafted, **batch()), logits(plain, **batch())
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("name", "triton"), [("qwen3", True), ("mistral", False)])
def test_compiled_in_one_piece(name, triton, request):
    torch._dynamo.reset()  # after another length of other tests this one would be symbolic, and take twice as long
    if triton:
        request.getfixturevalue("in_triton")
    plain, grafted, _ = pair(name)
    compiled = torch.compile(grafted, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, **batch()), logits(plain, **batch()))
    for model in (compiled, plain):
        tiny.loss(model, name).backward()
    grads = [model.model.embed_tokens.weight.grad for model in (grafted, plain)]
    torch.testing.assert_close(*grads, atol=2e-6, rtol=1e-4)


BACKENDS = ["aot_eager", pytest.param("inductor", marks=by_inductor)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_decoding_compiled_in_one_piece(kind, backend, in_triton, launched):
    """What a layer writes may not change what the layers behind it are given, whenever a compiler computes that."""
    torch._dynamo.reset()  # code that other tests have compiled counts towards the limit
    plain, grafted, _ = pair("heads of 64")
    found = []
    for model in (plain, grafted):
        cache = transformers.DynamicCache() if kind == "dynamic" else transformers.StaticCache(model.config, 12)
        run = torch.compile(model, fullgraph=True, backend=backend) if model is grafted else model
        first, *rest = batch()["input_ids"].split([5, 1, 1], dim=1)
        with torch.no_grad():
            step(model, first, cache)
            before = dict(launched)
            logits = [step(run, each, cache).logits for each in rest]
        found.append([*logits, *(held for layer in cache.layers for held in (layer.keys, layer.values))])
    torch.testing.assert_close(found[1], found[0])
    before["decode_attention.launch"] += 2 * NUM_LAYERS
    assert launched == before


def test_the_weights_of_attention_are_given_where_the_original_gives_them(in_triton):
    """Those come from the host, which is still there; the norm, which is not, gives none."""
    for implementation in ("eager", "sdpa"):
        plain, grafted, _ = pair("heads of 64", implementation)
        with torch.no_grad():
            given = {"input_ids": batch()["input_ids"][:, :1], "output_attentions": True}
            wanted, found = plain(**given).attentions, grafted(**given).attentions
        assert len(found) == len(wanted) == (NUM_LAYERS if implementation == "eager" else 0)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_verified(name):
    _, _, graft = pair(name)
    graft.verify(every_site=False).raise_for_failures()


def test_names_and_values_of_a_checkpoint_are_the_originals():
    for name in MODELS:
        plain, grafted, graft = pair(name)
        saved, wanted = grafted.state_dict(), plain.state_dict()
        assert list(saved) == list(wanted)
        assert all(torch.equal(saved[each], wanted[each]) for each in wanted)
        graft.remove()
        assert torch.equal(logits(grafted, **batch()), logits(plain, **batch()))


def refusal(model, kernel="RMSNormAttention"):
    with pytest.raises(PlanError) as error:
        kernelgraft.graft(model, {FUSION: f"kernelgraft.kernels:{kernel}"})
    assert kernelgraft.graft_of(model) is None
    return str(error.value)


def with_attention(change, kind="qwen3"):
    model = tiny.model(kind)
    for layer in model.model.layers:
        change(layer.self_attn)
    return model


def test_norms_over_all_heads_are_refused():
    """As in OLMo2."""

    def widen(attention):
        norm = type(attention.q_norm)
        attention.q_norm, attention.k_norm = norm(32), norm(16)

    assert "q_norm is over (32,) numbers, and the kernel's norm is over one head of 8" in refusal(with_attention(widen))


def test_what_is_no_rms_norm_is_refused():
    def norm_of_layer(attention):
        attention.k_norm = nn.LayerNorm(8)

    assert "LayerNorm does not compute the RMS norm" in refusal(with_attention(norm_of_layer))


def test_a_bias_in_part_is_refused():
    def without_bias(attention):
        attention.k_proj.bias = None

    assert "some have a bias and some have none" in refusal(with_attention(without_bias, "qwen2"))


def attention_like(kind, forward):
    """A model whose attention has another forward."""

    def change(attention):
        cls = type(attention)
        attention.__class__ = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})

    return with_attention(change, kind)


def test_an_attention_that_does_something_else_is_refused():
    from transformers.models.cohere.modeling_cohere import CohereAttention
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention
    from transformers.models.nanochat.modeling_nanochat import NanoChatAttention
    from transformers.models.olmo.modeling_olmo import OlmoAttention

    said = refusal(attention_like("llama", OlmoAttention.forward))
    assert "LlamaAttention.forward also reads clamp_, clip_qkv, max, min, so it is another attention" in said
    assert "also reads s_aux, sinks" in refusal(attention_like("llama", GptOssAttention.forward))
    assert "normalizes after the rotation" in refusal(attention_like("qwen3", NanoChatAttention.forward))
    assert "also reads use_qk_norm" in refusal(attention_like("qwen3", CohereAttention.forward))


def test_an_attention_that_sometimes_does_not_rotate_is_refused():
    from transformers.models.cohere2.modeling_cohere2 import Cohere2Attention

    assert "has other branches" in refusal(attention_like("qwen2", Cohere2Attention.forward))


def test_a_rotation_of_neighbours_is_refused():
    from transformers.models.ernie4_5.modeling_ernie4_5 import Ernie4_5Attention

    assert "rotates in another order" in refusal(attention_like("llama", Ernie4_5Attention.forward))


def test_what_it_does_not_take_is_said():
    supports = rms_norm_attention.RMSNormAttentionLayout.supports
    x, angles = torch.empty(2, 3, 8), (torch.empty(1, 3, 4), torch.empty(1, 3, 4))
    assert supports(x, angles, None) is True
    assert "and not (3, 8)" in supports(x[0], angles)
    assert "not torch.float64" in supports(x.double(), angles)
    assert "needs cos and sin" in supports(hidden_states=x)
    assert "no gradient goes to position_embeddings" in supports(x, (angles[0].requires_grad_(), angles[1]))
    assert "up to 32768" in supports(torch.empty(1, 1, 40000), angles)
