"""Which modules a config names: classes, path patterns, overlaps, near misses."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tiny
from kernelgraft import matching
from kernelgraft.errors import PlanError

pytestmark = pytest.mark.transformers

NORM, MLP = "model.layers.*.post_attention_layernorm", "model.layers.*.mlp"


@pytest.fixture(scope="module")
def modules():
    return dict(tiny.model("qwen3").named_modules())


class Marked(nn.Module):
    kernel_layer_name = "Special"


class Derived(nn.LayerNorm):
    pass


class OurConfig:
    """Makes `Our` a model family's name in this module."""


class OurMLP(nn.Module):
    pass


class OurBlockSparseMLP(nn.Module):
    pass


@pytest.mark.parametrize(
    ("cls", "name", "answers"),
    [
        (Marked, "Special", True),
        (Marked, "Marked", True),
        (Derived, "LayerNorm", True),
        (Derived, "Norm", False),
        (OurMLP, "MLP", True),
        (OurMLP, "LP", False),
        (OurBlockSparseMLP, "MLP", False),
        (nn.Linear, "Linear", True),
        (nn.Linear, "Bilinear", False),
    ],
)
def test_a_class_answers_to_its_mark_its_own_and_inherited_names_and_its_name_behind_a_familys(cls, name, answers):
    assert matching.answers_to(cls, name) is answers


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "qwen3_moe", "mixtral"])
def test_the_general_name_of_a_norm_is_found_in_every_family(kind):
    model = tiny.model(kind)
    norms = [path for path, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")]
    assert norms
    assert [claim.paths[0] for claim in matching.find_modules(dict(model.named_modules()), "RMSNorm")] == norms


def test_names_of_a_class_are_those_it_answers_to(modules):
    for module in modules.values():
        assert all(matching.answers_to(type(module), name) for name in matching.names_of(type(module)))


def test_a_fusion_claims_the_children_of_each_parent_in_the_configs_order(modules):
    claims = matching.find_placed(modules, [("RMSNorm", NORM), ("MLP", MLP)], "model")
    assert [claim.paths for claim in claims] == [
        (f"model.layers.{i}.post_attention_layernorm", f"model.layers.{i}.mlp") for i in range(2)
    ]


def test_a_pattern_that_names_one_layer_claims_that_layer_only(modules):
    pairs = [("RMSNorm", NORM.replace("*", "1")), ("MLP", MLP.replace("*", "1"))]
    (claim,) = matching.find_placed(modules, pairs, "model")
    assert claim.paths == ("model.layers.1.post_attention_layernorm", "model.layers.1.mlp")


def test_patterns_are_tried_with_and_without_the_base_models_prefix(modules):
    short = [("RMSNorm", NORM.removeprefix("model.")), ("MLP", MLP.removeprefix("model."))]
    assert len(matching.find_placed(modules, short, "model")) == 2
    base = {path.removeprefix("model."): module for path, module in modules.items() if path.startswith("model.")}
    claims = matching.find_placed(base, [("RMSNorm", NORM), ("MLP", MLP)], "model")
    assert claims[0].paths == ("layers.0.post_attention_layernorm", "layers.0.mlp")


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (
            [("RMSNorm", "model.layer.*.post_attention_layernorm"), ("MLP", "model.layer.*.mlp")],
            [
                "matches no module",
                "('RMSNorm', 'model.layers.*.post_attention_layernorm')",
                "('MLP', 'model.layers.*.mlp')",
            ],
        ),
        (
            [("RMSNorm", NORM), ("Banana", MLP)],
            ["model.layers.0.mlp", "Qwen3MLP", "no Banana", "Write ('MLP', 'model.layers.*.mlp')"],
        ),
        (
            [("RMSNorm", NORM), ("MLP", "model.layers.*.feed_forward")],
            ["model.layers.0.feed_forward", "no such child", "mlp"],
        ),
    ],
)
def test_what_does_not_match_is_refused_with_what_is_there(modules, pairs, said):
    with pytest.raises(PlanError) as caught:
        matching.find_placed(modules, pairs, "model")
    assert all(text in str(caught.value) for text in said)


