"""Plain-data rules."""

import pytest
import torch

from kernelgraft.conversion import LazyTensor, Program, TensorSource, read_rules
from kernelgraft.conversion.operations import OPERATIONS
from kernelgraft.errors import ConversionError


def layout(packing):
    return type("FusedLayout", (torch.nn.Module,), {"packing": packing})


def run(packing, originals, arguments=(), **options):
    lazies = {name: LazyTensor.of(TensorSource(name, tensor)) for name, tensor in originals.items()}
    count = max(len(arguments), 1)
    converted = read_rules(layout(packing), arguments).run(lazies, [f"m{i}" for i in range(count)], "m0", **options)
    Program.trace(converted.packed, lazies).check_filled()
    return converted


def materialized(converted):
    return {name: tensor.materialize() for name, tensor in converted.packed.items()}


GATE, UP, DOWN, NORM = torch.randn(4, 6), torch.randn(4, 6), torch.randn(6, 4), torch.randn(6)
FUSION = {"0.weight": NORM, "1.gate_proj.weight": GATE, "1.up_proj.weight": UP, "1.down_proj.weight": DOWN}


def test_the_forms_of_the_design():
    packing = {
        "scale": "norm.weight",
        "gate_up_proj.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        "gate_up_proj.bias": ["mlp.gate_proj.bias", "mlp.up_proj.bias"],
        "down_proj.weight": {"sources": "mlp.down_proj.weight", "operations": [["transpose", 0, 1]]},
    }
    converted = run(packing, FUSION, ("norm", "mlp"))
    results = materialized(converted)
    assert list(results) == ["scale", "gate_up_proj.weight", "down_proj.weight"]
    assert torch.equal(results["scale"], NORM)
    assert torch.equal(results["gate_up_proj.weight"], torch.cat([GATE, UP]))
    assert torch.equal(results["down_proj.weight"], DOWN.t())
    assert converted.origins["gate_up_proj.weight"] == ("1.gate_proj.weight", "1.up_proj.weight")
    assert (converted.untouched, converted.unmatched) == ({}, (2,))


def test_a_single_module_uses_its_own_names_and_keeps_what_no_rule_names():
    converted = run({"scale": "weight"}, {"0.weight": NORM, "0.bias": NORM})
    assert list(converted.packed) == ["scale"]
    assert list(converted.untouched) == ["0.bias"]


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        ([["concatenate", 1]], lambda a, b: torch.cat([a, b], 1)),
        ([["concatenate"]], lambda a, b: torch.cat([a, b])),
        ([["stack", 0]], lambda a, b: torch.stack([a, b])),
        ([["stack", -1]], lambda a, b: torch.stack([a, b], -1)),
        ([["interleave", 0]], lambda a, b: torch.stack([a, b], 1).flatten(0, 1)),
        ([["interleave", -1]], lambda a, b: torch.stack([a, b], 2).flatten(1, 2)),
        ([["transpose", 0, 1], ["concatenate", 1]], lambda a, b: torch.cat([a.t(), b.t()], 1)),
        ([["stack", 0], ["permute", [2, 0, 1]]], lambda a, b: torch.stack([a, b]).permute(2, 0, 1)),
        ([["concatenate", 0], ["reshape", [2, -1]]], lambda a, b: torch.cat([a, b]).reshape(2, -1)),
        ([["chunk", 1, 2, 0], ["concatenate", 0]], lambda a, b: torch.cat([a[2:], b[2:]])),
        ([["slice", 1, 0, 2], ["stack", 0]], lambda a, b: torch.stack([a[:, :2], b[:, :2]])),
        ([["unsqueeze", 0], ["concatenate", 0]], lambda a, b: torch.stack([a, b])),
        ([["unsqueeze", 0], ["squeeze", 0], ["stack", 0]], lambda a, b: torch.stack([a, b])),
        ([["concatenate", 0], ["cast", "bfloat16"]], lambda a, b: torch.cat([a, b]).bfloat16()),
    ],
)
def test_operations(operations, expected):
    packing = {"p": {"sources": ["gate_proj.weight", "up_proj.weight"], "operations": operations}}
    originals = {"0.gate_proj.weight": GATE, "0.up_proj.weight": UP}
    lazy = materialized(run(packing, originals))["p"]
    eager = read_rules(layout(packing)).run(originals, ["m"], "m").packed["p"]
    assert lazy.dtype == eager.dtype
    assert torch.equal(lazy, eager)
    assert torch.equal(eager, expected(GATE, UP))


def test_every_operation_has_an_example_that_can_be_read():
    for operation in OPERATIONS.values():
        assert operation.example.startswith("[")


