"""What else a load may be made from: the Hub's cache, a config, a state dict, remote code, adapters, quantized ones."""

import json
import shutil
import sys
import warnings

import huggingface_hub
import pytest
import safetensors
import torch
import transformers

import kernelgraft
import tiny
from kernelgraft import KernelConfig, graft_of
from kernelgraft.errors import CheckpointError, PlanError
from leftovers import open_files

pytestmark = pytest.mark.transformers

GUIDE = tiny.guide_config()
QWEN3 = tiny.model_class("qwen3")


def load(place, kernels=GUIDE, cls=QWEN3, **kwargs):
    return kernelgraft.from_pretrained(cls, place, kernel_config=kernels, **kwargs)


def assert_same(model, plain, num_sites=9):
    assert len(graft_of(model).plan.sites) == num_sites
    assert type(model).__mro__[1] is type(plain)
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(tiny.logits(model), tiny.logits(plain))
    assert (graft_of(model).calls.kernel, graft_of(model).calls.reference) == (num_sites, 0)
    graft_of(model).remove()
    assert type(model) is type(plain)
    assert torch.equal(tiny.logits(model), tiny.logits(plain))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`hub(folder)` puts a folder into a Hub cache, and gives its id and the options to load it from there."""

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(folder, name="someone/something", commit="a" * 40):
        root = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text(commit)
        shutil.copytree(folder, root / "snapshots" / commit)
        return name, {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}

    return put


OUTSIDE = {
    "one above": lambda index, name: f"../elsewhere/{name}" if index == 1 else name,
    "all above": lambda _, name: f"../elsewhere/{name}",
    "all absolute": lambda _, name: f"/ABSOLUTE/{name}",
    "by way of a folder below": lambda _, name: f"below/../../elsewhere/{name}",
}


@pytest.fixture
def sharded(qwen3_folder, tmp_path):
    """A checkpoint of several files beside a folder that has the same."""
    folder = tmp_path / "model"
    QWEN3.from_pretrained(qwen3_folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "below").mkdir()
    shutil.copytree(folder, tmp_path / "elsewhere")
    return folder


def rename(folder, renamed):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    names = sorted(set(content["weight_map"].values()))
    new = {
        name: renamed(number, name).replace("/ABSOLUTE", f"{folder.parent}/elsewhere")
        for number, name in enumerate(names)
    }
    content["weight_map"] = {key: new[name] for key, name in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    return new


@pytest.mark.parametrize("kernels", [GUIDE, None], ids=["kernels", "none"])
@pytest.mark.parametrize("how", OUTSIDE)
def test_an_index_that_leads_out_of_its_folder_is_refused(how, kernels, sharded):
    rename(sharded, OUTSIDE[how])
    with pytest.raises(CheckpointError, match=r"names the file .*must lead to a file in the folder of the index"):
        load(sharded, kernels)
    assert open_files(sharded.parent) == []


def test_an_index_of_one_file_that_leads_out_of_its_folder_is_refused(qwen3_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(qwen3_folder, folder)
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        index = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), "../x.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names the file"):
        load(folder)


def test_an_index_may_lead_into_a_folder_below(sharded):
    plain = QWEN3.from_pretrained(sharded)
    for old, new in rename(sharded, lambda number, name: f"below/{name}" if number else name).items():
        (sharded / old).rename(sharded / new)
    assert_same(load(sharded), plain)


def test_an_index_that_does_not_tell_the_truth_is_refused(sharded):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], min(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="does not fit its files"):
        load(sharded)


def test_a_hub_id_of_several_files(hub, sharded):
    name, options = hub(sharded)
    assert_same(load(name, **options), QWEN3.from_pretrained(name, **options))


def test_a_hub_id(hub, qwen3_folder):
    name, options = hub(qwen3_folder)
    assert_same(load(name, **options), QWEN3.from_pretrained(name, **options))
    auto = transformers.AutoModelForCausalLM
    assert_same(load(name, revision="a" * 40, cls=auto, **options), auto.from_pretrained(name, **options))


def test_a_folder_in_a_folder_and_a_variant(tmp_path):
    tiny.model("qwen3").save_pretrained(tmp_path / "inner", variant="small")
    options = {"subfolder": "inner", "variant": "small"}
    assert_same(load(tmp_path, **options), QWEN3.from_pretrained(tmp_path, **options))


def test_a_config_that_is_given_is_used_and_left_as_it_was(qwen3_folder):
    config = transformers.AutoConfig.from_pretrained(qwen3_folder)
    config.rms_norm_eps = 0.5
    before = config.to_dict()
    model, plain = load(qwen3_folder, config=config), QWEN3.from_pretrained(qwen3_folder, config=config)
    assert model.config is not config
    assert config.to_dict() == before
    assert model.model.norm.variance_epsilon == 0.5
    assert_same(model, plain)


def test_a_state_dict_in_the_place_of_files():
    options = {"config": tiny.config("qwen3"), "state_dict": tiny.model("qwen3").state_dict()}
    assert_same(load(None, **options), QWEN3.from_pretrained(None, **options))


def test_files_that_must_not_be_mapped_are_not(tmp_path):
    tiny.model("qwen3").save_pretrained(tmp_path)
    options = {"disable_mmap": True}
    model, plain = load(tmp_path, **options), QWEN3.from_pretrained(tmp_path, **options)
    with open("/proc/self/maps") as lines:
        assert not [line for line in lines if str(tmp_path) in line]
    assert_same(model, plain)


def test_a_device_map_that_cuts_a_site_is_refused_before_anything_is_read(qwen3_folder):
    device_map = {"": "cpu", "model.layers.1.mlp": "cuda:0"}
    with pytest.raises(PlanError, match=r"cuts the site at 'model\.layers\.1\.post_attention_layernorm' .*up_proj"):
        load(qwen3_folder, device_map=device_map)


def test_a_model_of_remote_code_is_loaded_by_transformers_and_grafted(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "model"
    model = tiny.model("qwen3")
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM"}
    model.save_pretrained(folder)
    (folder / "modeling_remote.py").write_text(
        "from transformers import Qwen3ForCausalLM\n\n\nclass RemoteForCausalLM(Qwen3ForCausalLM):\n    pass\n"
    )
    auto, options = transformers.AutoModelForCausalLM, {"trust_remote_code": True}
    plain = auto.from_pretrained(folder, **options)
    assert type(plain).__name__ == "RemoteForCausalLM"
    assert_same(load(folder, cls=auto, **options), plain)
    monkeypatch.delitem(auto._model_mapping._extra_content, transformers.Qwen3Config, raising=False)


# --- adapters, which Transformers finds by itself


BY_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def write_adapter(folder, base, target_modules):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=target_modules, init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(QWEN3.from_pretrained(base), config).save_pretrained(folder)
    return folder


@BY_PEFT
def test_an_adapter_on_the_hub_goes_onto_the_original_modules(hub, qwen3_folder, tmp_path):
    name, options = hub(write_adapter(tmp_path / "adapter", qwen3_folder, ["q_proj"]))
    plain = QWEN3.from_pretrained(name, **options)
    assert not torch.equal(tiny.logits(plain), tiny.logits(QWEN3.from_pretrained(qwen3_folder)))
    assert_same(load(name, **options), plain)


@BY_PEFT
def test_an_adapter_on_the_hub_inside_a_site_is_refused(hub, qwen3_folder, tmp_path):
    name, options = hub(write_adapter(tmp_path / "adapter", qwen3_folder, ["q_proj", "up_proj"]))
    with pytest.raises(PlanError, match=r"'model\.layers\.0\.mlp\.up_proj' is adapted"):
        load(name, **options)


# --- quantized checkpoints


@pytest.fixture(scope="module")
def bitnet_folder(tmp_path_factory):
    """A checkpoint whose linear modules are BitNet's: packed integers and a scale."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports torch's compiler
        from transformers.integrations import replace_with_bitnet_linear

    folder = tmp_path_factory.mktemp("bitnet")
    model = tiny.model("llama")
    quantization = transformers.BitNetQuantConfig(modules_to_not_convert=["lm_head"])
    replace_with_bitnet_linear(model, ["lm_head"], quantization)
    model.config.quantization_config = quantization
    model.save_pretrained(folder)
    return folder


def test_a_quantized_checkpoint_is_grafted_outside_what_is_quantized(bitnet_folder):
    norms = KernelConfig({"RMSNorm": f"{tiny.EXAMPLE}:CustomRMSNorm"}, inherit_mapping=False)
    cls = tiny.model_class("llama")
    model, plain = load(bitnet_folder, norms, cls), cls.from_pretrained(bitnet_folder)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "BitLinear"
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(graft_of(model).plan.sites) == 5


def test_a_quantized_checkpoint_inside_a_site_is_refused(bitnet_folder):
    with pytest.raises(PlanError, match=r"model\.layers\.0\.mlp\.gate_proj.* is quantized .*BitLinear"):
        load(bitnet_folder, cls=tiny.model_class("llama"))
