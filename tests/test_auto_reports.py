"""What Transformers reports of a load, and what it initializes, is the same with kernels in the model."""

import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import kernelgraft
import tiny
from kernelgraft import KernelConfig
from kernelgraft.errors import PlanError

pytestmark = pytest.mark.transformers

GUIDE = tiny.guide_config()
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def damaged(tmp_path):
    """`damaged(drop, add)` is the folder of a checkpoint without some tensors and with others."""

    def write(drop=(), add=None, kind="qwen3", **changes):
        tiny.model(kind, **changes).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors = {name: tensor for name, tensor in tensors.items() if name not in drop} | (add or {})
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return write


@pytest.fixture
def loaded(caplog, monkeypatch):
    """`loaded(cls, folder)` loads and returns the model, Transformers' own account of the load, and all it logged."""
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)

    def load(folder, config=None, cls=transformers.AutoModelForCausalLM, **kwargs):
        caplog.clear()
        torch.manual_seed(7)
        if config is not None:
            kwargs["kernel_config"] = config
        model, info = kernelgraft.from_pretrained(cls, folder, output_loading_info=True, **kwargs)
        after = torch.rand(())
        logged = [record.getMessage() for record in caplog.records if record.name.startswith("transformers")]
        return model, info, logged, after

    return load


def assert_same(ours, theirs):
    assert ours[1:3] == theirs[1:3]
    assert torch.equal(ours[3], theirs[3])  # the random state moved as far
    state, expected = ours[0].state_dict(), theirs[0].state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


def test_nothing_is_missing_in_a_whole_checkpoint(qwen3_folder, loaded):
    ours, theirs = loaded(qwen3_folder, GUIDE), loaded(qwen3_folder)
    assert not any(theirs[1].values())
    assert_same(ours, theirs)


