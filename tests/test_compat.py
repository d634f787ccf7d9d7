"""What is asked of Transformers, by feature; the same answers are right on every supported version."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tiny
from kernelgraft import compat

pytestmark = pytest.mark.transformers


def test_a_model_of_transformers_is_known_without_importing_it():
    assert compat.is_pretrained(tiny.model("qwen3"))
    assert not compat.is_pretrained(nn.Linear(2, 2))
    code = (
        "import sys; from torch import nn; from kernelgraft import compat; "
        "assert not compat.is_pretrained(nn.Linear(1, 1)); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("kind", sorted(tiny.KINDS))
def test_a_skeleton_is_the_same_model_without_bytes(kind):
    model = tiny.model(kind)
    before, state = model.config.to_dict(), torch.get_rng_state()
    skeleton, recording = compat.skeleton_of(model)
    assert model.config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert skeleton.config is not model.config
    assert [(n, type(m)) for n, m in skeleton.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
    shapes = [[(n, p.shape) for n, p in each.named_parameters()] for each in (skeleton, model)]
    assert shapes[0] == shapes[1]
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    own = [module for module in skeleton.modules() if type(module).__module__ == type(skeleton).__module__]
    assert all(recording.of(module) is not None for module in own)


def test_a_model_that_cannot_be_built_from_its_config_has_no_skeleton():
    class Odd(tiny.model_class("llama")):
        def __init__(self, config, extra):
            super().__init__(config)
            self.extra = extra

    assert compat.skeleton_of(Odd(tiny.config("llama"), 3)) is None


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_those_that_transformers_ties(tied):
    model = tiny.model("llama", tie_word_embeddings=tied)
    assert compat.tied_weights(model) == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    assert compat.tied_weights(nn.Linear(2, 2)) == {}


def test_which_parameters_are_loaded_in_a_dtype_of_their_own():
    plan = {"wo": torch.float32, r"layers.*.norm": torch.float64}
    dtype_of = compat.loaded_dtypes(SimpleNamespace(dtype_plan=plan))
    assert dtype_of("encoder.0.wo.weight") == torch.float32
    assert dtype_of("layers.3.norm.weight") == torch.float64
    assert dtype_of("encoder.0.wi.weight") is None
    for nothing in ({}, None):
        assert compat.loaded_dtypes(SimpleNamespace(dtype_plan=nothing))("encoder.0.wo.weight") is None


def test_which_files_are_not_mapped(monkeypatch):
    assert not compat.reads_whole_files(SimpleNamespace(disable_mmap=None), ["a", "b"])
    assert compat.reads_whole_files(SimpleNamespace(disable_mmap=True), ["a"])
    monkeypatch.setattr("transformers.modeling_utils._is_on_hf_mount", lambda file: file == "b")
    assert compat.reads_whole_files(SimpleNamespace(disable_mmap=None), ["a", "b"])


def test_the_prefix_is_the_name_of_the_base_model():
    assert compat.base_prefix(tiny.model("llama")) == "model"
    assert compat.base_prefix(tiny.model("bert")) == "bert"
    assert compat.base_prefix(nn.Linear(2, 2)) == ""


def test_the_default_table_is_transformers_own_or_there_is_a_reason(monkeypatch):
    from transformers.integrations import hub_kernels

    entries, rejected = compat.default_table()
    if hasattr(hub_kernels, "_build_kernel_mapping"):
        assert rejected == ()
        assert {entry.target for entry in entries} == set(hub_kernels._build_kernel_mapping())
        monkeypatch.delattr(hub_kernels, "_build_kernel_mapping")
        entries, rejected = compat.default_table()
    assert entries == ()
    (why,) = rejected
    assert why.target == "default table"
    assert "kernels" in why.reason


def test_asking_for_the_table_changes_nothing_and_fetches_nothing(monkeypatch):
    import socket

    from transformers.integrations import hub_kernels

    from transformers_state import Snapshot

    def refuse(*_, **__):
        raise AssertionError("the network was used")

    compat.default_table()
    before = Snapshot()
    monkeypatch.setattr(socket.socket, "connect", refuse)
    compat.default_table()
    assert before.changes() == []
    assert hub_kernels.__name__ in sys.modules