def test_experts_in_numeric_order_merged_inside_out():
    experts = {f"0.experts.{i}.{part}.weight": torch.randn(2, 3) for i in range(11) for part in ("gate", "up")}
    gates = [experts[f"0.experts.{i}.gate.weight"] for i in range(11)]
    ups = [experts[f"0.experts.{i}.up.weight"] for i in range(11)]
    packing = {
        "gate_up": {
            "sources": ["experts.*.gate.weight", "experts.*.up.weight"],
            "operations": [["stack", 0], ["concatenate", 1]],
        },
    }
    result = materialized(run(packing, experts))["gate_up"]
    assert torch.equal(result, torch.cat([torch.stack(gates), torch.stack(ups)], 1))
    flat = materialized(run({"g": "experts.*.gate.weight", "u": ["experts.*.up.weight"]}, experts))
    assert torch.equal(flat["g"], torch.cat(gates))
    both = materialized(run({"b": ["experts.*.gate.weight", "experts.*.up.weight"]}, experts))
    assert torch.equal(both["b"], torch.cat([*gates, *ups]))


@pytest.mark.parametrize(
    ("packing", "text"),
    [
        ([("scale", "weight")], "write a dict"),
        ({"scale": 3}, "is 3; write"),
        ({"scale": []}, "write the packed name"),
        ({"s.*": "weight"}, "only the original names"),
        ({"scale": {"source": "weight"}}, "it takes 'sources' and 'operations'"),
        ({"scale": {"sources": "weight", "operations": "transpose"}}, "write a list of lists"),
        ({"scale": {"sources": "weight", "operations": ["transpose"]}}, "write a list such as"),
        ({"scale": {"sources": "weight", "operations": [["rotate", 1]]}}, "the known ones are concatenate, stack"),
        ({"scale": {"sources": "weight", "operations": [["transpose", 0]]}}, r"takes dim0 \(int\), dim1 \(int\)"),
        ({"scale": {"sources": "weight", "operations": [["permute", 1]]}}, r"takes dims \(list\)"),
        ({"scale": {"sources": "weight", "operations": [["stack", True]]}}, r"takes dim \(int\)"),
    ],
)
def test_what_cannot_be_read(packing, text):
    with pytest.raises(ConversionError, match=text):
        read_rules(layout(packing))


def test_a_member_that_the_layout_does_not_take():
    with pytest.raises(ConversionError, match=r"names 'nrom.weight', and the layout's __init__ takes norm, mlp"):
        read_rules(layout({"scale": "nrom.weight"}), ("norm", "mlp"))


@pytest.mark.parametrize(
    ("packing", "options", "text"),
    [
        ({"p": ["gate_proj.weight", "up_prj.weight"]}, {}, "asks for up_prj.weight.*did you mean up_proj.weight"),
        ({"p": "up_prj.weight"}, {"packed_names": ["p"]}, "did you mean up_proj.weight"),
        ({"p": {"sources": "up_proj.weight", "operations": [["squeeze", 0]]}}, {}, "only one of size 1 can be"),
        ({"p": {"sources": "up_proj.weight", "operations": [["chunk", 0, 3]]}}, {}, "no chunk 0 of 3 equal ones"),
        ({"p": {"sources": "up_proj.weight", "operations": [["slice", 0, 2, 9]]}}, {}, "has no slice 2:9"),
        (
            {"p": {"sources": "up_proj.weight", "operations": [["reshape", [5, 5]]]}},
            {},
            r"cannot be done on .*\[4, 6\]",
        ),
        ({"p": {"sources": "up_proj.weight", "operations": [["transpose", 0, 2]]}}, {}, "Dimension out of range"),
        ({"p": {"sources": "up_proj.weight", "operations": [["cast", "float31"]]}}, {}, "no dtype 'float31'"),
        (
            {"p": {"sources": ["gate_proj.weight", "up_proj.weight"], "operations": [["transpose", 0, 1]]}},
            {},
            "leaves 2 tensors",
        ),
    ],
)
def test_what_does_not_fit_the_site(packing, options, text):
    with pytest.raises(ConversionError, match=text):
        run(packing, {"0.gate_proj.weight": GATE, "0.up_proj.weight": UP}, **options)


def test_no_rules_leave_everything_untouched():
    rules = read_rules(torch.nn.Module)
    assert list(rules.run({"0.weight": NORM}, ["norm"], "norm").untouched) == ["0.weight"]
    assert "no rules" in rules.describe()


def test_packing_wins_over_rule_objects():
    both = type("BothLayout", (), {"packing": {"scale": "weight"}, "conversion_mapping": [None]})
    assert read_rules(both).describe() == "BothLayout.packing: scale <- weight"
