"""Gated activations against torch in float64."""

import pytest
import torch
from drawn import DEVICE, DTYPES, close, few, tensor
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from kernelgraft.kernels import activation as op

pytest.importorskip("triton")

shapes = st.tuples(st.lists(st.integers(0, 4), max_size=2).map(tuple), st.sampled_from([1, 7, 128, 200, 1100])).map(
    lambda drawn: (*drawn[0], 2 * drawn[1])
)


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("act", op.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes)
@few
def test_any_leading_shape_forward_and_backward(act, dtype, shape):
    gate_up = tensor(*shape, dtype=dtype, scale=2).requires_grad_()
    wide = gate_up.detach().double().requires_grad_()
    y, exact = op.gated_activation(gate_up, act), op.reference(wide, act)
    assert y.dtype == dtype
    close(y.detach(), exact.detach(), dtype, size=2.0)
    upstream = tensor(*y.shape, dtype=dtype, seed=1)
    y.backward(upstream)
    exact.backward(upstream.double())
    close(gate_up.grad, wide.grad, dtype, size=4.0)


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("act", op.ACTIVATIONS)
def test_rounded_where_the_reference_rounds(act, dtype):
    gate_up = tensor(20, 200, dtype=dtype)
    same = op.gated_activation(gate_up, act) == op.reference(gate_up, act)
    assert same.float().mean() > 0.98


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("act", op.ACTIVATIONS)
def test_far_from_zero_nothing_overflows(act):
    gate_up = torch.tensor([[-1e4, -90.0, 90.0, 1e4, 1.0, 1.0, 1.0, 1.0]], device=DEVICE).repeat(2, 1).requires_grad_()
    y = op.gated_activation(gate_up, act)
    y.sum().backward()
    close(y.detach(), op.reference(gate_up.detach().double(), act), torch.float32, size=1.0)
    assert gate_up.grad.isfinite().all()


@pytest.mark.usefixtures("in_triton")
def test_inputs_that_are_not_contiguous():
    base = tensor(6, 4, 64)
    for x in (base[:, ::2], base.transpose(0, 1), base.mT):
        close(op.gated_activation(x, "silu"), op.reference(x.double(), "silu"), torch.float32, size=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", op.ACTIVATIONS)
def test_the_operator_keeps_its_promises(dtype, act):
    for needs_grad in (False, True):
        torch.library.opcheck(op._gated, (tensor(3, 2, 20, dtype=dtype).requires_grad_(needs_grad), act))


@pytest.mark.usefixtures("in_triton")
def test_compiled_in_one_piece():
    compiled = torch.compile(lambda x: op.gated_activation(x, "gelu") + 1, fullgraph=True, backend="aot_eager")
    once, again = (tensor(3, 5, 32).requires_grad_() for _ in range(2))
    out, wanted = compiled(once), op.gated_activation(again, "gelu") + 1
    assert torch.equal(out, wanted)
    out.sum().backward()
    wanted.sum().backward()
    assert torch.equal(once.grad, again.grad)


def test_an_activation_is_told_by_what_it_does():
    assert op.name_of(nn.SiLU()) == op.name_of(F.silu) == "silu"
    assert op.name_of(nn.GELU()) == "gelu"
    assert op.name_of(nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert op.name_of(nn.ReLU()) is None
    assert op.name_of(nn.PReLU()) is None
    assert op.name_of(None) is None


def made(activations, name):
    try:
        return activations[name]
    except ImportError:  # one wants a package of its own
        return None


@pytest.mark.transformers
def test_those_of_transformers():
    from transformers.activations import ACT2FN

    found = {name: op.name_of(act_fn) for name in ACT2FN if (act_fn := made(ACT2FN, name)) is not None}
    tanh = ("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh")
    wanted = {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_python": "gelu",
        **dict.fromkeys(tanh, "gelu_tanh"),
    }
    assert {name: known for name, known in found.items() if known} == wanted
    assert {"relu", "quick_gelu", "gelu_10", "mish"} < set(found)
