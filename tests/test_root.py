"""The root's class, through which Transformers' own switch takes a graft out."""

import pytest
import torch

import twins
import zoo
from kernelgraft.errors import GraftError
from twins import pair, run


def test_use_kernels():
    for switch_off in (
        lambda model: setattr(model, "use_kernels", False),
        lambda model: model.set_use_kernels(False),
    ):
        twin, model, graft = pair("zoo")
        assert model.use_kernels is True
        model.use_kernels = True
        model.set_use_kernels(True)
        with pytest.raises(GraftError, match="grafted already"):
            model.set_use_kernels(True, kernel_config=zoo.config())
        assert graft.is_applied
        switch_off(model)
        assert not graft.is_applied
        assert type(model) is zoo.Zoo
        assert torch.equal(run("zoo", model), run("zoo", twin))


@pytest.mark.transformers
def test_use_kernels_of_a_transformers_model():
    twin, model, graft = pair("qwen3")
    assert model.use_kernels is True
    model.train().eval()
    assert "_use_kernels" not in vars(model)
    model.use_kernels = False
    assert not graft.is_applied
    assert model.use_kernels is twin.use_kernels is False
    assert type(model) is type(twin)
    with twins.graft("qwen3", model):
        assert isinstance(model, type(twin))
        assert type(model).__qualname__ == type(twin).__qualname__
