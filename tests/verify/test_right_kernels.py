"""Right kernels pass, however they round and add up; `false_alarms.py` has the figures over many seeds."""

import pytest
import subject
import torch

import kernelgraft
import toys
import zoo

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", range(len(subject.RIGHT)))
def test_they_pass(index, dtype):
    seed = 10 * index + DTYPES.index(dtype)
    report = subject.grafted(subject.RIGHT[index], seed, dtype).verify(
        subject.inputs(seed), every_site=False, seed=seed
    )
    report.raise_for_failures()
    assert report.passed
    assert not report.failures
    assert {check.dtype for check in report.checks if check.kind >= 0} >= {str(dtype).removeprefix("torch."), "float32"}


def test_every_kind_of_packing():
    graft = zoo.graft(zoo.model())
    report = graft.verify(zoo.inputs(), every_site=False)
    report.raise_for_failures()
    assert [kind.kernels for kind in report.kinds] == [
        ("FastGate",),
        ("FastNorm",),
        ("FastMix",),
        ("FastExperts",),
        ("FastWide",),
        ("FastTwist",),
        ("FastLegacy",),
        ("FastStats",),
    ]
    assert all(kind.original_calls == 0 < kind.kernel_calls for kind in report.kinds)


def test_gradients_have_original_names():
    graft = kernelgraft.graft(toys.model(), {toys.FUSION: toys.NormMLP}, example_inputs=toys.inputs())
    report = graft.verify(toys.inputs(), every_site=False, whole_model=False)
    compared = {figure.tensor for figure in report.checks[0].figures}
    names = ("norm.weight", "mlp.w1.weight", "mlp.w2.weight", "mlp.w3.weight")
    assert compared == {"output", "gradient of hidden_states", *(f"gradient of layers.0.{name}" for name in names)}


def test_a_kernel_that_hosts_the_last_member():
    class Last(subject.FusedLayout):
        host = "mlp"

    kernel = kernelgraft.Kernel(subject.RIGHT[0][subject.FUSION].forward_class, Last)
    report = subject.grafted({subject.FUSION: kernel}).verify(subject.inputs())
    report.raise_for_failures()
    assert report.kinds[0].sites == ("blocks.0.mlp", "blocks.1.mlp")
    assert report.kinds[0].tried == report.kinds[0].sites
