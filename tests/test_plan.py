"""Plans as pages to read, and as data."""

import json

import pytest
import torch
from torch import nn

import kernelgraft
import tiny
from kernelgraft import Kernel, KernelConfig, Plan
from kernelgraft.errors import ConversionError, GraftError

pytestmark = pytest.mark.transformers

PAGE = """\
Plan for Qwen3ForCausalLM on cpu: 9 sites

RMSNormMLP for Qwen3RMSNorm + Qwen3MLP, 2 sites
  from    {example}:RMSNormMLP
  at      model.layers.{{0..1}}.post_attention_layernorm (the kernel stands here)
          model.layers.{{0..1}}.mlp
  chain   each output goes to the next member only, in eval and in train (on meta tensors)
  packs   scale               (32,)          = post_attention_layernorm.weight
          gate_up_proj.weight (96, 32)       = cat(mlp.gate_proj.weight, mlp.up_proj.weight, dim=0)
          down_proj.weight    (32, 48)       = mlp.down_proj.weight

CustomRMSNorm for Qwen3RMSNorm, 4 sites
  from    {example}:CustomRMSNorm
  at      model.layers.{{0..1}}.self_attn.q_norm, model.layers.{{0..1}}.self_attn.k_norm
  packs   scale (8,)           = weight

CustomRMSNorm for Qwen3RMSNorm, 3 sites
  from    {example}:CustomRMSNorm
  at      model.layers.{{0..1}}.input_layernorm, model.norm
  packs   scale (32,)          = weight"""


@pytest.fixture(scope="module")
def model():
    return tiny.model("qwen3")


def test_the_page_of_the_guides_examples(model):
    page = str(kernelgraft.plan(model, tiny.guide_config()))
    assert page == PAGE.format(example=tiny.EXAMPLE)


class Half(nn.Module):
    """Uses the first half of a weight only: its rule has no way back."""

    def forward(self, input):
        return nn.functional.linear(input, self.weight)


class HalfLayout(nn.Module):
    packing = {"weight": {"sources": "weight", "operations": [["slice", 0, 0, 2]]}}

    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, in_features))


class Plain(nn.Module):
    def forward(self, hidden_states):
        return hidden_states


def recorded_linear():
    with kernelgraft.recorded():
        return nn.Sequential(nn.Linear(3, 4, bias=False))


def plans():
    model = tiny.model("qwen3")
    yield kernelgraft.plan(model, tiny.guide_config())
    yield kernelgraft.plan(model, KernelConfig({"RMSNorm": Plain, "MLP": ""}))
    yield kernelgraft.plan(recorded_linear(), KernelConfig({"Linear": Kernel(Half, HalfLayout)}))
    yield kernelgraft.plan(model, KernelConfig({"apply_rotary_pos_emb": lambda q, k, cos, sin: (q, k)}))


def test_a_plan_goes_to_json_and_back():
    for plan in plans():
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
        assert str(Plan.from_json(plan.to_json())) == str(plan)


def test_what_is_left_alone_and_near_misses_are_on_the_page(model):
    plan = kernelgraft.plan(model, KernelConfig({"RMSNorm": Plain, "MLP": ""}))
    assert "Left as it is:\n  MLP: model.layers.{0..1}.mlp: left alone, as the config says" in str(plan)
    one = {
        (
            ("RMSNorm", "model.layers.0.post_attention_layernorm"),
            ("MLP", "model.layers.0.mlp"),
        ): f"{tiny.EXAMPLE}:RMSNormMLP"
    }
    page = str(kernelgraft.plan(model, KernelConfig(one)))
    assert "Near misses:" in page
    assert "model.layers.1.mlp (Qwen3MLP) for MLP: no path pattern names it" in page


def test_the_summary_counts_sites_and_near_misses(model):
    assert (
        kernelgraft.plan(model, tiny.guide_config()).summary()
        == "Qwen3ForCausalLM: CustomRMSNorm at 7 sites, RMSNormMLP at 2 sites; 0 near misses"
    )


def test_a_rule_without_an_inverse_is_in_the_plan_and_fails_only_when_original_names_are_asked_for():
    model = recorded_linear()
    weight = model[0].weight.detach().clone()
    graft = kernelgraft.graft(model, KernelConfig({"Linear": Kernel(Half, HalfLayout)}))
    assert "NO WAY BACK for weight: 6 of its 12 elements are in no packed parameter" in str(graft.plan)
    x = torch.randn(5, 3)
    assert torch.equal(model(x), nn.functional.linear(x, weight[:2]))
    with pytest.raises(ConversionError, match="weight"):
        model.state_dict()
    with pytest.raises(GraftError, match=r"0\.weight.*no inverse"):
        graft.remove()
    assert graft.is_applied
    assert torch.equal(model(x), nn.functional.linear(x, weight[:2]))
