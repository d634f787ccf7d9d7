"""`verify=True`: a kernel that fails is refused, and the model is as it was."""

import plants
import pytest
import subject
import torch

import kernelgraft
import toys
from kernelgraft.errors import VerificationError


def test_a_right_kernel_is_put_in():
    made = subject.model()
    graft = kernelgraft.graft(made, subject.RIGHT[2], example_inputs=subject.inputs(), verify=True)
    assert kernelgraft.graft_of(made) is graft
    assert graft.calls.kernel == graft.calls.reference == 0


def test_a_wrong_one_is_taken_out_again():
    made = subject.model()
    before, logits = toys.state(made), made(subject.inputs())
    target, kernel = plants.FAULTS["gate_and_up_swapped"]
    with pytest.raises(VerificationError, match=r"GateAndUpSwapped at blocks\.0\.norm") as caught:
        kernelgraft.graft(made, {target: kernel}, example_inputs=subject.inputs(), verify=True)
    assert kernelgraft.graft_of(made) is None
    assert type(made) is subject.Model
    assert torch.equal(made(subject.inputs()), logits)
    assert toys.state(made).keys() == before.keys()
    assert {failure.site for failure in caught.value.report.failures} == {"blocks.0.norm"}


def test_inputs_that_cannot_be_made_up_are_asked_for():
    made = subject.model()
    with pytest.raises(VerificationError, match=r"No inputs of Model can be made up.*example_inputs"):
        kernelgraft.graft(made, {"Norm": subject.RIGHT[2]["Norm"]}, verify=True)
    assert kernelgraft.graft_of(made) is None


def test_a_model_without_kernels_in_it_passes():
    pytest.importorskip("transformers")
    import tiny

    made = tiny.model("llama")
    graft = kernelgraft.graft(made, kernelgraft.KernelConfig({}, inherit_mapping=False), verify=True)
    assert graft.verify().passed
