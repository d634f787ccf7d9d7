"""Bisection: the first site whose kernel breaks the whole model is found, and the graft is as it was."""

import plants
import pytest
import subject
import torch
from torch import nn

import kernelgraft
from kernelgraft.errors import GraftError, VerificationError
from kernelgraft.verify import bisect

DEPTH = 11


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = subject.Norm(subject.H)
        self.square = subject.Square(subject.H)

    def forward(self, x):
        return x + self.square(self.norm(x))


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def deep(kernel, odd=()):
    """A graft of a deep model with a norm kernel that is right for an epsilon of 1e-6, and the odd blocks' epsilon."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Deep().eval()
    for index in odd:
        model.blocks[index].norm.eps = 0.5
    return kernelgraft.graft(model, {"Norm": kernel})


def fixed_epsilon():
    return subject.kernel(plants.of_fixed_epsilon)


@pytest.mark.parametrize("odd", [(0,), (4,), (DEPTH - 1,), (3, 8)], ids=str)
def test_the_first_wrong_site_is_found(odd):
    graft = deep(fixed_epsilon(), odd)
    found = bisect(graft, subject.inputs())
    assert found.site == f"blocks.{odd[0]}.norm"
    assert found.kernels == ("OfFixedEpsilon",)
    assert not found.check.passed
    assert found.without is None or found.without.passed
    assert not found.alone.passed
    assert next(step.sites for step in found.steps) == DEPTH
    assert len(found.steps) <= 1 + DEPTH.bit_length()
    assert f"OfFixedEpsilon at {found.site} is the first" in str(found)


def test_of_several_kernels_the_wrong_one_is_named():
    kernels = {**subject.RIGHT[1], "Square": plants.FAULTS["transposed_square_weight"][1]}
    graft = subject.grafted(kernels)
    found = bisect(graft, subject.inputs(), report=graft.verify(subject.inputs(), every_site=False))
    assert (found.site, found.kernels) == ("square", ("TransposedSquareWeight",))


def test_the_smallest_error_that_counts_adds_up():
    """Each site strays by three roundings of float32 to the same side; only many of them are more than noise."""

    def straying(self, x):
        return subject.rms_norm(x, self.weight, self.eps) * (1 + 3 * 2**-23)

    graft = deep(subject.kernel(straying))
    found = bisect(graft, subject.inputs())
    if found is not None:  # whatever the budget is, what passes before it and fails with it is told apart
        assert found.without is None or found.without.passed


def test_nothing_is_found_where_all_is_right():
    assert bisect(deep(fixed_epsilon()), subject.inputs()) is None


@pytest.mark.parametrize("in_a_block", [False, True])
def test_the_graft_is_as_it_was(in_a_block):
    graft = deep(fixed_epsilon(), (5,))
    x = subject.inputs()
    expected, before = graft.model(x), graft.calls
    with graft.reference():
        originals = graft.model(x)
        inside = graft.calls
        assert bisect(graft, x).site == "blocks.5.norm"
        assert graft.calls == inside
        assert torch.equal(graft.model(x), originals)
    after = graft.calls
    assert torch.equal(graft.model(x), expected)
    assert graft.calls.kernel == after.kernel + DEPTH
    assert graft.calls.reference == before.reference + 2 * DEPTH


def test_the_graft_is_as_it_was_after_an_error():
    class Interrupted(BaseException):
        pass

    graft = deep(fixed_epsilon(), (5,))
    x = subject.inputs()
    expected = graft.model(x)
    report = graft.verify(x, every_site=False)
    seen = []

    def interrupt(what, *_):
        seen.append(what)
        if len(seen) == 3:
            graft.model.blocks[0].square.register_forward_pre_hook(raising)

    def raising(*_):
        raise Interrupted

    graft.model.train()
    with pytest.raises(Interrupted):
        bisect(graft, x, report=report, progress=interrupt)
    graft.model.blocks[0].square._forward_pre_hooks.clear()
    assert all(module.training for module in graft.model.modules())
    graft.model.eval()
    before = graft.calls
    assert torch.equal(graft.model(x), expected)
    assert (graft.calls.kernel - before.kernel, graft.calls.reference) == (DEPTH, before.reference)


def test_a_kernel_that_writes_into_weights_is_not_let_into_the_model():
    target, kernel = plants.FAULTS["changes_its_weight"]
    graft = subject.grafted({target: kernel})
    before = {name: tensor.clone() for name, tensor in graft.model.state_dict().items()}
    with pytest.raises(VerificationError, match="ChangesItsWeight writes into weights"):
        bisect(graft, subject.inputs())
    assert all(torch.equal(tensor, before[name]) for name, tensor in graft.model.state_dict().items())


def test_what_cannot_be_bisected():
    graft = deep(fixed_epsilon(), (5,))
    report = graft.verify(subject.inputs(), every_site=False, whole_model=False)
    with pytest.raises(GraftError, match="nothing of the whole model"):
        bisect(graft, subject.inputs(), report=report)
    graft.remove()
    with pytest.raises(GraftError, match="was removed"):
        bisect(graft, subject.inputs())


def test_sites_can_be_switched_alone():
    graft = deep(fixed_epsilon(), (5,))
    x = subject.inputs()
    with graft.reference(["blocks.5.norm"]), graft.reference(["blocks.5.norm", "blocks.6.norm"]):
        graft.model(x)
    assert [host for host, calls in graft.calls.sites.items() if calls == (0, 1)] == ["blocks.5.norm", "blocks.6.norm"]
    graft.model(x)
    assert graft.calls.sites["blocks.5.norm"] == (1, 1)
    with (
        pytest.raises(GraftError, match=r"'blocks\.99\.norm' is no site of this graft"),
        graft.reference(["blocks.99.norm"]),
    ):
        pass
