"""The report: plain data, JSON there and back, and a page."""

import dataclasses
import json

import plants
import pytest
import subject

from kernelgraft.errors import KernelGraftError, VerificationError
from kernelgraft.verify import Report
from kernelgraft.verify.report import Figure


@pytest.fixture(scope="module")
def good():
    return subject.grafted(subject.RIGHT[2]).verify(subject.inputs())


@pytest.fixture(scope="module")
def bad():
    kernels = {"Square": plants.FAULTS["transposed_square_weight"][1], "Add": subject.RIGHT[2]["Add"]}
    return subject.grafted(kernels).verify(subject.inputs(), every_site=False)


def test_there_and_back(good, bad):
    for report in (good, bad):
        text = json.dumps(report.to_json(), allow_nan=False)
        assert Report.from_json(json.loads(text)) == report
        assert json.loads(text)["passed"] == report.passed
        assert len(json.loads(text)["failures"]) == len(report.failures)


def test_numbers_that_are_not_finite_go_there_and_back(bad):
    figure = Figure("output", float("inf"), 3.6, float("inf"), 3.2, float("nan"), 0.0, (1, 2))
    assert not figure.passed
    check = dataclasses.replace(bad.checks[0], figures=(figure,))
    report = dataclasses.replace(bad, checks=(check,))
    again = Report.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False)))
    assert again.checks[0].figures[0].largest == float("inf")
    assert again.checks[0].figures[0].row == (1, 2)
    assert str(again.checks[0].figures[0]) == str(figure)


def test_the_page_of_a_pass(good):
    page = str(good)
    assert page.splitlines()[0].startswith("Verification of Model on cpu: passed, ")
    assert "NormByHand for Norm, 3 sites" in page
    assert "blocks.{0..1}.norm, norm" in page
    assert "originals 0 times in their place" in page
    assert "gradients  checked" in page
    assert "activations of the model, float32" in page
    assert "The whole model" in page
    assert "Failures" not in page


def test_the_page_of_a_failure(bad):
    page = str(bad)
    assert page.splitlines()[0].startswith("Verification of Model on cpu: FAILED, ")
    assert "WRONG" in page
    assert f"Failures: {len(bad.failures)}" in page
    assert "TransposedSquareWeight at square, activations of the model, float32 (x float32[3, 7, 48])" in page
    assert "AddRoundedOnce at" not in page


def test_failures_name_site_input_and_figures(bad):
    failure = bad.failures[0]
    assert (failure.kernel, failure.site, failure.input) == ("TransposedSquareWeight", "square", "x float32[3, 7, 48]")
    assert failure.case == "activations of the model, float32"
    assert "output: the kernel's error is " in failure.fault
    assert " times the original's in row [" in failure.fault
    assert "the original by " in failure.fault


def test_raising(good, bad):
    assert good.raise_for_failures() is None
    with pytest.raises(VerificationError, match=r"does not answer as it does without:\n.*at square") as caught:
        bad.raise_for_failures()
    assert caught.value.report is bad
    assert isinstance(caught.value, KernelGraftError)
    assert f"and {len(bad.failures) - 5} more" in str(caught.value)
