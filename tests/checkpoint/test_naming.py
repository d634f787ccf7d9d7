"""A checkpoint converted one block of a kind for all, held against Transformers' own conversion, name by name."""

import logging
from re import _parser as regex  # to make an example of a pattern one must see into it

import pytest
import torch
from safetensors.torch import load_file, save_file

import kernelgraft
import tiny
from kernelgraft.conversion import LazyTensor
from named_models import Opened, fitted, led_to, loaded_both_ways, names_of_a_model

transformers = pytest.importorskip("transformers")
loading = pytest.importorskip("transformers.core_model_loading")
registry = pytest.importorskip("transformers.conversion_mapping")

pytestmark = pytest.mark.transformers

# --- every conversion that is registered


def example(pattern, layer, expert, nth):
    """A text that a rule's pattern matches, with these numbers; of alternatives the one at `nth`."""

    def text(tokens):
        return "".join(one(str(kind), value) for kind, value in tokens)

    def one(kind, value):
        if kind == "LITERAL":
            return chr(value)
        if kind == "ANY":
            return "."
        if kind == "IN":
            kind, found = value[0]
            return layer if str(kind) == "CATEGORY" else chr(found[0] if str(kind) == "RANGE" else found)
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            low, _, inner = value
            if str(inner[0][0]) == "ANY":
                return "part.weight" if low else expert
            return text(inner) if low else ""
        if kind == "SUBPATTERN":
            return text(value[-1])
        if kind == "BRANCH":
            return text(value[1][nth % len(value[1])])
        return ""  # anchors and assertions

    return text(regex.parse(pattern.replace("*.", r".*\.")))


LAYERS, NUM_EXPERTS = ("0", "1", "2", "11"), 5
SHAPES = [(24, 6), (2, 24, 6), (24,), (24, 2, 3, 1, 4)]


def names_for(rules):
    """Names that rules are for, in layers of which the first has no experts, and some that no rule is for."""
    names = ["lm_head.weight", "model.embed.weight", "model.layers.0.first.weight"]
    for layer in LAYERS:
        names += [f"model.layers.{layer}.own.weight", f"model.layers.{layer}.other.weight"]
        for rule in rules:
            for nth, pattern in enumerate(rule.source_patterns):
                experts = (range(NUM_EXPERTS) if layer != "0" else ()) if "*" in pattern else range(1)
                for text in [example(pattern, layer, str(expert), nth) for expert in experts]:
                    name = text.strip(".") + ("" if text.endswith(("weight", "bias")) else ".weight")
                    is_whole = pattern.startswith("^") or f".{layer}." in f".{name}"
                    names.append(name if is_whole else f"model.layers.{layer}.{name}")
    return [name for name in dict.fromkeys(names) if all(name.split("."))]


def registered():
    """Every list of registered rules, once, with the model types that have it."""
    found = {}
    for model_type in registry._build_checkpoint_conversion_mapping():
        rules = [*registry.get_checkpoint_conversion_mapping(model_type)]
        rules += registry.get_checkpoint_conversion_mapping("legacy")
        key = repr([(rule, getattr(rule, "operations", ())) for rule in rules])
        found.setdefault(key, (rules, []))[1].append(model_type)
    return list(found.values())


def fitting(state, names, rules):
    """Shapes of the model and of the checkpoint, all of one that the operations take, or most of them."""
    tried = []
    for shape in SHAPES:
        given = dict.fromkeys(names, shape)
        shapes, failed = fitted(dict.fromkeys(state, shape), Opened(given), rules)
        tried.append((failed, len(tried), shapes, given))
        if not failed:
            break
    return min(tried)[2:]


@pytest.fixture
def left_to_transformers(caplog):
    """`left_to_transformers()` is why checkpoints were not converted by us since the last call."""
    caplog.set_level(logging.DEBUG, "kernelgraft")

    def reasons():
        found = [record.getMessage() for record in caplog.records if "name by name" in record.getMessage()]
        caplog.clear()
        return found

    return reasons


@pytest.fixture(autouse=True)
def no_bars():
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    yield
    if shown:
        transformers.utils.logging.enable_progress_bar()


