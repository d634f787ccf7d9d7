"""The proof that nothing stays behind is worth something only if it sees what would stay behind."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from transformers_state import Snapshot

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.transformers, pytest.mark.usefixtures("plain")]


def modeling():
    return transformers.models.qwen3.modeling_qwen3


def registered_conversions():
    from transformers import conversion_mapping

    return conversion_mapping._checkpoint_conversion_mapping_cache


LEAKS = {
    "a class swapped in its module": lambda patch: patch.setattr(modeling(), "Qwen3MLP", nn.Identity),
    "a method of a class": lambda patch: patch.setattr(modeling().Qwen3MLP, "forward", lambda self, x: x),
    "a new attribute of a class": lambda patch: patch.setattr(modeling().Qwen3RMSNorm, "fast", 1, raising=False),
    "a function": lambda patch: patch.setattr(modeling(), "rotate_half", lambda x: x),
    "conversions for a family": lambda patch: patch.setitem(registered_conversions(), "qwen3", []),
    "an attention function": lambda patch: patch.setitem(
        transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", print
    ),
    "a model class in an auto mapping": lambda patch: patch.setitem(
        transformers.AutoModelForCausalLM._model_mapping._extra_content, transformers.Qwen3Config, nn.Identity
    ),
    "a function of torch": lambda patch: patch.setattr(torch.nn.functional, "rms_norm", print),
    "a call of every module": lambda patch: patch.setattr(nn.Module, "__call__", print),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_it_sees_a_change(leak, monkeypatch):
    before = Snapshot()
    with monkeypatch.context() as patch:
        LEAKS[leak](patch)
        changes = before.changes()
    assert len(changes) == 1, changes
    assert before.changes() == []


def test_it_sees_more_in_a_list():
    rules = registered_conversions()["mixtral"]
    before = Snapshot()
    rules.append(None)
    try:
        assert len(before.changes()) == 1
    finally:
        rules.pop()


def test_a_module_that_is_imported_is_no_change():
    families = (
        f"transformers.models.{path.parent.name}.{path.stem}"
        for root in transformers.models.__path__
        for path in sorted(Path(root).glob("b*/modeling_*.py"))
    )
    name = next(family for family in families if family not in sys.modules)
    before = Snapshot()
    importlib.import_module(name)
    assert before.changes() == []
