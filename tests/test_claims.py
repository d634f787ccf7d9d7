"""Who gets a module that several entries ask for, and what the others are told."""

import pytest
import torch

import toys
from kernelgraft import Kernel, KernelConfig
from kernelgraft.choosing import Chooser
from kernelgraft.claims import Claims
from kernelgraft.errors import PlanError

STATELESS = toys.kernel(lambda self, hidden_states: hidden_states)
FUSED = {toys.FUSION: Kernel(toys.NormMLP)}


def collected(asked, inherited=None):
    """The places that each entry gets, and what was noted of those that it does not."""
    rejected, modules = [], dict(toys.model().named_modules())
    entries = [(entry, False) for entry in KernelConfig(asked).entries]
    entries += [(entry, True) for entry in KernelConfig(inherited or {}).entries]
    wanted = Claims(modules, "", entries, Chooser("error", "cpu", rejected), torch.device("cpu")).collect()
    places = {}
    for want in wanted:
        places.setdefault(want.entry.label.partition(" at ")[0], []).append(" ".join(want.claim.paths))
    return places, [(each.target, each.place, each.reason) for each in rejected]


def test_a_class_name_applies_to_what_fusions_leave():
    places, rejected = collected(FUSED | {"Norm": Kernel(toys.FastNorm)})
    assert places == {
        "Norm + MLP": ["layers.0.norm layers.0.mlp", "layers.1.norm layers.1.mlp"],
        "Norm": ["norm"],
    }
    assert rejected == []
    assert collected(FUSED | {"MLP": STATELESS})[1] == [
        ("MLP", "", "entries with paths have taken all of its modules over")
    ]


def test_a_module_that_is_named_by_its_path():
    places, rejected = collected({("Norm", "layers.*.norm"): Kernel(toys.FastNorm), "Norm": STATELESS})
    assert places == {"Norm": ["layers.0.norm", "layers.1.norm", "norm"]}
    assert rejected == []
    assert collected({("Linear", "layers.0.mlp.w2"): STATELESS})[0] == {"Linear": ["layers.0.mlp.w2"]}
    assert collected({("Norm", "norm"): "", "Norm": STATELESS})[1] == []
    # A stateless kernel leaves what is inside; a layout takes it.
    assert collected({("Block", "layers.0"): STATELESS, "Linear": STATELESS})[1] == []


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (("Norm", "layers.*.nrm"), r"The key \('Norm', 'layers\.\*\.nrm'\) matches no module"),
        (("Norm", "layers.*.mlp"), "names the path but not the class"),
    ],
)
def test_a_path_at_which_there_is_no_such_module(key, said):
    with pytest.raises(PlanError, match=said):
        collected({key: STATELESS})


def test_what_lies_inside_a_module_that_is_taken_over_is_noted():
    places, rejected = collected(FUSED | {"Linear": STATELESS})
    assert list(places) == ["Norm + MLP"]
    assert [place for _, place, _ in rejected] == [f"layers.{i}.mlp.w{k}" for i in range(2) for k in (1, 2, 3)]
    assert {reason for _, _, reason in rejected} == {
        "it lies inside what the kernel for Norm + MLP at layers.*.{norm, mlp} takes over"
    }


def test_a_stateless_kernel_leaves_what_is_inside():
    places, rejected = collected({"Block": STATELESS, "Norm": Kernel(toys.FastNorm)})
    assert places == {"Block": ["layers.0", "layers.1"], "Norm": ["layers.0.norm", "layers.1.norm", "norm"]}
    assert rejected == []


def test_a_default_table_gets_nothing_at_inside_or_around_what_was_asked_for():
    places, rejected = collected({"Norm": STATELESS, "Linear": STATELESS}, {"Module": STATELESS})
    assert "Module" not in places
    near = {place: reason.removeprefix("another kernel was asked for at ") for _, place, reason in rejected}
    assert near["norm"] == "norm"  # the module itself
    assert near["layers.0.mlp"] == "layers.0.mlp.w1"  # one inside it
    assert near["layers"] == "layers.0.norm"


def test_of_a_default_tables_own_the_first_gets_it():
    places, rejected = collected({}, {"Block": STATELESS, "Norm": STATELESS})
    assert places == {"Block": ["layers.0", "layers.1"], "Norm": ["norm"]}
    assert [(place, reason) for _, place, reason in rejected] == [
        (f"layers.{i}.norm", f"another kernel was asked for at layers.{i}") for i in range(2)
    ]


def test_two_that_the_user_wrote_for_one_module():
    with pytest.raises(PlanError, match=r"'layers\.0\.norm' is asked for twice"):
        collected({"Norm": STATELESS, "Module": STATELESS})


def test_a_name_that_nothing_answers_to():
    with pytest.raises(PlanError, match="'Nrm' matches no module"):
        collected({"Nrm": STATELESS})
