"""Fresh memory for tensors that are filled once."""

import copy
import io

import pytest
import torch

from kernelgraft.checkpoint.memory import fresh

CPU = torch.device("cpu")
HUGE = 2 << 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.uint8, torch.bool])
def test_large_tensors_begin_with_a_huge_page_and_hold_no_more_than_themselves(dtype):
    tensor = fresh((3, HUGE + 5), dtype, CPU)
    assert (tensor.shape, tensor.dtype, tensor.stride()) == ((3, HUGE + 5), dtype, (HUGE + 5, 1))
    assert tensor.data_ptr() % HUGE == 0
    assert tensor.storage_offset() == 0
    assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("shape", [(), (0,), (5, 0, 7), (17, 3)])
def test_small_and_empty_tensors(shape):
    tensor = fresh(shape, torch.float32, CPU)
    assert tensor.shape == shape
    assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_they_are_copied_and_saved_like_any_other():
    tensor = fresh((2, HUGE), torch.float16, CPU).fill_(3)
    copied = copy.deepcopy(tensor)
    file = io.BytesIO()
    torch.save(tensor, file)
    assert len(file.getvalue()) < tensor.nbytes + 10_000
    file.seek(0)
    assert torch.equal(torch.load(file), tensor)
    tensor.zero_()
    assert copied.eq(3).all()


def test_memory_stays_while_a_tensor_does():
    part = fresh((2, HUGE), torch.uint8, CPU).fill_(7)[1]
    others = [fresh((2, HUGE), torch.uint8, CPU).fill_(1) for _ in range(4)]
    assert part.eq(7).all()
    del others
