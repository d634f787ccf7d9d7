"""What counts as close: the quotient of two errors, row by row."""

import pytest
import torch

from kernelgraft.verify._tolerance import distance, limit

ROWS, COUNT = 64, 576
DTYPE, LENGTH = torch.bfloat16, 576


@pytest.fixture
def truth():
    return torch.randn(ROWS, COUNT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def noisy(truth, times=1.0, seed=1):
    """The truth, off by as much as `times` roundings to bfloat16."""
    noise = torch.rand(truth.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    return truth * (1 + times * noise * torch.finfo(torch.bfloat16).eps)


def measured(kernel, truth, original=None, **kwargs):
    return distance(kernel, [noisy(truth) if original is None else original], truth, DTYPE, LENGTH, **kwargs)


def test_another_order_of_roundings_is_close(truth):
    assert measured(noisy(truth, seed=2), truth).is_close
    assert measured(noisy(truth, 2.5, seed=2), truth).is_close
    assert measured(truth, truth).is_close
    assert measured(truth.bfloat16(), truth, original=truth).is_close  # the original happens to be exact


def test_eight_times_the_noise_is_not(truth):
    found = measured(noisy(truth, 8, seed=2), truth)
    assert not found.is_close
    assert found.largest > found.limit
    assert found.median > found.median_limit


def test_one_row_that_is_off_is_found_beside_a_row_of_large_numbers(truth):
    truth[0] *= 1000
    kernel = noisy(truth, seed=2)
    kernel[7] *= 1.03
    found = measured(kernel, truth)
    assert not found.is_close
    assert found.row == (7,)
    assert found.median <= found.median_limit


def test_one_element_that_is_off_is_found(truth):
    kernel = noisy(truth, seed=2)
    kernel[5, 3] += 0.2
    assert measured(kernel, truth).row == (5,)
    assert not measured(kernel, truth).is_close


def test_the_place_has_the_tensors_own_dims(truth):
    kernel = noisy(truth, seed=2)
    kernel[13] = 0
    found = measured(kernel.view(4, 16, COUNT), truth.view(4, 16, COUNT), noisy(truth).view(4, 16, COUNT))
    assert found.row == (0, 13)
    assert measured(torch.zeros(()), torch.ones(()), torch.ones(())).row == ()


def test_noise_of_the_original_excuses_the_kernel(truth):
    """A row in which the original is far off for a neighbouring input, as where a router chooses between equals."""
    kernel, original = noisy(truth, seed=2), noisy(truth)
    kernel[3] = -kernel[3]
    neighbour = noisy(truth, seed=3)
    neighbour[3] = -neighbour[3]
    assert not distance(kernel, [original], truth, DTYPE, LENGTH).is_close
    assert distance(kernel, [original, neighbour], truth, DTYPE, LENGTH).is_close


def test_what_the_truth_does_not_know_is_not_judged(truth):
    truth[2, 5] = torch.nan
    assert measured(noisy(truth.nan_to_num(), seed=2), truth).is_close


def test_an_original_that_overflows_excuses_nothing_elsewhere(truth):
    original = noisy(truth)
    original[1] = torch.inf
    kernel = noisy(truth, seed=2)
    assert measured(kernel, truth, original).is_close
    kernel[2] *= 1.05
    assert not measured(kernel, truth, original).is_close


def test_noise_about_nothing_is_judged_by_what_is_computed_along_with_it(truth):
    """As the gradient of a query where there is one key: zero, and noise where it is not computed as zero."""
    nothing = torch.zeros_like(truth)
    noise = noisy(truth, seed=2) - noisy(truth)
    assert not measured(noise, nothing, nothing).is_close
    assert measured(noise, nothing, nothing, around=1.0).is_close
    assert not measured(20 * noise, nothing, nothing, around=1.0).is_close
    assert not measured(noise + 0.1 * truth, 0.1 * truth, 0.1 * truth, around=1.0).is_close


def test_few_draws_are_given_more_room():
    assert limit(576) < 3.7
    assert limit(8) < 8.4
    assert limit(1) == 18
    assert limit(10**9) == pytest.approx(3, rel=1e-3)
