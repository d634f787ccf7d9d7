"""Sums over rows, in Triton, interpreted on a CPU."""

import pytest
import torch
from drawn import DTYPES, close, tensor

from kernelgraft.kernels.add_rows import add_rows

pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (128, 32), (129, 33), (300, 64)])
def test_the_sum_of_all_rows(shape, dtype):
    x = tensor(*shape)
    y = add_rows(x, dtype)
    assert (y.dtype, y.shape) == (dtype, shape[1:])
    close(y, x.double().sum(0), dtype, terms=shape[0])
    assert torch.equal(y, add_rows(x, dtype))


def test_a_part_of_more_rows():
    x = tensor(20, 40)
    close(add_rows(x[5:], torch.float32), x[5:].double().sum(0), torch.float32, terms=15)
