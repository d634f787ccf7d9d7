"""Planted faults: each is caught, at the site where it is and nowhere else."""

import plants
import pytest
import subject
import torch

WORDS = {
    "last_row_unwritten": "values are not finite",
    "returns_nan_for_one_value": "1 of 1008 values are not finite",
    "returns_its_input": "output shares memory with x",
    "changes_its_input": "writes into x (told by its values)",
    "writes_the_same_into_its_input": "writes into x (told by its version counter)",
    "changes_its_input_through_data": "writes into x (told by its values)",
    "in_place_on_a_view": "writes into x (told by its values)",
    "changes_its_weight": "has written into its weights",
    "one_buffer_for_all_outputs": "output of one call changes when the kernel is called again",
    "second_call_doubled": "without gradients: output: the kernel's error is",
    "weight_of_the_first_call": "after the weights changed",
    "dtype_of_the_residual_dropped": "and the original's float32",
    "raises_without_tokens": "the kernel raises ValueError: empty grid",
    "reads_memory_as_if_contiguous": "every other element",
    "rows_past_128": "a batch of 131 tokens",
    "last_row_of_a_full_tile": "128 tokens",
    "one_batch_only": "one token in a batch",
    "keys_in_blocks_of_128": "a batch of 131 tokens",
    "wrong_epsilon_in_a_fusion": "small numbers",
    "epsilon_after_the_root": "tiny numbers",
    "small_numbers_flushed": "tiny numbers",
    "large_numbers_cut": "large numbers",
    "gelu_cut_off": "numbers of all sizes",
    "calls_the_original": "calls the forward of the original that it replaces",
    "no_gradient_at_all": "gives outputs without a gradient",
    "no_gradient_of_the_weight": "there is no gradient of blocks.0.norm.weight",
    "gradient_accumulated": "a second time: gradient of blocks.0.norm.weight",
    "upstream_read_as_if_contiguous": "with an upstream gradient that is not contiguous",
    "wrong_with_frozen_weights": "with frozen weights",
    "another_forward_without_gradients": "without gradients: output",
    "straight_through": "gradient of x",
}
"""What one of the failures says, for the faults that show in one way only."""

OF_THE_ISSUE = (
    "wrong_epsilon",
    "gate_and_up_swapped",
    "transposed_square_weight",
    "weight_with_an_offset",
    "accumulated_in_float16",
    "last_row_unwritten",
    "no_gradient_of_the_weight",
    "right_for_even_lengths",
    "returns_its_input",
    "changes_its_input",
)


def verified(name, dtype):
    target, kernel = plants.FAULTS[name]
    graft = subject.grafted({target: kernel}, dtype=dtype)
    return target, graft.verify(subject.inputs(), every_site=False, whole_model=False)


@pytest.mark.parametrize("name", plants.FAULTS)
def test_each_is_caught_at_its_site(name):
    target, report = verified(name, plants.DTYPES.get(name, torch.float32))
    assert not report.passed
    assert {failure.site for failure in report.failures} <= subject.SITES[target]
    assert any(WORDS.get(name, "") in str(failure) for failure in report.failures)


@pytest.mark.parametrize("name", OF_THE_ISSUE)
def test_those_of_models_in_bfloat16(name):
    target, report = verified(name, torch.bfloat16)
    assert not report.passed
    assert {failure.site for failure in report.failures} <= subject.SITES[target]


def test_what_is_right_beside_a_fault_is_not_blamed():
    kernels = {**subject.RIGHT[1], "Square": plants.FAULTS["transposed_square_weight"][1]}
    report = subject.grafted(kernels).verify(subject.inputs(), whole_model=False)
    assert {failure.site for failure in report.failures} == {"square"}
    assert {failure.kernel for failure in report.failures} == {"TransposedSquareWeight"}


def test_one_site_that_differs_is_named():
    """One kernel for two norms; right for the epsilon of the first."""
    made = subject.model()
    made.blocks[1].norm.eps = 1e-3
    kernel = subject.kernel(plants.of_fixed_epsilon)
    graft = subject.kernelgraft.graft(made, {"Norm": kernel}, example_inputs=subject.inputs())
    report = graft.verify(subject.inputs(), whole_model=False)
    assert {failure.site for failure in report.failures} == {"blocks.1.norm"}


def test_a_fault_shows_in_the_whole_model():
    target, kernel = plants.FAULTS["gate_and_up_swapped"]
    report = subject.grafted({target: kernel}).verify(subject.inputs(), every_site=False)
    whole = [failure for failure in report.failures if failure.site == "the whole model"]
    assert ["the kernel's error is" in failure.fault for failure in whole] == [True]