MISSING = {
    "part of a merged one": [UP],
    "all parts of a merged one": [UP, UP.replace("up", "gate")],
    "renamed": ["model.layers.0.post_attention_layernorm.weight", "model.norm.weight"],
    "one of a site": ["model.layers.1.mlp.down_proj.weight"],
    "outside every site": ["model.layers.1.self_attn.q_proj.weight", "lm_head.weight"],
    "a whole site": [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    + ["model.layers.1.post_attention_layernorm.weight"],
}


@pytest.mark.parametrize("drop", MISSING.values(), ids=MISSING)
def test_what_is_missing_is_reported_and_initialized_as_in_a_plain_load(drop, damaged, loaded):
    folder = damaged(drop)
    ours, theirs = loaded(folder, GUIDE), loaded(folder)
    assert theirs[1]["missing_keys"] == set(drop)
    assert any("MISSING" in line for line in theirs[2])
    assert_same(ours, theirs)


def test_what_is_unexpected_is_reported_as_in_a_plain_load(damaged, loaded):
    # The second is the name under which a kernel packs: no checkpoint may bring it.
    add = {"model.layers.0.mlp.extra.weight": torch.ones(2), "model.norm.scale": torch.ones(32)}
    folder = damaged(add=add)
    ours, theirs = loaded(folder, GUIDE), loaded(folder)
    assert theirs[1]["unexpected_keys"] == set(add)
    assert_same(ours, theirs)


MISMATCHED = {UP: torch.ones(3, 5), "model.norm.weight": torch.ones(31), "lm_head.weight": torch.ones(60, 32)}


def test_other_shapes_are_reported_and_initialized_as_in_a_plain_load(damaged, loaded):
    folder = damaged(add=MISMATCHED)
    options = {"ignore_mismatched_sizes": True}
    ours, theirs = loaded(folder, GUIDE, **options), loaded(folder, **options)
    assert {name for name, *_ in theirs[1]["mismatched_keys"]} == set(MISMATCHED)
    assert_same(ours, theirs)


def test_other_shapes_are_refused_as_in_a_plain_load(damaged, loaded):
    folder = damaged(add=MISMATCHED)
    said = []
    for config in (GUIDE, None):
        with pytest.raises(RuntimeError) as error:
            loaded(folder, config)
        said.append((type(error.value), str(error.value)))
    assert said[0] == said[1]


def test_a_new_head_is_initialized_as_in_a_plain_load(checkpoint, loaded):
    from test_auto import LAYER_NORM

    options = {"cls": transformers.AutoModelForSequenceClassification, "num_labels": 3}
    folder = checkpoint("bert")
    ours, theirs = loaded(folder, LAYER_NORM, **options), loaded(folder, **options)
    assert "classifier.weight" in theirs[1]["missing_keys"]
    assert_same(ours, theirs)


def test_names_with_and_without_the_prefix(checkpoint, loaded, tmp_path):
    """A base model from a checkpoint with a head, and a model with a head from one of the base model."""
    folder = checkpoint("qwen3")
    ours, theirs = (loaded(folder, config, transformers.AutoModel) for config in (GUIDE, None))
    assert_same(ours, theirs)
    theirs[0].save_pretrained(tmp_path)
    ours, theirs = (loaded(tmp_path, config) for config in (GUIDE, None))
    assert theirs[1]["missing_keys"] == {"lm_head.weight"}
    assert_same(ours, theirs)


# --- dtypes that Transformers keeps


class FeedForwardLayout(torch.nn.Module):
    packing = {"up": "wi.weight", "down": {"sources": "wo.weight", "operations": [["transpose", 0, 1]]}}

    def __init__(self, config):
        super().__init__()
        self.up = torch.nn.Parameter(torch.empty(config.d_ff, config.d_model))
        self.down = torch.nn.Parameter(torch.empty(config.d_ff, config.d_model))


class FeedForward(torch.nn.Module):
    def forward(self, hidden_states):
        inner = self.act(torch.nn.functional.linear(hidden_states, self.up))
        return inner.to(self.down.dtype) @ self.down


class FlatLayout(torch.nn.Module):
    packing = {"flat": {"sources": ["wi.weight", "wo.weight"], "operations": [["reshape", [-1]], ["concatenate"]]}}

    def __init__(self, config):
        super().__init__()
        self.flat = torch.nn.Parameter(torch.empty(2 * config.d_ff * config.d_model))


class Flat(torch.nn.Module):
    def forward(self, hidden_states):
        up, down = self.flat.chunk(2)
        inner = self.act(torch.nn.functional.linear(hidden_states, up.view(-1, hidden_states.shape[-1])))
        return torch.nn.functional.linear(inner, down.view(hidden_states.shape[-1], -1))


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    from test_auto import T5

    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None])
def test_modules_that_stay_in_float32_do_so_in_a_kernel(dtype, t5_folder, loaded):
    config = KernelConfig({"T5DenseActDense": FeedForward}, inherit_mapping=False)
    options = {"cls": transformers.T5ForConditionalGeneration, "dtype": dtype}
    ours, theirs = loaded(t5_folder, config, **options), loaded(t5_folder, **options)
    dense = ours[0].encoder.block[0].layer[-1].DenseReluDense
    kept = {torch.float16: torch.float32}.get(dtype, dtype or torch.float32)
    assert (dense.up.dtype, dense.down.dtype) == (dtype or torch.float32, kept)
    assert_same(ours, theirs)


def test_what_would_merge_two_dtypes_is_refused(t5_folder, loaded):
    config = KernelConfig({"T5DenseActDense": Flat}, inherit_mapping=False)
    options = {"cls": transformers.T5ForConditionalGeneration}
    assert_same(loaded(t5_folder, config, **options), loaded(t5_folder, **options))
    with pytest.raises(PlanError, match=r"flat would be packed from parameters that differ in dtype .*wo\.weight"):
        loaded(t5_folder, config, dtype=torch.float16, **options)
