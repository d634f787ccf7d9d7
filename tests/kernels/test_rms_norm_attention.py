"""RMS norm and attention in one: in models of Transformers, in plain torch bit for bit, and in Triton."""

import copy
import inspect

import pytest
import torch
from drawn import DEVICE, DTYPES, beside_the_originals, by_inductor
from torch import nn

import kernelgraft
from kernelgraft.errors import PlanError
from kernelgraft.kernels import decode_attention, one_token_attention, rms_norm_attention, rotary

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


@pytest.mark.parametrize("kind", ["bool", "float", "for each head", "nothing is seen"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_mask_of_the_callers_own(kind, cache, in_triton):
    """Of four dimensions, which Transformers hands on as it is; for a prompt, and for one token behind it."""
    plain, grafted, graft = pair("heads of 64")
    if kind == "nothing is seen":  # torch's attention on a GPU adds so large a number up to infinity
        plain.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand(2, 4 if kind == "for each head" else 1, 7, 7, generator=generator) < 0.6
    seen |= torch.eye(7, dtype=torch.bool)
    if kind == "nothing is seen":  # with the least of all numbers, every key counts alike
        seen[0, :, 6:] = False
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    mask = mask.to(DEVICE)
    ids = batch()["input_ids"]
    found = []
    for model in (plain, grafted):
        held = transformers.DynamicCache() if cache == "dynamic" else transformers.StaticCache(model.config, 7)
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        last = 6 if cache == "dynamic" else 7  # a static cache is as long as it will be
        with torch.no_grad():
            first = model(ids[:, :6], attention_mask=mask[:, :, :6, :last], **{name: held}).logits
            found.append([first, model(ids[:, 6:], attention_mask=mask[:, :, 6:], **{name: held}).logits])
    for ours, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (graft.calls.kernel, graft.calls.reference) == (2 * NUM_LAYERS, 0)


@pytest.fixture
def launched(monkeypatch):
    """How often each kernel was launched."""
    counts = {}
    modules = (
        (rotary, "launch"),
        (rotary, "launch_into"),
        (one_token_attention, "launch"),
        (decode_attention, "launch"),
    )
    for module, name in modules:
        run = getattr(module, name)
        key = f"{module.__name__.rpartition('.')[2]}.{name}"
        counts[key] = 0

        def counted(*args, run=run, key=key, **kwargs):
            counts[key] += not args[0].is_meta  # where a graft prepares, nothing is launched
            return run(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    return counts


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


class OwnCache(transformers.StaticCache):
    """Counts what is written into it."""

    num_updates = 0

    def update(self, *args, **kwargs):
        self.num_updates += 1
        return super().update(*args, **kwargs)


def test_a_cache_class_of_somebody_else_is_asked(in_triton, launched):
    _, grafted, _ = pair("heads of 64")
    cache = OwnCache(grafted.config, 12)
    with torch.no_grad():
        for part in batch()["input_ids"].split([5, 1, 1], dim=1):
            step(grafted, part, cache)
    assert cache.num_updates == 3 * NUM_LAYERS
    assert launched["rotary.launch_into"] == launched["decode_attention.launch"] == 0
    assert launched["one_token_attention.launch"] == 2 * NUM_LAYERS


@pytest.fixture
def registered():
    """An attention function of somebody else, and what it got."""
    seen = []

    def attend(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.layer_idx, module.is_causal, module.num_key_value_groups, kwargs))
        return transformers.integrations.sdpa_attention.sdpa_attention_forward(
            module, query, key, value, attention_mask, **{**kwargs, "cache": None}
        )

    transformers.AttentionInterface.register("of_a_test", attend)
    transformers.AttentionMaskInterface.register("of_a_test", transformers.masking_utils.sdpa_mask)
    yield seen
    del transformers.AttentionInterface._global_mapping["of_a_test"]
    del transformers.AttentionMaskInterface._global_mapping["of_a_test"]


def test_an_attention_function_of_somebody_else_gets_what_the_original_gives_it(in_triton, launched, registered):
    plain, grafted, _ = pair("heads of 64", "of_a_test")
    given = {"input_ids": batch()["input_ids"][:, :1]}
    registered.clear()  # the plan's own forwards
    wanted = logits(plain, **given)
    torch.testing.assert_close(logits(grafted, **given), wanted)
    of_plain, of_grafted = (
        [(*module, sorted(kwargs)) for *module, kwargs in half] for half in (registered[:2], registered[2:])
    )
    assert of_grafted == of_plain
    assert len(of_plain) == NUM_LAYERS
    assert launched["one_token_attention.launch"] == 0


def test_a_paged_cache_goes_where_the_original_hands_it(registered):
    """To its own update, or in an older Transformers to the attention function."""
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    class Paged(PagedAttentionCache):
        def __init__(self):
            self.updates = []

        def update(self, key_states, value_states, layer_idx, kwargs):
            self.updates.append((layer_idx, sorted(kwargs)))
            return key_states, value_states

    plain, grafted, _ = pair("llama", "of_a_test")
    x = torch.randn(1, 3, 32, device=DEVICE)
    angles = plain.model.rotary_emb(x, torch.arange(3, device=DEVICE)[None])
    found = []
    for model in (plain, grafted):
        layer, paged = model.model.layers[1], Paged()
        registered.clear()
        with torch.no_grad():
            out, _ = layer.self_attn(layer.input_layernorm(x), angles, None, cache=paged, block=3)
        ((*_, kwargs),) = registered
        found.append((out, paged.updates, sorted(kwargs), kwargs.get("cache") is paged))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert found[1][1:] == found[0][1:]
    assert found[0][1] or found[0][3]


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