def test_every_registered_conversion_comes_out_as_transformers_own(left_to_transformers):
    """Layers of two kinds, tensors that are missing or unexpected, and one of another shape."""
    model_types, left, num_lazy, num_merged = [], [], 0, 0
    for rules, types in registered():
        groups, names = led_to(names_for(rules), rules)
        state = names_of_a_model(
            ["model.missing.weight", *(name for group in groups[: -len(groups) // 10] for name in group)]
        )
        shapes, given = fitting(state, names, rules)
        given["model.layers.2.own.weight"] = (3, 5)
        ours, theirs = loaded_both_ways(shapes, Opened(given), rules)
        assert ours == theirs, types
        assert "model.missing.weight" in theirs[1]["missing_keys"]
        left += [(types, reason) for reason in left_to_transformers()]
        model_types += types
        lazies = [said for said in theirs[0].values() if issubclass(said[0], LazyTensor)]
        num_lazy += len(lazies)
        num_merged += sum(len(said[-1]) > 1 for said in lazies)
    print(
        f"{len(model_types)} model types, {num_lazy} lazy parameters, {num_merged} merged; left to Transformers: {left}"
    )
    assert len(model_types) > 100
    assert len(left) < 0.1 * len(registered())


# --- real models


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory):
    """A dense layer, then eleven with nine experts each: numbers of one and of two digits."""
    folder = tmp_path_factory.mktemp("moe")
    sizes = {"num_hidden_layers": 12, "num_experts": 9, "hidden_size": 16, "moe_intermediate_size": 6}
    tiny.model("qwen3_moe", mlp_only_layers=[0], **sizes).save_pretrained(folder)
    return folder


def both(folder, cls=transformers.AutoModelForCausalLM, **options):
    """Ours and Transformers' own load: the model, and Transformers' account of it."""
    found = []
    for load in (lambda *args, **kwargs: kernelgraft.from_pretrained(cls, *args, **kwargs), cls.from_pretrained):
        try:
            found.append(load(folder, output_loading_info=True, **options))
        except Exception as error:
            found.append((type(error), str(error)))
    return found


def assert_same(ours, theirs):
    assert {kind: sorted(map(str, found)) for kind, found in ours[1].items()} == {
        kind: sorted(map(str, found)) for kind, found in theirs[1].items()
    }
    state, expected = ours[0].state_dict(), theirs[0].state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_of_many_layers(dtype, moe_folder, left_to_transformers, tmp_path):
    ours, theirs = both(moe_folder, dtype=dtype)
    assert left_to_transformers() == []
    assert_same(ours, theirs)
    saved = []
    for place, (model, _) in zip(("ours", "theirs"), (ours, theirs), strict=True):
        model.save_pretrained(tmp_path / place)
        saved.append(load_file(tmp_path / place / "model.safetensors"))
    # As it was: one tensor for each expert.
    assert list(saved[0]) == list(saved[1])
    assert "model.layers.11.mlp.experts.8.up_proj.weight" in saved[0]
    assert all(torch.equal(tensor, saved[1][name]) for name, tensor in saved[0].items())


def damaged(folder, target, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    (target / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


EXPERT = "model.layers.{}.mlp.experts.{}.{}_proj.weight"


def without_an_expert(tensors):
    for name in ("gate", "up", "down"):
        del tensors[EXPERT.format(7, 8, name)]


def without_a_layer(tensors):
    for name in [name for name in tensors if name.startswith("model.layers.5.")]:
        del tensors[name]


def with_a_layer_too_many(tensors):
    for name in [name for name in tensors if name.startswith("model.layers.11.")]:
        tensors[name.replace(".11.", ".12.")] = tensors[name].clone()


def with_names_of_no_use(tensors):
    for layer in range(12):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
        tensors[f"model.layers.{layer}.mlp.extra"] = torch.ones(2)


def with_another_dtype_in_a_layer(tensors):
    for name in [name for name in tensors if name.startswith("model.layers.3.")]:
        tensors[name] = tensors[name].half()


def with_a_half_precise_expert(tensors):
    tensors[EXPERT.format(3, 3, "up")] = tensors[EXPERT.format(3, 3, "up")].half()


def with_a_smaller_layer(tensors):
    for expert in range(9):
        for name in ("gate", "up"):
            tensors[EXPERT.format(4, expert, name)] = tensors[EXPERT.format(4, expert, name)][:5].clone()


@pytest.mark.parametrize(
    "change",
    [
        without_an_expert,
        without_a_layer,
        with_a_layer_too_many,
        with_names_of_no_use,
        with_another_dtype_in_a_layer,
        with_a_half_precise_expert,
        with_a_smaller_layer,
    ],
)
def test_what_does_not_fit_is_reported_as_by_transformers(change, moe_folder, tmp_path):
    folder = damaged(moe_folder, tmp_path, change)
    torch.manual_seed(0)
    ours, theirs = both(folder, ignore_mismatched_sizes=True)
    if isinstance(theirs[0], type):
        assert ours == theirs
    else:
        for model, _ in (ours, theirs):  # what is missing is drawn
            for name in theirs[1]["missing_keys"] | {name for name, *_ in theirs[1]["mismatched_keys"]}:
                torch.nn.init.ones_(model.get_parameter(name))
        assert_same(ours, theirs)


def test_an_expert_of_another_shape_is_refused_as_by_transformers(moe_folder, tmp_path):
    def change(tensors):
        tensors[EXPERT.format(7, 8, "up")] = torch.ones(3, 5)

    ours, theirs = both(damaged(moe_folder, tmp_path, change))
    assert isinstance(theirs[0], type)
    assert ours == theirs


def test_a_base_model_from_a_checkpoint_with_a_head_and_the_other_way_round(moe_folder, tmp_path):
    ours, theirs = both(moe_folder, cls=transformers.AutoModel)
    assert_same(ours, theirs)
    theirs[0].save_pretrained(tmp_path)
    ours, theirs = both(tmp_path)
    assert theirs[1]["missing_keys"] == {"lm_head.weight"}
    ours[0].lm_head = theirs[0].lm_head
    assert_same(ours, theirs)


def test_names_are_matched_once_for_a_kind_of_layer(monkeypatch):
    asked, rename = [], loading.rename_source_key
    monkeypatch.setattr(loading, "rename_source_key", lambda name, *args: asked.append(name) or rename(name, *args))
    layers, experts = 30, 32
    rests = [f"mlp.experts.{expert}.{name}_proj.weight" for expert in range(experts) for name in ("gate", "up", "down")]
    checkpoint = Opened({f"model.layers.{layer}.{rest}": (8, 4) for layer in range(layers) for rest in rests})
    state = [
        f"model.layers.{layer}.mlp.experts.{name}" for layer in range(layers) for name in ("gate_up_proj", "down_proj")
    ]
    rules = registry.get_checkpoint_conversion_mapping("qwen3_moe")
    shapes, failed = fitted(dict.fromkeys(state, (1,)), checkpoint, rules)
    asked.clear()
    ours, theirs = loaded_both_ways(shapes, checkpoint, rules)
    assert ours == theirs
    assert not failed
    by_us = len(asked) - len(checkpoint)  # Transformers has matched all of them
    assert by_us < len(checkpoint) // 5
