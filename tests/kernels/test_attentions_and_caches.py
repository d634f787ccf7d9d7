"""RMSNormAttention with every attention function, cache class and mask that Transformers has, and those of others."""

import inspect

import pytest
import torch
from drawn import DEVICE, by_inductor
from test_rms_norm_attention import NUM_LAYERS, batch, generated, logits, pair, step

pytest.importorskip("triton")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.transformers


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


@pytest.mark.parametrize("padded", [None, "left"])
@pytest.mark.parametrize("compiler", [pytest.param("the inductor", marks=by_inductor)])
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")  # of Transformers' call
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # of torch's own
def test_flex_attention(padded, compiler, in_triton):
    plain, grafted, graft = pair("heads of 64", "flex_attention")
    torch.testing.assert_close(logits(grafted, **batch(padded)), logits(plain, **batch(padded)))
    assert (graft.calls.kernel, graft.calls.reference) == (NUM_LAYERS, 0)


def test_requests_that_are_batched_as_they_come(in_triton):
    """By a cache in pages, whose attention Transformers chooses."""
    plain, grafted, graft = pair("heads of 64")
    options = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    pages = transformers.ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)
    found = []
    for model in (plain, grafted):
        done = model.generate_batch([[5, 6, 7], [8, 9, 10, 11, 12]], options, pages)
        found.append({name: each.generated_tokens for name, each in done.items()})
    assert found[1] == found[0]
    assert [len(each) for each in found[1].values()] == [4, 4]
    assert graft.calls.kernel
    assert graft.calls.reference == 0


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


class _Halved(transformers.cache_utils.QuantizedLayer):
    """Keeps what is older than two tokens in half of the bits."""

    def __init__(self):
        super().__init__(residual_length=2)

    def _quantize(self, tensor, axis):
        return tensor.bfloat16()

    def _dequantize(self, tensor):
        return tensor.float()


def test_a_cache_that_quantizes(in_triton):
    plain, grafted, graft = pair("heads of 64")
    parts = batch()["input_ids"].split([3, 1, 1, 1, 1], dim=1)
    found = []
    for model in (plain, grafted):
        cache = transformers.Cache(layers=[_Halved() for _ in range(NUM_LAYERS)])
        with torch.no_grad():
            found.append([step(model, part, cache).logits for part in parts])
    torch.testing.assert_close(found[1], found[0])
    assert (graft.calls.kernel, graft.calls.reference) == (len(parts) * NUM_LAYERS, 0)


@pytest.mark.skipif(DEVICE != "cuda", reason="a cache is moved between a GPU and the host")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_a_cache_that_is_offloaded(cache):
    plain, grafted, graft = pair("heads of 64")
    assert torch.equal(generated(grafted, cache), generated(plain, cache))
    assert graft.calls.reference == 0


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
