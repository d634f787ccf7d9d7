"""Layers built on the meta device without drawing: the same layers, and the same refusals and warnings."""

import pytest
import torch
from torch import nn
from torch.nn import init

from kernelgraft.meta import WithoutDrawing

LAYERS = [
    lambda: nn.Linear(3, 4),
    lambda: nn.Linear(3, 4, bias=False, dtype=torch.bfloat16),
    lambda: nn.Conv2d(3, 4, 2),
    lambda: nn.Embedding(5, 3, padding_idx=0),
    lambda: nn.LayerNorm(3),
    lambda: nn.LSTM(3, 4),
    lambda: nn.MultiheadAttention(4, 2),
    lambda: nn.Bilinear(2, 3, 4),
]


def forms(module):
    return {n: (type(p), p.shape, p.dtype, p.device, p.requires_grad) for n, p in module.named_parameters()}


@pytest.mark.parametrize("layer", LAYERS)
def test_the_same_layers(layer):
    with torch.device("meta"):
        expected = forms(layer())
        with WithoutDrawing():
            assert forms(layer()) == expected


@pytest.mark.parametrize("layer", LAYERS)
def test_what_has_values_is_drawn(layer):
    torch.manual_seed(0)
    expected = layer().state_dict()
    torch.manual_seed(0)
    with WithoutDrawing():
        drawn = layer().state_dict()
    assert all(torch.equal(drawn[name], tensor) for name, tensor in expected.items())


def test_random_numbers_are_drawn_in_their_order():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with WithoutDrawing(), torch.device("meta"):
        nn.Linear(3, 4)
        nn.Embedding(3, 4)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: init.kaiming_uniform_(torch.empty(3)),
        lambda: init.kaiming_uniform_(torch.empty(3, 4), mode="sideways"),
        lambda: init.kaiming_uniform_(torch.empty(3, 4), nonlinearity="none"),
        lambda: init.kaiming_uniform_(torch.empty(3, 4), a="much"),
        lambda: init.kaiming_uniform_(torch.empty(3, 4), a=True),
        lambda: init.normal_(torch.empty(3, 4), std=-1.0),
        lambda: init.normal_(torch.empty(3, 4), mean="none"),
        lambda: init.normal_(torch.empty(3, 4, dtype=torch.int64)),
        lambda: init.uniform_(torch.empty(3, 4), a="low"),
    ],
)
def test_what_torch_refuses_is_refused(draw):
    with torch.device("meta"):
        with pytest.raises((ValueError, RuntimeError, TypeError)) as expected:
            draw()
        with WithoutDrawing(), pytest.raises(expected.type) as caught:
            draw()
    assert str(caught.value) == str(expected.value)


def test_what_torch_warns_about_is_warned_about():
    with torch.device("meta"), WithoutDrawing(), pytest.warns(UserWarning, match="zero-element tensors"):
        nn.Linear(0, 3, bias=False)


def test_a_tensor_of_another_class_does_its_own():
    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is init.uniform_:
                return "mine"
            return super().__torch_function__(func, types, args, kwargs or {})

    with WithoutDrawing():
        assert init.uniform_(torch.empty(3, device="meta").as_subclass(Own)) == "mine"
