"""What is tried, what is left out and said to be, and what else a verification measures."""

import cProfile

import plants
import pytest
import subject
import torch
from subject import H, kernel, rms_norm
from torch import nn
from torch.nn import functional as F

import kernelgraft
import zoo
from kernelgraft import Kernel
from kernelgraft.errors import GraftError, VerificationError


def norm(self, x):
    return rms_norm(x, self.weight, self.eps).to(x.dtype)


def verified(kernels, dtype=torch.float32, **options):
    return subject.grafted(kernels, dtype=dtype).verify(subject.inputs(), **{"whole_model": False, **options})


def cases(report, dtype=None):
    return {check.case for check in report.checks if not check.skipped and dtype in (None, check.dtype)}


def test_what_is_tried_of_a_kernel_of_rows():
    report = verified({"Norm": kernel(norm)}, torch.bfloat16, every_site=False)
    assert cases(report, "bfloat16") == {
        "activations of the model",
        "one token",
        "one token in a batch",
        "37 tokens",
        "128 tokens",
        "a batch of 131 tokens",
        "no tokens",
        "every other element",
        "not contiguous",
        "small numbers",
        "tiny numbers",
        "large numbers",
        "numbers of all sizes",
        "after the weights changed",
    }
    assert cases(report, "float32") == {
        "activations of the model",
        "a batch of 131 tokens",
        "small numbers",
        "tiny numbers",
        "large numbers",
        "numbers of all sizes",
    }
    assert {check.mode for check in report.checks} == {"eval", "train"}


def test_every_site_or_one_of_each_kind():
    assert verified({"Norm": kernel(norm)}).kinds[0].tried == ("blocks.0.norm", "blocks.1.norm", "norm")
    assert verified({"Norm": kernel(norm)}, every_site=False).kinds[0].tried == ("blocks.0.norm",)


# --- modes and gradients


def test_a_kernel_without_a_backward():
    report = verified({"Norm": kernel(norm, has_backward=False)})
    assert report.passed
    assert report.kinds[0].gradients == "not checked: Norm says has_backward = False"
    assert not [f for check in report.checks for f in check.figures if f.tensor.startswith("gradient")]


def test_gradients_that_are_not_asked_for():
    report = verified({"Norm": kernel(norm)}, gradients=False)
    assert report.kinds[0].gradients == "not asked for"
    assert not [f for check in report.checks for f in check.figures if f.tensor.startswith("gradient")]


def by_mode(**kernels):
    made = subject.model()
    config = kernelgraft.KernelConfig({"Norm": {"cpu": kernels}})
    graft = kernelgraft.graft(made, config, example_inputs=subject.inputs())
    return graft.verify(subject.inputs(), whole_model=False, every_site=False)


def test_a_kernel_for_training_is_tried_beside_the_one_for_inference():
    wrong = plants.FAULTS["gradient_of_the_weight_is_zero"][1]
    report = by_mode(inference=kernel(norm), training=wrong)
    assert {check.mode for check in report.checks if check.faults} == {"train"}
    assert by_mode(inference=wrong, training=kernel(norm)).passed  # nobody asks it for gradients
    alone = by_mode(inference=wrong)
    assert alone.passed
    assert alone.kinds[0].gradients == "not checked: the kernel runs in inference alone"
    broken = plants.FAULTS["weight_with_an_offset"][1]
    assert {check.mode for check in by_mode(inference=broken, training=kernel(norm)).checks if check.faults} == {"eval"}


def test_one_that_runs_in_training_alone():
    report = by_mode(training=kernel(norm), inference="")
    assert report.passed
    assert {check.mode for check in report.checks} == {"train"}


class Dropped(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, dim) / dim**0.5)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(F.linear(x, self.weight))


class FastDropped(nn.Module):
    def forward(self, x):
        return F.dropout(x @ self.weight.t(), self.dropout.p, self.training)


def small(*modules):
    with kernelgraft.recorded():
        return nn.Sequential(*(make() for make in modules)).eval()


