"""Activation checkpointing of grafted models: every layer that shall be, whenever it was switched on, and no other."""

import copy
import functools
import inspect

import pytest
import torch
import transformers

import kernelgraft
import tiny
from kernelgraft import KernelConfig

pytestmark = [pytest.mark.transformers, pytest.mark.usefixtures("nothing_stays_behind_in_the_end")]

NUM_LAYERS = 2
LAYER = f"{tiny.KERNELS}/decoder_layer.py"
CONFIGS = {
    "layer made from the module": KernelConfig({"DecoderLayer": f"{LAYER}:WholeLayer"}),
    "layer made from recorded arguments": KernelConfig({"DecoderLayer": f"{LAYER}:PackedLayer"}),
    "stateless layer": KernelConfig({"DecoderLayer": f"{LAYER}:StatelessLayer"}),
    "stateless layer, with others in it": KernelConfig(
        {"DecoderLayer": f"{LAYER}:StatelessLayer", **tiny.guide_mapping()}
    ),
    "norms and MLPs in the layers": tiny.guide_config(),
    "attention in the layers": KernelConfig({"Attention": f"{tiny.KERNELS}/attention.py:OlderAttention"}),
}
# These multiply by several matrices at once, so that sums over them run in another order: 64 to 96 terms, in float32.
# The other kernels do the original's arithmetic.
OTHER_ORDER = {
    "layer made from recorded arguments",
    "stateless layer, with others in it",
    "norms and MLPs in the layers",
}
TOLERANCE = {"rtol": 96 * torch.finfo(torch.float32).eps, "atol": 1e-7}
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture
def checkpointed(monkeypatch):
    """One entry for each call of torch's checkpoint function by a model of Transformers that is switched on later."""
    seen = []
    checkpoint = transformers.modeling_utils.checkpoint

    def counted(function, *args, **kwargs):
        seen.append(kwargs)
        return checkpoint(function, *args, **kwargs)

    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", counted)
    return seen


def training_model(on=False, **kwargs):
    model = tiny.model("qwen3").train()
    if on:
        tiny.switch_checkpointing(model, True, **kwargs)
    return model


def grads(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_grads(model, tolerance=EXACT):
    """The gradients of a model that is grafted no more are those of one that never was."""
    assert_same(grads(model), untouched_grads(), tolerance)


@functools.cache
def untouched_grads():
    model = training_model()
    tiny.loss(model).backward()
    return grads(model)


def assert_same(found, expected, tolerance=EXACT):
    assert list(found) == list(expected)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], **tolerance, msg=lambda text, key=key: f"{key}: {text}")


def tolerance_of(name):
    return TOLERANCE if name in OTHER_ORDER else EXACT


def grads_without_checkpointing(name):
    model = training_model()
    graft = kernelgraft.graft(model, CONFIGS[name])
    tiny.loss(model).backward()
    graft.remove()
    return grads(model)


