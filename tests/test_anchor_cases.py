"""The cases in which Transformers' own system breaks, each as a user meets it; none leaves a trace in the process."""

import copy
import re
import shutil

import pytest
import torch
import transformers
from torch import nn

import kernelgraft
import tiny
from kernelgraft import AutoModelForCausalLM, Kernel, KernelConfig, graft_of
from kernelgraft.errors import CheckpointError, GraftError, KernelGraftError, PlanError

pytestmark = [pytest.mark.transformers, pytest.mark.usefixtures("nothing_stays_behind")]

NUM_SITES = 2 + 2 + 2 * 2 + 1
"""Of the guide's two kernels in a Qwen3 of two layers: input norms, fusions, norms of query and key, the last norm."""


def load(folder, config=None, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, kernel_config=config or tiny.guide_config(), **kwargs)


def load_plain(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def fusion(pattern="model.layers.*", norm="RMSNorm", mlp="MLP"):
    return {((norm, f"{pattern}.post_attention_layernorm"), (mlp, f"{pattern}.mlp")): f"{tiny.EXAMPLE}:RMSNormMLP"}


def hosts(model):
    """The kernel that ran at each site of a model, by the site's path; after one forward of the model."""
    graft = graft_of(model)
    before = graft.calls.sites
    tiny.logits(model)
    ran = {path for path, (kernel, _) in graft.calls.sites.items() if kernel == before[path][0] + 1}
    kinds = graft.plan.kinds
    return {site.host: kinds[site.kind].kernels[0].name for site in graft.plan.sites if site.host in ran}


def assert_guide_kernels_run(model, plain):
    ran = hosts(model)
    assert len(ran) == NUM_SITES
    assert {path for path, name in ran.items() if name == "RMSNormMLP"} == {
        f"model.layers.{i}.post_attention_layernorm" for i in range(2)
    }
    assert graft_of(model).calls.reference == 0
    assert torch.equal(tiny.logits(model), tiny.logits(plain))


def assert_untouched(model, plain):
    assert graft_of(model) is None
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    state, expected = model.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert torch.equal(tiny.logits(model), tiny.logits(plain))


# --- what stays in the process


def test_a_second_model_without_a_config_is_untouched(qwen3_folder, plain):
    first = load(qwen3_folder, use_kernels=True)
    assert_untouched(load_plain(qwen3_folder), plain)
    assert_untouched(AutoModelForCausalLM.from_pretrained(qwen3_folder), plain)
    assert_untouched(AutoModelForCausalLM.from_pretrained(qwen3_folder, use_kernels=False), plain)
    built = transformers.Qwen3ForCausalLM(copy.deepcopy(plain.config)).eval()
    built.load_state_dict(plain.state_dict())
    assert_untouched(built, plain)
    assert_guide_kernels_run(first, plain)


def test_each_load_stands_alone(qwen3_folder, plain):
    models = [load(qwen3_folder) for _ in range(3)]
    assert graft_of(models[0]).plan == graft_of(models[1]).plan == graft_of(models[2]).plan
    for model in models:
        # Where Transformers keeps the conversion rules of a load, for its `save_pretrained`.
        assert getattr(model, "_weight_conversions", None) == getattr(plain, "_weight_conversions", None)
    graft_of(models[0]).remove()
    with torch.no_grad():
        models[1].model.layers[0].post_attention_layernorm.scale.zero_()
    assert_untouched(models[0], plain)
    assert_guide_kernels_run(models[2], plain)


# --- exceptions inside a load, in each of its steps


class Scale(nn.Module):
    """Not a kernel that anybody wants: the faults below lie in its layouts."""

    def forward(self, hidden_states):
        return hidden_states * self.scale


class ScaleLayout(nn.Module):
    packing = {"scale": "weight"}

    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(hidden_size))


class RaisingLayout(ScaleLayout):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__(hidden_size)
        raise RuntimeError("a fault in the layout")


