"""Transformers' rules for one model: the same as from its whole table, which is not made."""

import re

import pytest

import kernelgraft
import tiny
from kernelgraft.checkpoint.own_rules import _made, _table, with_own_rules

pytestmark = pytest.mark.transformers

conversion_mapping = pytest.importorskip("transformers.conversion_mapping")
loading = pytest.importorskip("transformers.core_model_loading")
modeling = pytest.importorskip("transformers.modeling_utils")
TABLE = "_checkpoint_conversion_mapping_cache"


@pytest.fixture
def no_table(monkeypatch, checkpoint):
    """As before the first load of a process; models of two kinds are saved before, which makes the table."""
    for kind in ("qwen3", "qwen3_moe"):
        checkpoint(kind)
    monkeypatch.setattr(conversion_mapping, TABLE, None)


def content(found):
    """All that a rule is, as data."""
    if isinstance(found, re.Pattern):
        return found.pattern, found.flags
    if isinstance(found, list | tuple):
        return [content(each) for each in found]
    if isinstance(found, dict):
        return {key: content(value) for key, value in found.items()}
    if type(found).__module__ == loading.__name__:
        slots = {name for cls in type(found).__mro__ for name in getattr(cls, "__slots__", ()) if hasattr(found, name)}
        return type(found), content({name: getattr(found, name) for name in slots} | getattr(found, "__dict__", {}))
    return type(found) if re.search(" at 0x", repr(found)) else found


def load(folder, **kwargs):
    return kernelgraft.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def test_every_rule_is_as_in_the_table():
    whole = conversion_mapping._build_checkpoint_conversion_mapping()
    table = _table(vars(conversion_mapping))
    assert list(table) == list(whole)
    for name, rules in whole.items():
        assert content([_made(rule) for rule in table[name]]) == content(rules), name


def test_a_rule_is_made_when_it_is_asked_for(monkeypatch):
    made = []
    original = loading.WeightTransform.__init__
    monkeypatch.setattr(
        loading.WeightTransform, "__init__", lambda rule, *a, **k: (made.append(rule), original(rule, *a, **k))[1]
    )
    table = _table(vars(conversion_mapping))
    before = len(made)
    rules = [_made(rule) for rule in table["qwen2_moe"]]
    assert made[before:] == rules
    assert [_made(rule) for rule in table["qwen2_moe"]] == rules
    assert len(made) < sum(map(len, table.values())) / 10


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_a_load_makes_no_table_and_gives_the_same(kind, checkpoint, no_table):
    folder = checkpoint(kind)
    model = load(folder)
    assert getattr(conversion_mapping, TABLE) is None
    plain = load(folder, use_kernels=False)
    assert getattr(conversion_mapping, TABLE) is not None
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items())
    assert content(model._weight_conversions) == content(load(folder)._weight_conversions)


def test_each_load_gets_rules_of_its_own(checkpoint, no_table):
    folder = checkpoint("qwen3_moe")
    one, two = (load(folder)._weight_conversions for _ in range(2))
    assert one
    assert not {id(rule) for rule in one} & {id(rule) for rule in two}


def test_the_rules_that_a_key_mapping_gives_come_first(checkpoint, no_table):
    model = load(checkpoint("qwen3"), key_mapping={r"^model\.norm": "model.norm"})
    assert [rule.source_patterns for rule in model._weight_conversions] == [[r"^model\.norm"]]


def test_rules_that_were_registered_count(checkpoint, no_table, monkeypatch):
    """The table is there then; one that comes after the method was made counts as well."""
    monkeypatch.setattr(conversion_mapping, "USER_REGISTERED_MAPPINGS", set())
    method = with_own_rules(tiny.model_class("qwen3"))
    rule = loading.WeightRenaming(r"^model\.norm", "model.norm")
    conversion_mapping.register_checkpoint_conversion_mapping("qwen3", [rule], overwrite=True)
    folder = checkpoint("qwen3")
    for model in (method(tiny.model_class("qwen3"), folder), load(folder)):
        assert [each.source_patterns for each in model._weight_conversions] == [[r"^model\.norm"]]


def test_what_has_the_table_is_left_alone(checkpoint):
    load(checkpoint("qwen3"), use_kernels=False)
    assert with_own_rules(tiny.model_class("qwen3")) is None


def test_code_of_other_functions_is_left_alone(no_table, monkeypatch):
    class Own(tiny.model_class("qwen3")):
        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            return super().from_pretrained(*args, **kwargs)

    assert with_own_rules(Own) is None
    monkeypatch.delattr(modeling, "get_model_conversion_mapping")
    assert with_own_rules(tiny.model_class("qwen3")) is None


def test_a_table_that_cannot_be_made_so_is_made_as_ever(checkpoint, no_table, monkeypatch):
    """Transformers' code may ask of a rule what one that is not made cannot answer."""
    build = conversion_mapping._build_checkpoint_conversion_mapping
    monkeypatch.setattr(conversion_mapping, "whole", build(), raising=False)

    def asking():
        return whole if isinstance(WeightRenaming("a", "b"), WeightRenaming) else {}  # noqa: F821

    asking = type(build)(asking.__code__, vars(conversion_mapping))
    monkeypatch.setattr(conversion_mapping, "_build_checkpoint_conversion_mapping", asking)
    model = load(checkpoint("qwen3_moe"))
    assert getattr(conversion_mapping, TABLE) is conversion_mapping.whole
    assert model._weight_conversions