def test_dropout_is_left_out_in_training():
    made = small(lambda: Dropped(H))
    graft = kernelgraft.graft(made, {"Dropped": FastDropped}, example_inputs=subject.inputs())
    report = graft.verify(subject.inputs())
    report.raise_for_failures()
    assert report.kinds[0].notes == ("dropout is 0 in what is tried in training",)
    assert made[0].dropout.p == 0.5


class Noisy(Dropped):
    def forward(self, x):
        return F.dropout(F.linear(x, self.weight), 0.5, self.training)


def test_an_original_that_draws_random_numbers_is_not_compared_in_training():
    made = small(lambda: Noisy(H))
    graft = kernelgraft.graft(made, {"Noisy": FastDropped}, example_inputs=subject.inputs())
    report = graft.verify(subject.inputs())
    assert report.passed
    (skipped,) = (check for check in report.checks if check.skipped)
    assert (skipped.mode, skipped.skipped) == ("train", "the original draws random numbers in training")
    assert "not tried: activations of the model, in training, float32" in str(report)


def test_statistics_that_a_kernel_does_not_keep():
    def frozen(self, x):
        return F.batch_norm(x, self.mean, self.var, *self.affine.unbind(), training=self.training, momentum=0.0)

    made = zoo.model()
    graft = kernelgraft.graft(made, {"Stats": Kernel(kernel(frozen).forward_class, zoo.FastStatsLayout)})
    report = graft.verify(zoo.inputs())
    assert {check.mode for check in report.checks if check.faults} == {"train"}
    assert "stats.batch.running_mean: the kernel's error is" in str(report)
    assert [check.skipped for check in report.checks if check.kind < 0] == ["Frozen writes into weights or buffers"]


# --- what a kernel takes


def test_what_supports_refuses_is_skipped_and_said():
    def supports(x):
        return x.shape[1] == 7 or f"{x.shape[1]} tokens are not 7"

    report = verified({"Norm": kernel(norm, supports=staticmethod(supports))}, every_site=False)
    assert report.passed
    assert "after the weights changed" in cases(report)
    assert "one token" not in cases(report)
    assert (
        "not tried: one token, float32, one token in a batch, float32: At 'blocks.0.norm': Norm refuses the call: 1"
        in (str(report))
    )


def test_a_dtype_that_supports_refuses_and_those_that_it_claims():
    def supports(x):
        return x.dtype != torch.float32

    report = verified({"Norm": kernel(norm, supports=staticmethod(supports))}, torch.bfloat16, every_site=False)
    assert report.passed
    assert cases(report, "float32") == set()
    assert "activations of the model" in cases(report, "float16")


def test_a_kernel_that_raises_in_float32_is_asked_to_say_so():
    def narrow(self, x):
        if x.dtype == torch.float32:
            raise TypeError("expected bfloat16")
        return norm(self, x)

    report = verified({"Norm": kernel(narrow)}, torch.bfloat16, every_site=False)
    assert {failure.fault for failure in report.failures} == {
        "the kernel raises TypeError: expected bfloat16; if it takes no float32, let its supports() say so"
    }
    assert verified({"Norm": kernel(narrow)}, torch.bfloat16, every_site=False, dtypes=()).passed


def test_other_dtypes_can_be_asked_for():
    report = verified({"Norm": kernel(norm)}, every_site=False, dtypes=(torch.float16, torch.float64))
    assert {check.dtype for check in report.checks} == {"float32", "float16", "float64"}
    assert report.passed


def test_the_original_where_the_kernel_refuses_everything_by_permission():
    def supports(x):
        return False

    made = subject.model()
    config = kernelgraft.KernelConfig({"Norm": kernel(norm, supports=staticmethod(supports))}, fallback="reference")
    report = kernelgraft.graft(made, config).verify(subject.inputs(), whole_model=False)
    assert report.passed
    assert cases(report) == set()
    assert report.kinds[0].kernel_calls == 0


# --- properties


def test_batch_invariance_is_a_property_and_no_verdict():
    def by_batch(self, x):
        return (x.double() * 1.0 if len(x) > 1 else x).mul(1 + 6e-8 * len(x)).to(x.dtype) * 0 + norm(self, x) * (
            1 if len(x) > 1 else 1 - 6e-8
        )

    found = [verified({"Norm": kernel(each)}, every_site=False) for each in (norm, by_batch)]
    assert all(report.passed for report in found)
    assert [report.kinds[0].batch_invariant for report in found] == [True, False]
    assert [report.kinds[0].original_batch_invariant for report in found] == [True, True]
    assert "a row alone gives other bits as in a batch; of the original the same" in str(found[1])