class InterruptedLayout(ScaleLayout):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__(hidden_size)
        raise KeyboardInterrupt("stopped by the user")


class RaisingBufferLayout(ScaleLayout):
    """Its buffer has no value on meta; the layout is made once more for it, when the first sites are in the model."""

    sites_left = 0

    def __init__(self, hidden_size, eps=1e-6):
        super().__init__(hidden_size)
        self.register_buffer("table", torch.zeros(3), persistent=False)
        if not self.table.is_meta:
            RaisingBufferLayout.sites_left -= 1
            if RaisingBufferLayout.sites_left < 0:
                raise RuntimeError("a fault in the layout's second construction")


class BadRuleLayout(ScaleLayout):
    packing = {"scale": {"sources": "weight", "operations": [["transpose", 0, 3]]}}


def rule_that_raises(when):
    """A layout with a rule of Transformers whose operation fails `when` it gets this tensor."""
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class Raising(ConversionOps):
        def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
            (tensor,) = (value[0] if isinstance(value, list) else value for value in input_dict.values())
            if when(tensor):
                raise RuntimeError("a fault in the rule")
            return {target_patterns[0]: tensor * 1}

    class RaisingRuleLayout(ScaleLayout):
        packing = None
        conversion_mapping = [WeightConverter("norm.weight", "norm.scale", [Raising()])]

    return RaisingRuleLayout


def faulty(name):
    if name == "rule":
        return rule_that_raises(lambda tensor: True)
    if name == "rule, while it is filled":
        values = iter([False, False])
        return rule_that_raises(lambda tensor: not tensor.is_meta and next(values, True))
    if name == "second construction":
        RaisingBufferLayout.sites_left = 2
    return {
        "layout": RaisingLayout,
        "interrupt": InterruptedLayout,
        "second construction": RaisingBufferLayout,
        "plain rule": BadRuleLayout,
    }[name]


