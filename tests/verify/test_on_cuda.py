"""What only a GPU shows: right kernels pass there, and faults of memory are caught. Skipped on machines without one."""

import gc

import plants
import pytest
import subject
import torch

import kernelgraft
import tiny
from kernelgraft import KernelConfig

pytestmark = [
    pytest.mark.transformers,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grafted(kernels, dtype=torch.float32):
    return kernelgraft.graft(subject.model(dtype=dtype).cuda(), kernels, example_inputs=subject.inputs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", range(len(subject.RIGHT)))
def test_right_kernels_pass(index, dtype):
    report = grafted(subject.RIGHT[index], dtype).verify(subject.inputs())
    report.raise_for_failures()
    assert report.device.startswith("cuda (")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_guides_kernels_pass(dtype):
    model = tiny.model("qwen3").to("cuda", dtype)
    report = kernelgraft.graft(model, tiny.guide_config()).verify()
    report.raise_for_failures()


@pytest.mark.parametrize("name", plants.FAULTS)
def test_planted_faults_are_caught(name):
    target, kernel = plants.FAULTS[name]
    dtype = plants.DTYPES.get(name, torch.float32)
    report = grafted({target: kernel}, dtype).verify(subject.inputs(), every_site=False, whole_model=False)
    assert not report.passed
    assert {failure.site for failure in report.failures} <= subject.SITES[target]


def test_random_states_of_the_device_are_as_they_were():
    graft = grafted(subject.RIGHT[2])
    torch.cuda.manual_seed(3)
    expected = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(3)
    graft.verify(subject.inputs())
    assert torch.equal(torch.rand(4, device="cuda"), expected)


def memory_beyond_the_model(layers):
    """What a verification takes at its peak, in bytes, once matrix products have their workspace."""
    with kernelgraft.recorded():
        made = torch.nn.Sequential(*(subject.Square(1024) for _ in range(layers))).cuda().bfloat16().eval()
    inputs = torch.randn(2, 8, 1024)
    graft = kernelgraft.graft(made, KernelConfig({"Square": subject.RIGHT[1]["Square"]}), example_inputs=inputs)
    graft.verify(inputs)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    graft.verify(inputs).raise_for_failures()
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    return torch.cuda.max_memory_allocated() - before


def test_memory_is_bounded_by_one_site():
    """It holds copies of one layer's weights at a time, so a deeper model takes no more."""
    one_layer = 1024 * 1024 * 2
    assert memory_beyond_the_model(32) <= memory_beyond_the_model(4) + 2 * one_layer
