"""A router that a rounding makes choose otherwise is no fault of the kernel that rounded; a wrong kernel is one."""

import pytest
import torch

import kernelgraft
import test_models
import tiny
from kernelgraft import KernelConfig
from kernelgraft.verify._choices import MOST, Choices

pytestmark = pytest.mark.transformers


def experts(kernel):
    """Seed 1108 of `false_alarms.py`, in which the kernel sends one token to another expert."""
    model = tiny.model("mixtral", 1108).bfloat16()
    return kernelgraft.graft(model, KernelConfig({"Experts": kernel}, inherit_mapping=False))


def of_whole_model(report):
    (check,) = [check for check in report.checks if check.kind < 0 and check.case == "outputs"]
    return check


def test_a_choice_that_is_nearly_even_is_no_fault():
    report = experts(test_models.use("experts.py:TransposedExperts")).verify(every_site=False, seed=1108)
    report.raise_for_failures()
    assert "1 of 96 choice was another," in of_whole_model(report).note


def test_a_wrong_kernel_fails_with_the_originals_choices_too(tmp_path):
    code = (test_models.REPOSITORIES / "experts.py").read_text()
    right = "return (self.act_fn(gate) * up) @ self.w2[index]"
    assert right in code
    (tmp_path / "experts.py").write_text(code.replace(right, f"{right} * 1.5"))
    report = experts(f"{tmp_path}/experts.py:TransposedExperts").verify(every_site=False, seed=1108)
    assert of_whole_model(report).faults


class Router(torch.nn.Module):
    def forward(self, x):
        return x, x.argsort(-1)[..., :2]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.router = Router()

    def forward(self, x):
        return self.router(x)


def test_rows_in_which_another_choice_was_made_are_taken_from_the_originals():
    model, x = Model(), torch.randn(40, 8)
    choices = Choices(model, [])
    with choices.recorded():
        values, chosen = model(x)
    other = x.clone()
    other[3] = -x[3]
    other[5] += 1  # changes no choice
    with choices.forced():
        forced_values, forced = model(other)
    assert torch.equal(forced, chosen)
    assert torch.equal(forced_values[3], values[3])
    assert torch.equal(forced_values[5], other[5])
    assert (choices.changed, choices.total, choices.are_few) == (1, 40, True)
    with choices.forced():
        model(-x)
    assert choices.changed > MOST * choices.total
    assert not choices.are_few


def test_what_a_kernel_chooses_itself_is_its_own():
    model = Model()
    choices = Choices(model, ["router"])
    with choices.recorded():
        model(torch.randn(4, 8))
    with choices.forced():
        model(torch.randn(4, 8))
    assert choices.total == 0
