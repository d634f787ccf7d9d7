"""What Transformers loads by itself, and is grafted afterwards: .bin and GGUF files, adapters, disk offload."""

import json
import os
import threading

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import kernelgraft
import tiny
from kernelgraft import KernelConfig, graft_of
from kernelgraft.errors import PlanError

pytestmark = pytest.mark.transformers

GUIDE = tiny.guide_config()
NORMS = KernelConfig({"RMSNorm": f"{tiny.EXAMPLE}:CustomRMSNorm"}, inherit_mapping=False)


def load(folder, config=GUIDE, **kwargs):
    return kernelgraft.AutoModelForCausalLM.from_pretrained(folder, kernel_config=config, **kwargs)


def plain_load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def assert_same(model, plain, num_sites):
    assert len(graft_of(model).plan.sites) == num_sites
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    assert torch.equal(tiny.logits(model), tiny.logits(plain))
    assert graft_of(model).calls.kernel == num_sites
    graft_of(model).remove()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert torch.equal(tiny.logits(model), tiny.logits(plain))


# --- .bin


@pytest.fixture
def bin_folder(tmp_path):
    model = tiny.model("qwen3")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    return tmp_path


def test_a_bin_checkpoint(bin_folder):
    assert_same(load(bin_folder), plain_load(bin_folder), 9)


def test_a_bin_checkpoint_whose_graft_is_refused_gives_no_model(bin_folder):
    with pytest.raises(PlanError, match="matches no module"):
        load(bin_folder, KernelConfig({"Nothing": f"{tiny.EXAMPLE}:CustomRMSNorm"}))


# --- GGUF


def write_gguf(path):
    """A tiny Llama in float32, as llama.cpp writes it: tensors under its names, q and k permuted, sizes in metadata."""
    gguf = pytest.importorskip("gguf")
    model = tiny.model("llama")
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.": "blk.",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, tensor in model.state_dict().items():
        for kind, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if kind in name:
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        for theirs, llama_cpp in names.items():
            name = name.replace(theirs, llama_cpp)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file(tmp_path):
    written = write_gguf(tmp_path / "tiny.gguf")
    model, plain = (make(tmp_path, gguf_file="tiny.gguf") for make in (load, plain_load))
    assert torch.equal(plain.state_dict()["model.norm.weight"], written.state_dict()["model.norm.weight"])
    assert_same(model, plain, 5)


# --- adapters

# Transformers warns of a name that peft asks for.
BY_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def write_adapter(folder, base_folder, target_modules):
    peft = pytest.importorskip("peft")
    base = plain_load(base_folder)
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=target_modules, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(folder)
    return adapted


@BY_PEFT
def test_an_adapter_on_what_no_kernel_takes_over(qwen3_folder, tmp_path):
    adapted = write_adapter(tmp_path, qwen3_folder, ["q_proj"])
    model, plain = load(tmp_path), plain_load(tmp_path)
    assert torch.equal(tiny.logits(plain), tiny.logits(adapted))
    assert not torch.equal(tiny.logits(plain), tiny.logits(plain_load(qwen3_folder)))
    assert_same(model, plain, 9)


@BY_PEFT
def test_an_adapter_inside_a_site_is_refused(qwen3_folder, tmp_path):
    write_adapter(tmp_path, qwen3_folder, ["up_proj"])
    with pytest.raises(PlanError, match=r"model\.layers\.0\.mlp\.up_proj' is adapted .*merge"):
        load(tmp_path)
    assert_same(load(tmp_path, NORMS), plain_load(tmp_path), 9)


# --- disk offload

ON_DISK = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "disk"}


def test_what_is_offloaded_to_disk_may_lie_outside_the_sites(qwen3_folder, tmp_path):
    device_map = {**ON_DISK, "model.layers.0": "cpu", "model.layers.1": "cpu"}
    options = {"device_map": device_map, "offload_folder": str(tmp_path)}
    model, plain = load(qwen3_folder, **options), plain_load(qwen3_folder, **options)
    assert model.lm_head.weight.is_meta
    assert torch.equal(tiny.logits(model), tiny.logits(plain))
    graft = graft_of(model)
    assert (graft.calls.kernel, graft.calls.reference) == (9, 0)
    graft.remove()
    assert torch.equal(tiny.logits(model), tiny.logits(plain))


def test_what_is_offloaded_to_disk_inside_a_site_is_refused(qwen3_folder, tmp_path):
    device_map = {**ON_DISK, "model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
    with pytest.raises(PlanError, match=r"'model\.layers\.1\.\w+' is offloaded"):
        load(qwen3_folder, device_map=device_map, offload_folder=str(tmp_path))


# --- quantized


# The warning is of torch's own code, which a function of BitNet compiled with torch.compile imports.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_quantized_weight_inside_a_site_is_refused(tmp_path):
    """BitNet's, which Transformers runs without another library: four weights in each byte."""
    tiny.model("llama").save_pretrained(tmp_path)
    quantization = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        num_out, num_in = tensors[name].shape
        tensors[name] = torch.full((num_out // 4, num_in), 0b10010010, dtype=torch.uint8)
        tensors[f"{name}_scale"] = torch.full((1,), 0.5)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(PlanError, match=r"'model\.layers\.0\.mlp\.gate_proj' is quantized .*BitLinear.*Load the model"):
        load(tmp_path)
    model, plain = load(tmp_path, NORMS), plain_load(tmp_path)
    assert plain.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    with torch.compiler.set_stance("force_eager"):
        assert_same(model, plain, 5)


# --- nothing is left open


@pytest.mark.parametrize("config", [GUIDE, KernelConfig({"Nothing": f"{tiny.EXAMPLE}:CustomRMSNorm"})])
def test_no_file_and_no_thread_is_left_open(config, bin_folder):
    def open_now():
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def once():
        try:
            load(bin_folder, config)
        except PlanError:
            assert config is not GUIDE

    once()
    before = open_now()
    once()
    assert open_now() == before
