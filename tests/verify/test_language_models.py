"""Models of Transformers: inputs are drawn, and attention is tried with masks, positions and caches."""

import attention_plants
import pytest
import torch
from torch import nn

import kernelgraft
import test_models
import tiny
from kernelgraft import KernelConfig
from kernelgraft.errors import VerificationError

pytestmark = pytest.mark.transformers

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LONG = {"max_position_embeddings": 256}


class SwappedNorm(nn.Module):
    """Takes the sum for the mean."""

    def forward(self, hidden_states):
        x = hidden_states.float()
        return self.weight * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + self.variance_epsilon)).to(
            hidden_states.dtype
        )


def grafted(kind, mapping, dtype=torch.float32, **changes):
    model = tiny.model(kind, **changes).to(dtype)
    return kernelgraft.graft(model, KernelConfig(mapping, inherit_mapping=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_guides_kernels(dtype):
    graft = grafted("qwen3", tiny.guide_mapping(), dtype)
    report = graft.verify()
    report.raise_for_failures()
    assert [len(kind.sites) for kind in report.kinds] == [4, 3, 2]  # heads' norms, norms of the whole, fusions
    assert all(kind.tried == kind.sites for kind in report.kinds)
    whole = [check for check in report.checks if check.kind < 0]
    assert [check.case for check in whole] == ["outputs", "loss", "8 greedy tokens with a cache"]
    assert whole[0].note == "kernels ran 9 times, originals 0 times"
    assert whole[2].note == "16 of 16 tokens are the original's"


@pytest.mark.parametrize("case", [case for case in test_models.CASES if not case.exact], ids=str)
def test_kernels_in_other_arithmetic(case):
    model = tiny.model(case.kind, **case.changes).to(torch.bfloat16)
    report = kernelgraft.graft(model, case.config).verify(every_site=False)
    report.raise_for_failures()
    assert report.passed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_right_attention(dtype):
    report = grafted("llama", {"Attention": attention_plants.RightAttention}, dtype, **LONG).verify(every_site=False)
    report.raise_for_failures()
    tried = {check.case for check in report.checks if not check.skipped}
    assert tried >= {
        "one token",
        "one token in a batch",
        "37 tokens",
        "a batch of 131 tokens",
        "a batch padded on the right",
        "a batch padded on the left",
        "positions that differ in a batch",
        "a token after a cache",
        "tokens after a cache",
        "a token after a padded cache",
    }
    assert not report.kinds[0].notes


@pytest.mark.parametrize("name", attention_plants.FAULTS)
def test_planted_faults_of_attention(name):
    graft = grafted("llama", {"Attention": attention_plants.FAULTS[name]}, **LONG)
    report = graft.verify(every_site=False, whole_model=False)
    assert not report.passed
    assert {failure.site for failure in report.failures} == {"model.layers.0.self_attn"}


def test_what_is_too_long_for_the_model_is_said():
    report = grafted("llama", {"Attention": attention_plants.RightAttention}).verify(every_site=False)
    assert report.kinds[0].notes == ("not tried: a batch of 131 tokens: the model has positions for 62",)


def test_a_function_kernel_that_ignores_positions():
    def rotary(q, k, cos, sin, unsqueeze_dim=1):
        def turned(x):
            first, second = x.chunk(2, -1)
            return torch.cat((-second, first), -1)

        cos, sin = (each[:1].unsqueeze(unsqueeze_dim) for each in (cos, sin))
        return q * cos + turned(q) * sin, k * cos + turned(k) * sin

    report = grafted("llama", {"rotary_pos_emb": rotary}).verify()
    assert {failure.case for failure in report.failures} == {
        "positions that differ in a batch, float32",
        "a token after a padded cache, float32",
    }
    assert report.kinds[0].title == "rotary in the place of apply_rotary_pos_emb() in LlamaAttention"


def test_layers_with_a_window_are_tried_beside_those_without():
    report = grafted("gemma3", {"RMSNorm": test_models.use("gemma3.py:OffsetNorm")}, num_hidden_layers=6).verify(
        whole_model=False
    )
    report.raise_for_failures()
    assert all(kind.tried for kind in report.kinds)


def test_a_vision_model():
    report = grafted("vit", {"LayerNorm": test_models.use("encoder.py:AffineNorm")}).verify()
    report.raise_for_failures()
    assert report.inputs == "drawn"


def test_given_inputs():
    graft = grafted("llama", tiny.guide_mapping())
    inputs = {**tiny.inputs("llama", batch=3, length=9), "attention_mask": torch.ones(3, 9, dtype=torch.int64)}
    report = graft.verify(inputs)
    report.raise_for_failures()
    assert report.inputs == "given"
    assert report.checks[0].input == "hidden_states float32[3, 9, 32]"


def test_inputs_that_the_model_does_not_take():
    graft = grafted("llama", tiny.guide_mapping())
    with pytest.raises(VerificationError, match="LlamaForCausalLM on its originals does not run on the given inputs"):
        graft.verify({"input_ids": "text"})
    assert graft.calls.reference == 0


def test_at_load(qwen3_folder):
    load = kernelgraft.AutoModelForCausalLM.from_pretrained
    model = load(qwen3_folder, kernel_config=tiny.guide_config(), verify=True)
    assert kernelgraft.graft_of(model).calls.kernel == 0
    config = KernelConfig({"RMSNorm": SwappedNorm}, inherit_mapping=False)
    with pytest.raises(VerificationError, match=r"SwappedNorm at model\.layers\.0\.self_attn\.q_norm"):
        load(qwen3_folder, kernel_config=config, verify=True)
    assert load(qwen3_folder, use_kernels=False, verify=True) is not None


def test_nothing_stays_behind_in_transformers(nothing_stays_behind):
    graft = grafted("qwen3", tiny.guide_mapping())
    assert graft.verify(every_site=False).passed
    graft.remove()
