"""Transformers' rule objects as rules of a layout."""

import re
from types import SimpleNamespace

import pytest
import torch

from kernelgraft.conversion import LazyTensor, Program, TensorSource, read_rules
from kernelgraft.errors import ConversionError

loading = pytest.importorskip("transformers.core_model_loading")
from transformers.core_model_loading import (  # noqa: E402
    Chunk,
    Concatenate,
    GroupWeightRename,
    MergeModulelist,
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

pytestmark = pytest.mark.transformers

GATE, UP, DOWN, NORM = torch.randn(4, 6), torch.randn(4, 6), torch.randn(6, 4), torch.randn(6)
FUSION = {"0.weight": NORM, "1.gate_proj.weight": GATE, "1.up_proj.weight": UP, "1.down_proj.weight": DOWN}
PATHS = ("model.layers.7.post_attention_layernorm", "model.layers.7.mlp")


def rules(*mapping):
    return read_rules(type("FusedLayout", (), {"conversion_mapping": list(mapping)}), ("norm", "mlp"))


def run(originals, paths, *mapping, host=None, **options):
    lazies = {name: LazyTensor.of(TensorSource(name, tensor)) for name, tensor in originals.items()}
    converted = rules(*mapping).run(lazies, paths, paths[0] if host is None else host, **options)
    Program.trace(converted.packed, lazies).check_filled()
    eager = rules(*mapping).run(originals, paths, paths[0] if host is None else host, **options)
    for name, tensor in converted.packed.items():
        assert torch.equal(tensor.materialize(), eager.packed[name])
    return converted


def test_a_renaming():
    for source, target in [
        ("weight", "scale"),
        (r"model.layers.(\d+).input_layernorm.weight", r"model.layers.\1.input_layernorm.scale"),
        (".input_layernorm.weight", ".input_layernorm.scale"),
    ]:
        rule = WeightRenaming(source, target)
        converted = run({"0.weight": NORM}, ["model.layers.3.input_layernorm"], rule)
        assert list(converted.packed) == ["scale"]
        assert not rule._was_used  # the layout's own objects are left alone


def test_a_merge_over_whole_paths_with_groups():
    target = r"model.layers.\1.post_attention_layernorm.gate_up_proj.weight"
    merge = WeightConverter(
        [r"model.layers.(\d+).mlp.gate_proj.weight", r"model.layers.(\d+).mlp.up_proj.weight"],
        target,
        [Concatenate(dim=0)],
    )
    converted = run(FUSION, PATHS, merge)
    assert list(converted.packed) == ["gate_up_proj.weight"]
    assert torch.equal(converted.packed["gate_up_proj.weight"].materialize(), torch.cat([GATE, UP]))
    assert list(converted.untouched) == ["1.down_proj.weight", "0.weight"]
    assert converted.origins == {"gate_up_proj.weight": ("1.gate_proj.weight", "1.up_proj.weight")}


def test_a_merge_over_endings_takes_weight_and_bias():
    originals = {f"0.{part}.{kind}": torch.randn(4) for part in ("gate_proj", "up_proj") for kind in ("weight", "bias")}
    merge = WeightConverter([".mlp.gate_proj", ".mlp.up_proj"], ".mlp.gate_up_proj", [Concatenate(dim=0)])
    converted = run(originals, ["model.layers.7.mlp"], merge)
    assert sorted(converted.packed) == ["gate_up_proj.bias", "gate_up_proj.weight"]


def test_the_order_is_that_of_the_patterns():
    merge = WeightConverter(["up_proj.weight", "gate_proj.weight"], "both", [Concatenate(dim=0)])
    originals = {"0.gate_proj.weight": GATE, "0.up_proj.weight": UP}
    result = run(originals, ["mlp"], merge).packed["both"].materialize()
    assert torch.equal(result, torch.cat([UP, GATE]))


def test_a_target_uses_every_group():
    source = r"layers.(\d+).experts.(\d+).(up|gate)_proj.weight"
    rename = WeightRenaming(source, r"layers.\1.experts.w_\3_\2")
    converted = run({"0.4.up_proj.weight": UP}, ["layers.7.experts"], rename)
    assert list(converted.packed) == ["w_up_4"]


def test_a_group_that_is_not_there():
    with pytest.raises(ConversionError, match=r"uses \\2 in .*has 1 groups"):
        run({"0.weight": NORM}, ["layers.7.norm"], WeightRenaming(r"layers.(\d+).norm.weight", r"layers.\1.norm.\2"))


def test_renamings_chain_and_the_first_converter_wins():
    mapping = [
        WeightConverter("c.weight", "first", [Transpose(0, 1)]),
        WeightRenaming("a.weight", "b.weight"),
        WeightConverter("c.weight", "second", [Transpose(0, 1)]),
        WeightRenaming("b.weight", "c.weight"),
    ]
    converted = run({"0.a.weight": UP}, ["m"], *mapping)
    assert list(converted.packed) == ["first"]
    assert converted.unmatched == (2,)


def test_a_pattern_ends_on_a_name_boundary():
    converted = run({"0.weight": NORM, "0.weight_scale_inv": NORM}, ["m"], WeightRenaming("weight", "scale"))
    assert (list(converted.packed), list(converted.untouched)) == (["scale"], ["0.weight_scale_inv"])


def test_one_to_many_and_lists_of_modules():
    qkv = torch.randn(6, 4)
    split = WeightConverter("qkv.weight", ["q.weight", "k.weight", "v.weight"], [Chunk(dim=0)])
    converted = run({"0.qkv.weight": qkv}, ["attn"], split)
    assert list(converted.packed) == ["q.weight", "k.weight", "v.weight"]
    experts = {f"0.experts.{i}.{p}.weight": torch.randn(2, 3) for i in range(11) for p in ("gate_proj", "up_proj")}
    merge = WeightConverter(
        ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
        "mlp.experts.gate_up_proj",
        [MergeModulelist(dim=0), Concatenate(dim=1)],
    )
    result = run(experts, ["model.layers.0.mlp"], merge).packed["experts.gate_up_proj"].materialize()
    stacks = [torch.stack([experts[f"0.experts.{i}.{p}.weight"] for i in range(11)]) for p in ("gate_proj", "up_proj")]
    assert torch.equal(result, torch.cat(stacks, 1))
    unfuse = WeightConverter(r"layers.(\d+).qkv.weight", [r"layers.\1.q", r"layers.\1.k"], [Chunk(dim=0)])
    assert list(run({"0.qkv.weight": qkv}, ["layers.2"], unfuse).packed) == ["q", "k"]


@pytest.mark.parametrize(("path", "prefix"), [("layers.3.norm", "model"), ("model.layers.3.norm", "model")])
def test_a_base_model_with_and_without_its_prefix(path, prefix):
    added = WeightRenaming(r"^model.layers.(\d+).norm.weight", r"model.layers.\1.norm.scale")
    removed = WeightRenaming(r"^layers.(\d+).norm.weight", r"layers.\1.norm.scale")
    for rule in (added, removed):
        assert list(run({"0.weight": NORM}, [path], rule, prefix=prefix).packed) == ["scale"]


def test_a_bare_parameter_where_a_submodule_was():
    converted = run({"0.q_norm.weight": NORM}, ["model.layers.3.self_attn"], WeightRenaming("q_norm.weight", "q_norm"))
    assert list(converted.packed) == ["q_norm"]


def test_subclasses_rename_their_own_way():
    group = GroupWeightRename(["norm0", "norm1"], ["norm1", "norm2"])
    for _ in range(2):
        converted = run({"0.norm0.weight": NORM, "0.norm1.weight": NORM}, ["m"], group)
        assert list(converted.packed) == ["norm1.weight", "norm2.weight"]
    assert list(run({"0.norm1.weight": NORM}, ["m"], group).untouched) == ["0.norm1.weight"]
    prefix = PrefixChange(prefix_to_add="inner", model_prefix="m")
    assert list(run({"0.norm.weight": NORM}, ["m"], prefix).packed) == ["inner.norm.weight"]


def test_rule_objects_are_read_by_their_attributes():
    rename = SimpleNamespace(source_patterns="weight", target_patterns=["scale"])
    assert list(run({"0.weight": NORM, "0.weight_g": NORM}, ["m"], rename).packed) == ["scale"]


def test_operations_of_a_target_that_needs_the_model():
    model = SimpleNamespace(get_parameter=lambda name: {"m.down.weight": torch.empty(4, 6)}[name])
    rule = WeightConverter("down_proj.weight", "down.weight", [Transpose(0, 1, check_dims=True)])
    result = run({"0.down_proj.weight": DOWN}, ["m"], rule, model=model).packed["down.weight"].materialize()
    assert torch.equal(result, DOWN.t())


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        (None, "no rules"),
        ({"a": "b"}, "write a list of WeightRenaming"),
        ([None], r"conversion_mapping\[0\] is None: the import of Transformers"),
        ([WeightRenaming], "which has no source_patterns"),
        ([object()], "write a WeightRenaming"),
    ],
)
def test_what_cannot_be_read(mapping, text):
    if mapping is None:
        assert text in read_rules(type("L", (), {"conversion_mapping": None})).describe()
        return
    with pytest.raises(ConversionError, match=text):
        read_rules(type("L", (), {"conversion_mapping": mapping}))


def test_a_name_outside_the_host():
    text = r"conversion_mapping\[0\].*makes 'model.layers.7.mlp.inner.weight' of .*write a target that begins with"
    with pytest.raises(ConversionError, match=text):
        run(FUSION, PATHS, WeightRenaming("mlp.gate_proj", "mlp.inner"))


def test_two_ways_to_one_name():
    with pytest.raises(ConversionError, match=r"which is also made of m\.a"):
        run({"0.a": NORM, "0.b": NORM}, ["m"], WeightRenaming("m.a", "m.c"), WeightRenaming("m.b", "m.c"))


def test_an_operation_that_fails_is_named():
    merge = WeightConverter(["a", "b"], "c", [Concatenate(dim=1)])
    with pytest.raises(ConversionError, match=re.escape("(a, b -> c): the operation Concatenate(dim=1) failed")):
        run({"0.a": torch.zeros(2, 2), "0.b": torch.zeros(3, 2)}, ["m"], merge)