def test_one_layer_of_another_class_is_an_error_that_names_it():
    modules = dict(tiny.model("qwen3_moe", mlp_only_layers=[1]).named_modules())
    with pytest.raises(PlanError, match=r"model\.layers\.0\.mlp.*Qwen3MoeSparseMoeBlock"):
        matching.find_placed(modules, [("RMSNorm", NORM), ("MLP", MLP)], "model")


segments = st.lists(st.sampled_from(["a", "b", "0", "12", "mlp"]), min_size=1, max_size=5)


@given(segments)
def test_a_path_matches_itself_and_its_stars(path):
    text = ".".join(path)
    assert matching.path_matches(text, text)
    for index in range(len(path)):
        starred = [*path[:index], "*", *path[index + 1 :]]
        assert matching.path_matches(".".join(starred), text)
    assert matching.path_matches("**", text)
    assert not matching.path_matches(text + ".*", text)


@given(segments, segments, segments)
def test_two_stars_stand_for_any_number_of_segments(head, middle, tail):
    pattern = ".".join([*head, "**", *tail])
    assert matching.path_matches(pattern, ".".join([*head, *tail]))
    assert matching.path_matches(pattern, ".".join([*head, *middle, *tail]))


def test_the_rest_of_a_pattern_is_literal():
    assert not matching.path_matches("a.b", "axb")
    assert not matching.path_matches("*.mlp", "a.b.mlp")


def claims(*paths):
    return [matching.Claim((path,), ("X",)) for path in paths]


def test_overlaps_are_refused_naming_both():
    with pytest.raises(PlanError, match="asked for twice"):
        matching.check_overlaps(claims("a.b", "a.b"))
    with pytest.raises(PlanError, match=r"'a\.b\.c'.*lies inside 'a\.b'"):
        matching.check_overlaps(claims("a.b.c", "a.b"))
    matching.check_overlaps(claims("a.b", "a.bc", "a.c"))


def test_near_misses_say_why():
    model = nn.ModuleDict({"one": OurMLP(), "two": OurBlockSparseMLP(), "three": nn.Linear(1, 1)})
    found = list(matching.near_misses(dict(model.named_modules()), "MLP", taken={"one"}))
    assert [(miss.path, miss.class_name) for miss in found] == [("two", "OurBlockSparseMLP")]
    assert "model family" in found[0].reason
    untaken = list(matching.near_misses(dict(model.named_modules()), "MLP", taken=set()))
    assert "no path pattern names it" in untaken[0].reason


def expand(text):
    """The paths that a collapsed text stands for."""
    found = []
    for part in re.split(r", (?![^{]*})", text):
        options = [[]]
        for piece in re.split(r"({[^}]*})", part):
            choices = [piece]
            if piece.startswith("{"):
                runs = [run.split("..") for run in piece[1:-1].split(",")]
                choices = [str(n) for run in runs for n in range(int(run[0]), int(run[-1]) + 1)]
            options = [[*option, choice] for option in options for choice in choices]
        found += ["".join(option) for option in options]
    return found


@given(st.lists(st.tuples(st.integers(0, 12), st.sampled_from(["q", "k"]), st.integers(0, 3)), min_size=1, unique=True))
def test_collapsed_paths_stand_for_the_same_paths(drawn):
    paths = [f"layers.{i}.{name}.{j}" for i, name, j in drawn]
    assert sorted(expand(matching.collapse_paths(paths))) == sorted(paths)


def test_collapsed_paths_read_well():
    assert matching.collapse_paths([f"model.layers.{i}.mlp" for i in range(30)]) == "model.layers.{0..29}.mlp"
    assert matching.collapse_paths(["a.0", "a.1", "a.3"]) == "a.{0..1,3}"
    assert matching.collapse_paths(["norm"]) == "norm"
    assert sorted(expand(matching.collapse_paths(["a.01", "a.1", "a.2"]))) == ["a.01", "a.1", "a.2"]


def test_an_unknown_name_is_answered_with_the_nearest(modules):
    text = matching.no_module_message(modules, "RMSnorm", ["apply_rotary_pos_emb"])
    assert "'RMSnorm'" in text
    assert "Nearest: RMSNorm" in text
    assert "apply_rotary_pos_emb" in text
