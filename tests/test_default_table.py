"""The default table of kernels: taken where it fits, listed with a reason where not, fetched only where needed."""

import socket

import pytest
import torch
from torch import nn

import kernelgraft
import tiny
import toys
from kernelgraft import KernelConfig, compat
from kernelgraft.errors import KernelError

pytestmark = pytest.mark.transformers


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def load(qwen3_folder):
    def load(**kwargs):
        return kernelgraft.AutoModelForCausalLM.from_pretrained(qwen3_folder, **kwargs)

    return load


@pytest.fixture
def table(monkeypatch):
    def install(mapping):
        monkeypatch.setattr(compat, "default_table", lambda: (KernelConfig(mapping).entries, ()))

    return install


class Broken:
    """A repository object whose load fails, as one on a server that cannot be reached."""

    layer_name = "Broken"

    def __init__(self, error):
        self.error = error
        self.loads = 0

    def load(self):
        self.loads += 1
        raise self.error


@pytest.mark.parametrize("kwargs", [{"use_kernels": True}, {"kernel_config": KernelConfig({"Embedding": ""})}])
def test_transformers_own_table_fetches_nothing_for_the_cpu_and_the_plan_says_why(kwargs, load):
    model = load(**kwargs)
    plan = kernelgraft.graft_of(model).plan
    assert plan.sites == plan.functions == ()
    reasons = {r.target: r.reason for r in plan.rejected}
    _, missing = compat.default_table()
    if missing:
        assert missing[0].reason == reasons["default table"]
    else:
        assert reasons["RMSNorm"] == "the config has no kernel for 'cpu'"
        assert "rotary_pos_emb" in reasons
        assert "MegaBlocksMoeMLP" not in reasons  # nothing of the model is called so
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.model("qwen3")))
    assert "Left as it is:" in str(plan)


def test_what_a_table_offers_is_put_in(load, table):
    table({"RMSNorm": f"{tiny.EXAMPLE}:CustomRMSNorm"})
    for kwargs in ({"use_kernels": True}, {"kernel_config": KernelConfig({"MLP": ""})}):
        model = load(**kwargs)
        assert torch.equal(tiny.logits(model), tiny.logits(tiny.model("qwen3")))
        assert kernelgraft.graft_of(model).calls.kernel == 9


@pytest.mark.parametrize("config", [{"inherit_mapping": False}, {"use_local_kernel": True}])
def test_a_table_is_not_asked_for_where_none_is_inherited(config, load, monkeypatch):
    def refuse():
        raise AssertionError("the table was asked for")

    monkeypatch.setattr(compat, "default_table", refuse)
    config = KernelConfig({"RMSNorm": f"{tiny.EXAMPLE}:CustomRMSNorm"}, **config)
    assert kernelgraft.graft_of(load(kernel_config=config)).plan.sites
    kernelgraft.graft(tiny.model("qwen3"), KernelConfig({"RMSNorm": f"{tiny.EXAMPLE}:CustomRMSNorm"}))


@pytest.mark.parametrize("error", [KernelError("no such revision"), ConnectionError("no route"), RuntimeError("boom")])
def test_a_kernel_of_the_table_that_cannot_be_loaded_is_listed_and_the_load_goes_on(error, load, table):
    broken = Broken(error)
    table({"RMSNorm": broken, "rotary_pos_emb": broken, "MLP": {"cuda": broken}, "NoSuchModule": broken})
    model = load(kernel_config=KernelConfig({"Embedding": ""}))
    plan = kernelgraft.graft_of(model).plan
    reasons = {r.target: r for r in plan.rejected}
    assert str(error) in reasons["RMSNorm"].reason
    assert "model.layers.{0..1}.input_layernorm" in reasons["RMSNorm"].place
    assert broken.loads == 1
    assert str(error) in reasons["rotary_pos_emb"].reason
    assert reasons["MLP"].reason == "the config has no kernel for 'cpu'"
    assert "NoSuchModule" not in reasons
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.model("qwen3")))


class Unfit(nn.Module):
    def forward(self, hidden_states):
        return hidden_states * self.no_such_weight


def test_a_kernel_of_the_table_that_does_not_fit_is_listed(load, table):
    table({"RMSNorm": Unfit})
    model = load(use_kernels=True)
    (rejected,) = kernelgraft.graft_of(model).plan.rejected
    assert "Unfit.forward reads self.no_such_weight" in rejected.reason
    assert rejected.place.endswith("model.layers.{0..1}.post_attention_layernorm, model.norm")


def test_what_the_config_names_wins_over_the_table(load, table):
    broken = Broken(RuntimeError("asked for"))
    table({"RMSNorm": broken, "SiLUActivation": toys.kernel(lambda self, input: input)})
    model = load(kernel_config=tiny.guide_config(inherit_mapping=True))
    plan = kernelgraft.graft_of(model).plan
    assert broken.loads == 0
    assert {plan.kinds[site.kind].kernels[0].name for site in plan.sites} == {"CustomRMSNorm", "RMSNormMLP"}
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.model("qwen3")))


def test_a_mode_that_the_table_has_no_kernel_for_runs_the_originals(load, table):
    table({"RMSNorm": {"cpu": {"inference": f"{tiny.EXAMPLE}:CustomRMSNorm"}}})
    model, expected = load(use_kernels=True), tiny.logits(tiny.model("qwen3"))
    graft = kernelgraft.graft_of(model)
    assert torch.equal(tiny.logits(model), expected)
    assert (graft.calls.kernel, graft.calls.reference) == (9, 0)
    model.train()
    assert torch.equal(tiny.logits(model), expected)
    assert (graft.calls.kernel, graft.calls.reference) == (9, 9)


def test_a_kernel_that_the_config_names_is_an_error_where_one_of_the_table_is_not(load, table):
    broken = Broken(ConnectionError("no route"))
    table({})
    with pytest.raises(Exception, match="no route"):
        load(kernel_config=KernelConfig({"RMSNorm": broken}))
