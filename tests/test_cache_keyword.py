"""The cache under the name that a kernel knows: Transformers renamed `past_key_values` to `cache` in 5.23 and 5.24."""

import inspect

import pytest
import torch
import transformers
from torch import nn

import kernelgraft
import tiny
from kernelgraft import Kernel, KernelConfig, graft_of
from kernelgraft.errors import PlanError

pytestmark = [pytest.mark.transformers, pytest.mark.usefixtures("nothing_stays_behind_in_the_end")]

ATTENTION = f"{tiny.KERNELS}/attention.py"
LAYER = f"{tiny.KERNELS}/decoder_layer.py"
NAMES = ("past_key_values", "cache")
NUM_LAYERS, NUM_TOKENS = 2, 8


@pytest.fixture
def updates(monkeypatch):
    """The layers that wrote into a cache, one after the other."""
    seen = []
    update = transformers.DynamicCache.update

    def counted(self, key_states, value_states, layer_idx, *args, **kwargs):
        seen.append(layer_idx)
        return update(self, key_states, value_states, layer_idx, *args, **kwargs)

    monkeypatch.setattr(transformers.DynamicCache, "update", counted)
    return seen


def name_here():
    """What the installed Transformers calls the cache."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    (name,) = set(NAMES) & set(inspect.signature(Qwen3Attention.forward).parameters)
    return name


KERNELS = {
    "older attention": {"Attention": f"{ATTENTION}:OlderAttention"},
    "newer attention": {"Attention": f"{ATTENTION}:NewerAttention"},
    "attention with another order": {"Attention": f"{ATTENTION}:OtherOrderAttention"},
    "older layer": {"DecoderLayer": f"{LAYER}:WholeLayer"},
    "newer layer": {"DecoderLayer": f"{LAYER}:NewerLayer"},
    "packed layer": {"DecoderLayer": f"{LAYER}:PackedLayer"},
}


@pytest.mark.parametrize("name", KERNELS)
def test_generated_tokens_are_the_untouched_models_and_the_cache_is_used(name, qwen3_folder, plain, updates):
    expected = tiny.generate(plain, NUM_TOKENS)
    plain_updates = list(updates)
    updates.clear()
    model = kernelgraft.AutoModelForCausalLM.from_pretrained(
        qwen3_folder, kernel_config=KernelConfig(KERNELS[name], inherit_mapping=False)
    )
    assert torch.equal(tiny.generate(model, NUM_TOKENS), expected)
    assert updates == plain_updates == [*range(NUM_LAYERS)] * NUM_TOKENS
    calls = graft_of(model).calls
    assert (calls.kernel, calls.reference) == (NUM_LAYERS * NUM_TOKENS, 0)


@pytest.mark.parametrize("name", KERNELS)
def test_a_cache_that_a_user_hands_in_is_the_one_that_the_kernel_fills(name, updates):
    model = tiny.model("qwen3")
    tokens = tiny.inputs("qwen3", length=9)["input_ids"]
    with torch.no_grad():
        whole = model(tokens).logits
    kernelgraft.graft(model, KernelConfig(KERNELS[name]))
    cache = transformers.DynamicCache(config=model.config)
    updates.clear()
    with torch.no_grad():
        first = model(tokens[:, :6], **{name_here(): cache}).logits
        assert cache.get_seq_length() == 6
        second = model(tokens[:, 6:], **{name_here(): cache}).logits
    assert cache.get_seq_length() == 9
    assert updates == [*range(NUM_LAYERS)] * 2
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kernel", ["OlderAttention", "NewerAttention"])
def test_a_grafted_module_takes_the_cache_under_either_name(kernel, name, updates):
    """As the newer original does, which still takes the older name."""
    model = tiny.model("qwen3")
    attention = model.model.layers[1].self_attn
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    position_embeddings = model.model.rotary_emb(x, torch.arange(3)[None])
    with torch.no_grad():
        expected, _ = attention(x, position_embeddings, None)
        kernelgraft.graft(model, KernelConfig({"Attention": f"{ATTENTION}:{kernel}"}))
        cache = transformers.DynamicCache(config=model.config)
        by_name, _ = attention(
            hidden_states=x, position_embeddings=position_embeddings, attention_mask=None, **{name: cache}
        )
        by_place, _ = attention(x, position_embeddings, None, transformers.DynamicCache(config=model.config))
    assert updates == [1, 1]
    assert torch.equal(by_name, expected)
    assert torch.equal(by_place, expected)


@pytest.mark.parametrize("kernel", ["OlderAttention", "NewerAttention"])
def test_the_reference_gets_the_cache_under_the_originals_name(kernel, qwen3_folder, plain, updates):
    model = kernelgraft.AutoModelForCausalLM.from_pretrained(
        qwen3_folder, kernel_config=KernelConfig({"Attention": f"{ATTENTION}:{kernel}"}, inherit_mapping=False)
    )
    with graft_of(model).reference():
        assert torch.equal(tiny.generate(model, NUM_TOKENS), tiny.generate(plain, NUM_TOKENS))
    assert len(updates) == 2 * NUM_LAYERS * NUM_TOKENS
    assert graft_of(model).calls.kernel == 0


class OwnOptionInItsPlace(nn.Module):
    """Takes no cache, and has an option of its own where the original has the cache."""

    def forward(self, hidden_states, position_embeddings, attention_mask, num_splits=None, **kwargs):
        return hidden_states, None


def refused(kernel):
    model = tiny.model("qwen3")
    before = tiny.logits(model)
    with pytest.raises(PlanError) as error:
        kernelgraft.graft(model, KernelConfig({"Attention": kernel}))
    assert graft_of(model) is None
    assert torch.equal(tiny.logits(model), before)
    return str(error.value)


@pytest.mark.parametrize("kernel", [f"{ATTENTION}:CacheInKwargs", Kernel(OwnOptionInItsPlace)], ids=str)
def test_a_kernel_that_would_get_the_cache_in_its_kwargs_only_is_refused(kernel):
    said = refused(kernel)
    assert f"would not get {name_here()!r} by name" in said
    assert "Qwen3Attention.forward(self" in said


def test_a_kernel_that_takes_no_cache_is_refused():
    assert name_here() in refused(f"{ATTENTION}:CacheNotTaken")