FAULTS = {
    "layout": (PlanError, "a fault in the layout"),
    "interrupt": (KeyboardInterrupt, "stopped by the user"),
    "second construction": (PlanError, "a fault in the layout's second construction"),
    "plain rule": (KernelGraftError, "transpose"),
    "rule": (Exception, "a fault in the rule"),
    "rule, while it is filled": (Exception, "a fault in the rule"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_exception_inside_the_load_leaves_nothing_behind(fault, qwen3_folder, plain):
    error, text = FAULTS[fault]
    config = KernelConfig({"RMSNorm": Kernel(Scale, faulty(fault))}, inherit_mapping=False)
    with pytest.raises(error, match=text):
        load(qwen3_folder, config)
    assert_guide_kernels_run(load(qwen3_folder), plain)


@pytest.mark.parametrize("fault", FAULTS)
def test_an_exception_inside_a_graft_leaves_the_model_as_it_was(fault, qwen3_folder, plain):
    model = load_plain(qwen3_folder)
    modules, parameters = list(model.modules()), dict(model.named_parameters())
    error, text = FAULTS[fault]
    with pytest.raises(error, match=text):
        kernelgraft.graft(model, KernelConfig({"RMSNorm": Kernel(Scale, faulty(fault))}))
    assert list(model.modules()) == modules
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert_untouched(model, plain)
    kernelgraft.graft(model, tiny.guide_config())
    assert_guide_kernels_run(model, plain)


def test_a_truncated_checkpoint_leaves_nothing_behind(qwen3_folder, tmp_path, plain):
    folder = shutil.copytree(qwen3_folder, tmp_path / "copy")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=re.escape(str(weights))):
        load(folder)
    assert_guide_kernels_run(load(qwen3_folder), plain)


def test_a_disk_that_fails_while_weights_are_read_leaves_nothing_behind(qwen3_folder, plain, monkeypatch):
    def fails(*_):
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr("kernelgraft.checkpoint.positioned.preadv", fails)
        with pytest.raises(CheckpointError, match=r"safetensors: \S+ cannot be read at byte \d+: the disk is gone"):
            load(qwen3_folder)
    assert_guide_kernels_run(load(qwen3_folder), plain)


def test_a_model_whose_own_init_fails_leaves_nothing_behind(qwen3_folder, tmp_path, plain):
    folder = shutil.copytree(qwen3_folder, tmp_path / "copy")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"silu"', '"banana"'))
    with pytest.raises(KeyError, match="banana"):
        load(folder)
    assert_guide_kernels_run(load(qwen3_folder), plain)


# --- exact places


def test_a_pattern_for_one_layer_grafts_that_layer_only(qwen3_folder, plain):
    config = KernelConfig(fusion("model.layers.0"), inherit_mapping=False)
    live = load_plain(qwen3_folder)
    kernelgraft.graft(live, config)
    for model in (load(qwen3_folder, config), live):
        assert hosts(model) == {"model.layers.0.post_attention_layernorm": "RMSNormMLP"}
        other, expected = model.model.layers[1], plain.model.layers[1]
        assert [type(module) for module in other.modules()] == [type(module) for module in expected.modules()]
        assert torch.equal(tiny.logits(model), tiny.logits(plain))


def test_a_wrong_class_name_is_an_error_that_names_the_class_found(qwen3_folder, plain):
    config = KernelConfig(fusion(mlp="Banana"), inherit_mapping=False)
    said = r"at 'model.layers.0.mlp' stands a Qwen3MLP, which is no Banana.*Write \('MLP', 'model.layers.\*.mlp'\)"
    with pytest.raises(PlanError, match=said):
        load(qwen3_folder, config)
    model = load_plain(qwen3_folder)
    with pytest.raises(PlanError, match=said):
        kernelgraft.graft(model, config)
    assert_untouched(model, plain)


# --- configs


@pytest.mark.parametrize("theirs", [False, True])
def test_one_config_is_used_twice_and_is_unchanged(theirs, qwen3_folder, plain):
    make = transformers.KernelConfig if theirs else KernelConfig
    config = make(tiny.guide_mapping(), use_local_kernel=True)
    before = copy.deepcopy(config.kernel_mapping)
    for _ in range(2):
        assert_guide_kernels_run(load(qwen3_folder, config), plain)
    model = load_plain(qwen3_folder)
    with kernelgraft.graft(model, config):
        assert_guide_kernels_run(model, plain)
    assert config.kernel_mapping == before
    assert not theirs or vars(config) == vars(make(tiny.guide_mapping(), use_local_kernel=True))


def test_a_local_kernel_with_a_layout_works(qwen3_folder, plain):
    model = load(qwen3_folder, KernelConfig(tiny.guide_mapping(), use_local_kernel=True), use_kernels=True)
    assert_guide_kernels_run(model, plain)


def test_a_renamed_norm_and_a_fusion_in_one_config_both_apply_the_fusion_first(qwen3_folder, plain):
    for mapping in (tiny.guide_mapping(), dict(reversed(tiny.guide_mapping().items()))):
        model = load(qwen3_folder, KernelConfig(mapping, inherit_mapping=False))
        assert_guide_kernels_run(model, plain)
        assert torch.equal(tiny.generate(model), tiny.generate(plain))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, torch.device("cpu")], ids=str)
def test_a_device_map_of_cpu_works(device_map, qwen3_folder, plain):
    assert_guide_kernels_run(load(qwen3_folder, device_map=device_map), plain)


# --- the way in and the way back


def test_use_kernels_false_removes_the_graft(qwen3_folder, plain):
    model = load(qwen3_folder)
    assert model.use_kernels is True
    model.use_kernels = False
    assert model.use_kernels is plain.use_kernels is False
    assert_untouched(model, plain)


def test_a_model_that_is_loaded_already_is_grafted_in_place(qwen3_folder, plain):
    model = load_plain(qwen3_folder)
    modules = list(model.modules())
    graft = kernelgraft.graft(model, tiny.guide_config())
    assert graft.model is model
    assert_guide_kernels_run(model, plain)
    model.use_kernels = False
    assert list(model.modules()) == modules
    assert_untouched(model, plain)


