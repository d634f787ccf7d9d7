"""Rules that tell one number from another: they are noticed, and come out as by Transformers' own hand."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernelgraft.checkpoint.renaming import Renaming
from named_models import Named, Opened, fitted, led_to, loaded_both_ways, names_of_a_model

transformers = pytest.importorskip("transformers")
loading = pytest.importorskip("transformers.core_model_loading")

pytestmark = pytest.mark.transformers

NAME = "model.layers.3.mlp.experts.14.fc1.weight"
BLIND = [
    "fc1",
    r"layers\.(\d+)\.mlp",
    r"layers.\d+.mlp",
    r"^model\.(.+)",
    r"experts\.\d+\.fc1.weight",
    "mlp.experts.*.fc1.weight",
    r"(?<!text\.)layers",
    r"(^|model\.)layers\.",
    r"[a-z]+c1",
    "projector.proj.0",
    r"blocks\.[0-3]\.norm",
    r"stages\.\d\.",
]
ASKING = [
    r"layers\.3\.",
    r"layers\.4\.",
    r"layers\.[0-9]\.",
    r"layers\.[12]",
    r"layers\.\d\.",
    r"layers\.\d\d\.",
    r"layers\.\d+\d\.",
    r"layers\.\d\d?\.",
    r"layers\.1[0-9]*\.",
    r"layers\..\.",
    r"layers\.[^.]\.",
    r"experts\.7\.",
    r"\.7\.",
    "7",
    # Found behind the experts, this may stand at the layers too.
    r"\d+(?=\.fc)",
    r"\.\d+(?!\.mlp)",
]

# They ask for numbers in a way that is not looked into, so they count as being for all names.
ASKING_SOMEHOW = [r"layers\.\d{2}\.", r"layers\.(?!0\.)", r"(?<!layers\.)7", r"(?<!layers\.[0-9])\.7"]


def renaming(*rules):
    model = Named({"model.weight": (1,)})
    return Renaming(model, list(rules), model.state_dict())


@pytest.mark.parametrize("pattern", BLIND)
def test_a_rule_that_does_the_same_to_all_numbers(pattern):
    assert renaming(loading.WeightRenaming(pattern, "new")).is_blind_to_numbers(NAME)
    assert renaming(loading.WeightConverter(pattern, "new", [loading.Transpose()])).is_blind_to_numbers(NAME)


@pytest.mark.parametrize("pattern", [*ASKING, *ASKING_SOMEHOW])
def test_a_rule_that_asks_for_a_number(pattern):
    assert not renaming(loading.WeightRenaming(pattern, "new")).is_blind_to_numbers(NAME)
    assert not renaming(loading.WeightConverter(pattern, "new", [loading.Transpose()])).is_blind_to_numbers(NAME)


@pytest.mark.parametrize("pattern", ASKING)
def test_a_rule_that_asks_for_a_number_in_other_names(pattern):
    rule = loading.WeightRenaming(pattern, "new")
    assert renaming(rule).is_blind_to_numbers("model.embed.weight")


def test_a_rule_that_goes_by_what_it_has_met():
    rule = loading.GroupWeightRename(["fc0", "fc1"], ["fc1", "fc2"])
    assert not renaming(rule).is_blind_to_numbers(NAME)
    assert renaming(rule).is_blind_to_numbers("model.layers.3.norm.weight")


def test_a_scope_with_a_number():
    rule = loading.WeightRenaming("fc1", "new")
    rule.scope_prefix, rule.base_model_prefix = "layers.3", "model"
    assert not renaming(rule).is_blind_to_numbers(NAME)
    assert not renaming(rule).is_blind_to_numbers(NAME.replace("3", "4"))


@st.composite
def renamings(draw):
    sources = [
        *BLIND,
        *ASKING,
        *ASKING_SOMEHOW[:-1],
        "a.weight",
        "layers",
        r"(\d+)\.experts\.\d\.",
        "experts.*.up",
        r"(a|up)\.weight",
    ]
    targets = ["b.weight", "layers", "model.layers.1.", r"layers.\1.b", r"text.\1", "text.layers", r"\1", "a"]
    source, target = draw(st.sampled_from(sources)), draw(st.sampled_from(targets))
    if r"\1" in target and "(" not in source.replace("(?", ""):
        target = "b"
    rule = loading.WeightRenaming(source, target)
    scope = draw(st.sampled_from([None, None, None, "", "layers", "layers.1", "text"]))
    if scope is not None:
        rule.scope_prefix, rule.base_model_prefix = scope, "model"
    return rule


@st.composite
def converters(draw):
    sources = ["experts.*.up.weight", "experts.*.down.weight"][: draw(st.integers(1, 2))]
    target = draw(st.sampled_from(["experts.both", "experts.up.weight", "layers.1.both"]))
    operations = [loading.MergeModulelist(dim=draw(st.integers(0, 1)))]
    if len(sources) > 1:
        operations.append(loading.Concatenate(dim=1))
    if draw(st.booleans()):
        operations.append(loading.Transpose(1, 2, check_dims=draw(st.booleans())))
    return loading.WeightConverter(sources, target, operations)


@st.composite
def peculiar(draw):
    """A rule that goes by what it has met before, or one that counts."""
    offset = getattr(loading, "Inkling2IndexOffsetWeightRename", None)
    if offset is not None and draw(st.booleans()):
        return offset(r"layers\.(\d+)\.c", r"layers.\1.c", offset=1)
    return loading.GroupWeightRename(["a.weight", "c.weight"], ["c.weight", "d.weight"])


@st.composite
def cases(draw):
    """Rules, a checkpoint, and the names of a model that has most of what comes of it."""
    rules = draw(st.lists(renamings() | converters(), max_size=4))
    if draw(st.integers(0, 4)) == 0:
        rules.insert(draw(st.integers(0, len(rules))), draw(peculiar()))
    prefix = draw(st.sampled_from(["model.", "", "model.text."]))
    shapes = {f"{prefix}norm.weight": (4,)}
    for layer in draw(st.sampled_from([range(4), range(12), range(8, 12), [1, 2, 3, 30]])):
        experts = range(5 if layer else draw(st.sampled_from([0, 5])))
        rests = ["a.weight", "c.weight", *(f"experts.{n}.{each}.weight" for n in experts for each in ("up", "down"))]
        shapes |= {f"{prefix}layers.{layer}.{rest}": (4, 2) for rest in rests}
    odd = draw(st.lists(st.sampled_from(list(shapes)), max_size=3, unique=True))
    dtypes = {}
    for name in odd:
        how = draw(st.sampled_from(["shape", "dtype", "missing"]))
        shapes[name] = (2, 4) if how == "shape" else shapes[name]
        dtypes |= {name: torch.float16} if how == "dtype" else {}
    for name in odd[:1] if draw(st.booleans()) else []:
        del shapes[name]
    groups, _ = led_to(shapes, rules)
    state = ["model.missing.weight", *(name for group in groups[: -len(groups) // 10] for name in group)]
    if draw(st.booleans()):  # a model without the part that the checkpoint's is in, or the other way round
        state = [f"model.{name}" if prefix == "" else name.removeprefix("model.") for name in state]
    return rules, Opened(shapes, dtypes), names_of_a_model(state)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_whatever_rules_do_comes_out_as_by_transformers(case):
    rules, checkpoint, state = case
    shapes, _ = fitted(dict.fromkeys(state, (4, 2)), checkpoint, rules)
    ours, theirs = loaded_both_ways(shapes, checkpoint, rules)
    assert ours == theirs