@pytest.mark.parametrize("when", ["before the graft", "after the graft"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_is_checkpointed_and_its_kernels_run_again_for_the_backward(name, when, checkpointed):
    model = training_model(on=when == "before the graft")
    graft = kernelgraft.graft(model, CONFIGS[name])
    if when == "after the graft":
        tiny.switch_checkpointing(model, True)
    tiny.loss(model).backward()
    assert len(checkpointed) == NUM_LAYERS
    in_layers = {path: calls for path, calls in graft.calls.sites.items() if path.startswith("model.layers.")}
    assert set(in_layers.values()) == {(2, 0)}
    assert all(calls == (1, 0) for path, calls in graft.calls.sites.items() if path not in in_layers)
    graft.remove()
    assert_same(grads(model), grads_without_checkpointing(name))
    assert_grads(model, tolerance_of(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_of_a_model_that_was_loaded_with_kernels(name, checkpointed, qwen3_folder):
    model = kernelgraft.AutoModelForCausalLM.from_pretrained(qwen3_folder, kernel_config=CONFIGS[name]).train()
    tiny.switch_checkpointing(model, True)
    tiny.loss(model).backward()
    assert len(checkpointed) == NUM_LAYERS
    graft = kernelgraft.graft_of(model)
    assert {calls for path, calls in graft.calls.sites.items() if "layers" in path} == {(2, 0)}
    graft.remove()
    assert_grads(model, tolerance_of(name))


@pytest.mark.parametrize("when", ["before the graft", "after the graft"])
@pytest.mark.parametrize("name", CONFIGS)
def test_switched_off_again_nothing_is_checkpointed(name, when, checkpointed):
    model = training_model(on=when == "before the graft")
    graft = kernelgraft.graft(model, CONFIGS[name])
    if when == "after the graft":
        tiny.switch_checkpointing(model, True)
    tiny.switch_checkpointing(model, False)
    tiny.loss(model).backward()
    assert checkpointed == []
    assert set(graft.calls.sites.values()) == {(1, 0)}
    graft.remove()
    assert_grads(model, tolerance_of(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_in_eval_nothing_is_checkpointed(name, checkpointed):
    model = training_model(on=True).eval()
    graft = kernelgraft.graft(model, CONFIGS[name])
    tiny.loss(model).backward()
    assert checkpointed == []
    assert set(graft.calls.sites.values()) == {(1, 0)}


@pytest.mark.parametrize("name", ["layer made from the module", "stateless layer, with others in it"])
@pytest.mark.parametrize("was_on", [False, True])
@pytest.mark.parametrize("switched", [None, False, True])
def test_after_the_graft_is_removed_the_switch_is_as_it_was_last_set(name, was_on, switched, checkpointed):
    model = training_model(on=was_on)
    kept = {path: module.gradient_checkpointing for path, module in switchable(model).items()}
    with kernelgraft.graft(model, CONFIGS[name]):
        if switched is not None:
            tiny.switch_checkpointing(model, switched)
    on = was_on if switched is None else switched
    assert {path: module.gradient_checkpointing for path, module in switchable(model).items()} == dict.fromkeys(
        kept, on
    )
    tiny.loss(model).backward()
    assert len(checkpointed) == (NUM_LAYERS if on else 0)
    assert_grads(model)


def switchable(model):
    return {path: module for path, module in model.named_modules() if hasattr(module, "gradient_checkpointing")}


@pytest.mark.parametrize("when", ["before the graft", "after the graft"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_originals_of_a_graft_are_checkpointed_once(name, when, checkpointed):
    """A host checkpoints; the original's forward inside it, which knows how to as well, must not do so again."""
    model = training_model(on=when == "before the graft")
    graft = kernelgraft.graft(model, CONFIGS[name])
    if when == "after the graft":
        tiny.switch_checkpointing(model, True)
    with graft.reference():
        tiny.loss(model).backward()
    assert len(checkpointed) == NUM_LAYERS
    assert graft.calls.kernel == 0
    graft.remove()
    assert_grads(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_only_every_second_layer_is_checkpointed_if_the_user_says_so(name, checkpointed):
    model = training_model()
    graft = kernelgraft.graft(model, CONFIGS[name])
    tiny.switch_checkpointing(model, True, every_n_layers=2)
    tiny.loss(model).backward()
    assert len(checkpointed) == 1
    for path, calls in graft.calls.sites.items():
        assert calls == ((2, 0) if path.startswith("model.layers.0") else (1, 0)), path
    graft.remove()
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False]
    assert_grads(model, tolerance_of(name))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_both_ways_of_torch_to_checkpoint(name, use_reentrant, checkpointed):
    options = [{"use_reentrant": use_reentrant}]  # the argument's name is another one in each version
    model = training_model()
    graft = kernelgraft.graft(model, CONFIGS[name])
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch(*options)
    tiny.loss(model).backward()
    assert checkpointed == options * NUM_LAYERS
    graft.remove()
    assert_grads(model, tolerance_of(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpointed_layer_hands_on_no_cache(name, checkpointed):
    """As in the untouched model: a cache would be written to a second time when the layer runs again."""
    model = training_model(on=True)
    kernelgraft.graft(model, CONFIGS[name])
    cache = transformers.DynamicCache(config=model.config)
    original = inspect.signature(transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer.forward)
    (keyword,) = {"past_key_values", "cache"} & set(original.parameters)
    layer = model.model.layers[0]
    x = torch.randn(1, 3, 32, requires_grad=True)
    layer(x, position_embeddings=model.model.rotary_emb(x, torch.arange(3)[None]), **{keyword: cache})
    assert len(checkpointed) == 1
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_copy_of_a_grafted_model_has_a_switch_of_its_own(name, checkpointed):
    model = training_model(on=True)
    kernelgraft.graft(model, CONFIGS[name])
    twin = copy.deepcopy(model)
    tiny.switch_checkpointing(model, False)
    tiny.loss(model).backward()
    assert checkpointed == []
    tiny.loss(twin).backward()
    assert len(checkpointed) == NUM_LAYERS
    kernelgraft.graft_of(twin).remove()
    assert_grads(twin, tolerance_of(name))