# --- what would give wrong numbers, or none


def test_a_norm_that_also_feeds_attention_is_refused_with_the_reason(checkpoint):
    folder = checkpoint("cohere")
    key = (("LayerNorm", "model.layers.*.input_layernorm"), ("MLP", "model.layers.*.mlp"))
    config = KernelConfig({key: f"{tiny.EXAMPLE}:RMSNormMLP"}, inherit_mapping=False)
    said = r"not sound.*input_layernorm.*self_attn"
    with pytest.raises(PlanError, match=said):
        load(folder, config)
    model = load_plain(folder)
    before = tiny.logits(model)
    with pytest.raises(PlanError, match=said):
        kernelgraft.graft(model, config)
    assert graft_of(model) is None
    assert torch.equal(tiny.logits(model), before)


class ForwardOnlyNorm(nn.Module):
    """The arithmetic of Qwen3's norm, for inference."""

    has_backward = False

    def forward(self, hidden_states):
        x_fp32 = hidden_states.float()
        normalized = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.scale * normalized.to(hidden_states.dtype)


class ForwardOnlyNormLayout(ScaleLayout):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__(hidden_size)
        self.variance_epsilon = eps


def inference_only(how):
    if how == "by the kernel":
        return {"RMSNorm": Kernel(ForwardOnlyNorm)}
    return {key: {"cpu": {"inference": use}} for key, use in tiny.guide_mapping().items()}


@pytest.mark.parametrize("how", ["by the kernel", "by the config"])
def test_training_without_a_training_kernel_is_an_error_that_says_so(how, qwen3_folder, plain):
    model = load(qwen3_folder, KernelConfig(inference_only(how), inherit_mapping=False))
    assert len(hosts(model)) == NUM_SITES
    model.train()
    with pytest.raises(GraftError, match=r'no kernel for training.*for inference.*fallback="reference"'):
        tiny.logits(model)
    model.eval()
    assert torch.equal(tiny.logits(model), tiny.logits(plain))
    assert len(hosts(model)) == NUM_SITES


@pytest.mark.parametrize("how", ["by the kernel", "by the config"])
def test_training_without_a_training_kernel_runs_the_reference_if_that_is_allowed(how, qwen3_folder, plain):
    config = KernelConfig(inference_only(how), inherit_mapping=False, fallback="reference")
    model, untouched = load(qwen3_folder, config).train(), load_plain(qwen3_folder).train()
    tiny.loss(model).backward()
    tiny.loss(untouched).backward()
    assert set(graft_of(model).calls.sites.values()) == {(0, 1)}
    graft_of(model).remove()
    for (name, one), (_, other) in zip(model.named_parameters(), untouched.named_parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


def test_the_cache_reaches_an_attention_kernel_written_for_past_key_values(qwen3_folder, plain):
    kernel = f"{tiny.KERNELS}/attention.py:OlderAttention"
    model = load(qwen3_folder, KernelConfig({"Attention": kernel}, inherit_mapping=False))
    assert torch.equal(tiny.generate(model, num_tokens=6), tiny.generate(plain, num_tokens=6))
    assert graft_of(model).calls.kernel == 2 * 6


@pytest.mark.parametrize("first", ["checkpointing", "graft"])
def test_every_layer_is_checkpointed_when_kernels_are_in_it(first, qwen3_folder):
    model = load_plain(qwen3_folder).train()
    if first == "checkpointing":
        tiny.switch_checkpointing(model, True)
    config = KernelConfig({"DecoderLayer": f"{tiny.KERNELS}/decoder_layer.py:WholeLayer"})
    graft = kernelgraft.graft(model, config)
    if first == "graft":
        tiny.switch_checkpointing(model, True)
    tiny.loss(model).backward()
    # Each of the two layers ran once in the forward, and once more for its backward.
    assert graft.calls.sites == {"model.layers.0": (2, 0), "model.layers.1": (2, 0)}