def test_determinism_is_a_property_too():
    def in_turns(self, x):
        self.turn = not getattr(self, "turn", False)
        return norm(self, x) * (1 + 1.2e-7 * self.turn)

    report = verified({"Norm": kernel(in_turns)}, every_site=False)
    assert report.kinds[0].deterministic is False
    assert verified({"Norm": kernel(norm)}, every_site=False).kinds[0].deterministic is True


# --- what cannot be tried


class Twice(nn.Module):
    """Only the first of two like modules is called."""

    def __init__(self):
        super().__init__()
        self.used, self.spare = subject.Norm(H), subject.Norm(H)

    def forward(self, x, spare=False):
        return self.spare(x) if spare else self.used(x)


def test_sites_that_no_forward_reaches():
    made = Twice().eval()
    graft = kernelgraft.graft(made, {"Norm": kernel(norm)}, example_inputs=subject.inputs())
    report = graft.verify(subject.inputs())
    assert report.passed
    assert report.kinds[0].notes == ("1 sites were not reached by these inputs",)
    assert graft.verify({"x": subject.inputs(), "spare": True}).kinds[0].tried == ("spare",)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = subject.Norm(H), nn.Linear(H, H)

    def forward(self, x):
        return self.linear(x)


def test_a_kind_that_no_forward_reaches_has_not_passed():
    graft = kernelgraft.graft(Unused(), {"Norm": kernel(norm)}, example_inputs=subject.inputs())
    report = graft.verify(subject.inputs(), whole_model=False)
    assert [failure.fault for failure in report.failures] == [
        "no forward reached any of these sites: give inputs that reach them"
    ]


class Rounded(nn.Module):
    def forward(self, x):
        return x @ self.matrix.to(x.dtype)


def test_originals_that_cannot_be_had_back():
    kernels = {"Legacy": Kernel(Rounded, zoo.NarrowedLegacyLayout), "Mix": zoo.FastMix}
    report = kernelgraft.graft(zoo.model(), kernels, example_inputs=zoo.inputs()).verify(zoo.inputs())
    assert {failure.site for failure in report.failures} == {"legacy"}
    assert "its originals cannot be had back from the packed parameters (legacy.weight: " in report.failures[0].fault
    assert report.kinds[0].tried == ("mix",)
    (whole,) = (check for check in report.checks if check.kind < 0)
    assert whole.skipped == "not all originals can be had back from the packed parameters"


def test_inputs_are_asked_for():
    with pytest.raises(VerificationError, match=r"No inputs of Model can be made up: .* Give them: graft\.verify\(x\)"):
        subject.grafted({"Norm": kernel(norm)}).verify()


def test_a_graft_that_was_removed():
    graft = subject.grafted({"Norm": kernel(norm)})
    graft.remove()
    with pytest.raises(GraftError, match="nothing to verify"):
        graft.verify(subject.inputs())


def test_inside_a_block_of_originals():
    graft = subject.grafted({"Norm": kernel(norm)})
    with graft.reference():
        assert graft.verify(subject.inputs()).kinds[0].kernel_calls > 0
        graft.model(subject.inputs())
        assert (graft.calls.kernel, graft.calls.reference) == (0, 3)
    graft.model(subject.inputs())
    assert (graft.calls.kernel, graft.calls.reference) == (3, 3)


def test_under_a_profiler():
    profiler = cProfile.Profile()
    profiler.enable()
    try:
        assert verified({"Norm": kernel(norm)}, every_site=False).passed
    finally:
        profiler.disable()


def test_a_compiled_model():
    made = subject.model()
    graft = kernelgraft.graft(made, {"Norm": kernel(norm, can_torch_compile=True)}, example_inputs=subject.inputs())
    made.compile(backend="eager")
    made(subject.inputs())
    report = graft.verify(subject.inputs())
    report.raise_for_failures()
    assert report.kinds[0].kernel_calls > 0
