"""`from_pretrained` and the auto classes: all that Transformers' loading does, with kernels in it."""

import logging

import accelerate.hooks
import pytest
import torch
import transformers

import kernelgraft
import tiny
from kernelgraft import KernelConfig, graft_of
from kernelgraft.errors import PlanError

pytestmark = pytest.mark.transformers

GUIDE = tiny.guide_config()


def load(folder, config=GUIDE, cls=kernelgraft.AutoModelForCausalLM, **kwargs):
    return cls.from_pretrained(folder, kernel_config=config, **kwargs)


def plain_load(folder, cls=transformers.AutoModelForCausalLM, **kwargs):
    return cls.from_pretrained(folder, **kwargs)


def assert_same(model, plain, kind="qwen3"):
    """Same state, bit for bit, and same logits."""
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    assert torch.equal(tiny.logits(model, kind), tiny.logits(plain, kind))


def test_shards_are_loaded(tmp_path):
    tiny.model("qwen3").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(load(tmp_path), plain_load(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, "auto", None])
def test_dtypes_are_as_in_a_plain_load(dtype, tmp_path):
    tiny.model("qwen3").to(torch.bfloat16).save_pretrained(tmp_path)
    assert_same(load(tmp_path, dtype=dtype), plain_load(tmp_path, dtype=dtype))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_implementation_is_passed_on(attention, qwen3_folder):
    model = load(qwen3_folder, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    assert_same(model, plain_load(qwen3_folder, attn_implementation=attention))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_tied_as_in_a_plain_load(tied, checkpoint):
    folder = checkpoint("llama", tie_word_embeddings=tied)
    model = load(folder)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert_same(model, plain_load(folder), "llama")


class Embed(torch.nn.Module):
    def forward(self, input):
        return torch.nn.functional.embedding(input, self.table)


class EmbedLayout(torch.nn.Module):
    packing = {"table": "weight"}

    @classmethod
    def from_module(cls, module):
        made = cls()
        made.table = torch.nn.Parameter(torch.empty_like(module.weight))
        return made


class TransposedEmbed(torch.nn.Module):
    def forward(self, input):
        return self.table.t()[input]


class TransposedEmbedLayout(EmbedLayout):
    packing = {"table": {"sources": "weight", "operations": [["transpose", 0, 1]]}}

    @classmethod
    def from_module(cls, module):
        made = cls()
        made.table = torch.nn.Parameter(torch.empty(*reversed(module.weight.shape)))
        return made


def test_a_renamed_embedding_stays_tied_and_a_transposed_one_is_refused(checkpoint):
    folder = checkpoint("llama", tie_word_embeddings=True)
    model = load(folder, KernelConfig({"Embedding": Embed}))
    assert model.lm_head.weight is model.model.embed_tokens.table
    assert_same(model, plain_load(folder), "llama")
    with pytest.raises(PlanError, match=r"model\.embed_tokens\.weight is shared with lm_head\.weight"):
        load(folder, KernelConfig({"Embedding": TransposedEmbed}))
    untied = load(checkpoint("llama", tie_word_embeddings=False), KernelConfig({"Embedding": TransposedEmbed}))
    assert untied.model.embed_tokens.table.shape == (32, 64)


class Line(torch.nn.Module):
    def forward(self, input):
        return torch.nn.functional.linear(input, self.matrix)


class LineLayout(torch.nn.Module):
    packing = {"matrix": "weight"}

    @classmethod
    def from_module(cls, module):
        made = cls()
        made.matrix = torch.nn.Parameter(torch.empty_like(module.weight))
        return made


def test_a_renamed_head_stays_tied(checkpoint):
    folder = checkpoint("llama", tie_word_embeddings=True)
    config = KernelConfig({"Linear": Line, "Embedding": Embed}, inherit_mapping=False)
    model = load(folder, config)
    assert model.lm_head.matrix is model.model.embed_tokens.table
    assert model.get_output_embeddings() is model.lm_head
    assert_same(model, plain_load(folder), "llama")
    graft_of(model).remove()
    assert model.lm_head.weight is model.model.embed_tokens.weight


ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("changes", [{}, {"rope_parameters": ROPE}], ids=["default", "llama3"])
def test_rotary_frequencies_are_right(changes, tmp_path):
    tiny.model("llama", **changes).save_pretrained(tmp_path)
    model, plain = load(tmp_path), plain_load(tmp_path)
    ours, theirs = dict(model.named_buffers()), dict(plain.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_generation_config_and_mode_are_as_in_a_plain_load(tmp_path):
    saved = tiny.model("qwen3")
    saved.generation_config.max_length = 33
    saved.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.generation_config.to_dict() == plain_load(tmp_path).generation_config.to_dict()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_device_maps(device_map, qwen3_folder):
    model = load(qwen3_folder, device_map=device_map)
    # "auto" is all GPUs that there are, with hooks that hand on from one to another.
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_same(model.to("cpu"), plain_load(qwen3_folder))


# --- other classes


def test_a_base_model_takes_patterns_with_and_without_its_prefix(qwen3_folder):
    plain = plain_load(qwen3_folder, transformers.AutoModel)
    for fusion in (tiny.FUSION, tuple((name, path.removeprefix("model.")) for name, path in tiny.FUSION)):
        model = load(qwen3_folder, KernelConfig(tiny.guide_mapping(fusion)), kernelgraft.AutoModel)
        assert type(model) is not type(plain)
        assert len(graft_of(model).plan.sites) == 9
        with torch.no_grad():
            ids = tiny.inputs("qwen3")
            assert torch.equal(model(**ids).last_hidden_state, plain(**ids).last_hidden_state)


def test_rules_over_whole_paths_apply_to_a_base_model_too(qwen3_folder):
    from test_models import use

    model = load(qwen3_folder, KernelConfig({tiny.FUSION: use("gated.py:NormMLPByRules")}), kernelgraft.AutoModel)
    plain = plain_load(qwen3_folder, transformers.AutoModel)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


def test_a_concrete_class_and_an_auto_class_of_transformers(qwen3_folder):
    for cls in (transformers.Qwen3ForCausalLM, transformers.AutoModelForCausalLM):
        model = kernelgraft.from_pretrained(cls, qwen3_folder, kernel_config=GUIDE)
        assert isinstance(model, transformers.Qwen3ForCausalLM)
        assert_same(model, plain_load(qwen3_folder))


class AffineNorm(torch.nn.Module):
    def forward(self, input):
        return torch.nn.functional.layer_norm(input, self.normalized_shape, self.gamma, self.beta, self.eps)


class AffineNormLayout(torch.nn.Module):
    packing = {"gamma": "weight", "beta": "bias"}

    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True):
        super().__init__()
        self.gamma, self.beta = (torch.nn.Parameter(torch.empty(normalized_shape)) for _ in range(2))


LAYER_NORM = KernelConfig({"LayerNorm": AffineNorm}, inherit_mapping=False)
RMS_NORM = KernelConfig({"RMSNorm": f"{tiny.EXAMPLE}:CustomRMSNorm"}, inherit_mapping=False)
SMALL = {"vocab_size": 64, "pad_token_id": 0}
T5 = {**SMALL, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
WHISPER = {
    **SMALL,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
}


def image_text():
    text = transformers.LlamaConfig(**tiny.DECODER)
    vision = transformers.CLIPVisionConfig(**VISION)
    return transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)


class T5Norm(torch.nn.Module):
    """Stateless: it runs on the original's own parameters."""

    def forward(self, hidden_states):
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


SIBLINGS = {
    "AutoModelForSequenceClassification": (lambda: tiny.config("bert"), LAYER_NORM),
    "AutoModelForTokenClassification": (lambda: tiny.config("bert"), LAYER_NORM),
    "AutoModelForQuestionAnswering": (lambda: tiny.config("bert"), LAYER_NORM),
    "AutoModelForMaskedLM": (lambda: tiny.config("bert"), LAYER_NORM),
    "AutoModelForImageClassification": (lambda: tiny.config("vit"), LAYER_NORM),
    "AutoModelForSeq2SeqLM": (lambda: transformers.T5Config(**T5), KernelConfig({"LayerNorm": T5Norm})),
    "AutoModelForSpeechSeq2Seq": (lambda: transformers.WhisperConfig(**WHISPER), LAYER_NORM),
    "AutoModelForImageTextToText": (image_text, RMS_NORM),
}


@pytest.mark.parametrize("name", SIBLINGS)
def test_each_sibling_loads_with_a_kernel(name, tmp_path):
    make, config = SIBLINGS[name]
    theirs = getattr(transformers, name)
    torch.manual_seed(0)
    theirs.from_config(make()).save_pretrained(tmp_path)
    model = load(tmp_path, config, getattr(kernelgraft, name))
    plain = plain_load(tmp_path, theirs)
    assert isinstance(model, type(plain))
    assert graft_of(model).plan.sites
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    run = kernelgraft.soundness.forward_runner(plain)
    assert run is not None
    torch.manual_seed(1)
    run(model)
    assert graft_of(model).calls.kernel > 0
    graft_of(model).remove()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


# --- configs


def test_kernels_are_put_in_only_where_they_are_asked_for(qwen3_folder):
    assert graft_of(kernelgraft.AutoModelForCausalLM.from_pretrained(qwen3_folder)) is None
    assert graft_of(load(qwen3_folder, use_kernels=False)) is None
    assert graft_of(load(qwen3_folder, use_kernels=True)) is not None


def test_a_config_may_be_a_mapping_or_a_file(qwen3_folder, tmp_path):
    GUIDE.to_file(tmp_path / "kernels.toml")
    for config in (tiny.guide_mapping(), tmp_path / "kernels.toml", str(tmp_path / "kernels.toml")):
        assert len(graft_of(load(qwen3_folder, config)).plan.sites) == 9


def test_a_config_of_transformers_is_taken_and_left_as_it_was(qwen3_folder):
    theirs = transformers.KernelConfig(tiny.guide_mapping(), use_local_kernel=True)
    before = dict(theirs.kernel_mapping)
    for _ in range(2):
        assert len(graft_of(load(qwen3_folder, theirs)).plan.sites) == 9
    assert theirs.kernel_mapping == before


def test_a_load_logs_one_line(qwen3_folder, caplog):
    with caplog.at_level(logging.INFO, logger="kernelgraft"):
        load(qwen3_folder)
    lines = [record.getMessage() for record in caplog.records if record.name == "kernelgraft"]
    assert lines == ["Qwen3ForCausalLM: CustomRMSNorm at 7 sites, RMSNormMLP at 2 sites; 0 near misses"]
