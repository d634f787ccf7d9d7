"""What a forward on meta tensors gives is the same whether operations are remembered or worked out each time."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kernelgraft.soundness._remembering import Remembering


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def form(value):
    if isinstance(value, tuple | list):
        return [form(each) for each in value]
    return (value.shape, value.stride(), value.dtype, value.device) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x * 2,
        lambda x: x * 2.5,
        lambda x: x.int() * 2,
        lambda x: x.int() * 2.5,
        lambda x: x.int() / x.int(),
        lambda x: x + x.to(torch.bfloat16),
        lambda x: x.transpose(1, 2) + x.transpose(1, 2),
        lambda x: x + meta(5),
        lambda x: x @ meta(5, 7),
        lambda x: x.pow(2).mean(-1, keepdim=True),
        lambda x: x.sum((0, 1)),
        lambda x: torch.cat([x, x, x[:1]]),
        lambda x: torch.stack([x, x], -1),
        lambda x: x.split(2, 1),
        lambda x: x.topk(2),
        lambda x: F.layer_norm(x, (5,)),
        lambda x: F.dropout(x, 0.5, training=True),
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: F.conv1d(x, meta(2, 4, 3)),
        lambda x: x.reshape(-1, 10),
        lambda x: x.expand(2, 3, 4, 5).contiguous(),
        lambda x: torch.arange(6, device="meta"),
        lambda x: torch.zeros_like(x, dtype=torch.float64),
        lambda x: x.size(1),
    ],
)
def test_the_same_forms_each_time(call):
    x = meta(3, 4, 5)
    expected = form(call(x))
    with torch.no_grad(), Remembering():
        assert [form(call(x)), form(call(x))] == [expected] * 2


def test_inputs_of_another_form_are_worked_out_anew():
    with torch.no_grad(), Remembering():
        shapes = [(meta(*shape) + meta(5)).shape for shape in [(2, 5), (3, 5), (2, 5), (1, 1)]]
        dtypes = [(meta(2, dtype=each) + 1).dtype for each in (torch.float32, torch.int64, torch.bfloat16)]
    assert shapes == [(2, 5), (3, 5), (2, 5), (1, 5)]
    assert dtypes == [torch.float32, torch.int64, torch.bfloat16]


def test_the_default_dtype_counts():
    x, before = meta(2, dtype=torch.int64), torch.get_default_dtype()
    with torch.no_grad(), Remembering():
        assert (x / x).dtype == torch.float32
        try:
            torch.set_default_dtype(torch.float64)
            assert (x / x).dtype == torch.float64
        finally:
            torch.set_default_dtype(before)


def test_each_result_is_a_tensor_of_its_own():
    x = meta(2, 3)
    with torch.no_grad(), Remembering():
        a, b = x + 1, x + 1
    assert a is not b
    assert a.untyped_storage()._cdata != b.untyped_storage()._cdata


def test_views_and_writes_are_what_they_are():
    x = meta(4, 6)
    with torch.no_grad(), Remembering():
        for _ in range(2):
            view, version = x[1:], x._version
            assert view._base is x
            assert view.storage_offset() == 6
            assert x.add_(1) is x
            assert x._version == version + 1


def test_tensors_with_values_keep_them():
    with torch.no_grad(), Remembering():
        results = [(torch.tensor([value]) * 2).item() for value in (1, 2, 3)]
        torch.manual_seed(0)
        drawn = [torch.rand(3) for _ in range(2)]
    assert results == [2, 4, 6]
    torch.manual_seed(0)
    assert torch.equal(torch.stack(drawn), torch.stack([torch.rand(3) for _ in range(2)]))


def test_what_needs_values_is_refused_as_ever():
    with torch.no_grad(), Remembering():
        for _ in range(2):
            with pytest.raises(RuntimeError):
                bool((meta(2) + 1).sum() > 0)


def test_a_whole_layer():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, device="meta")
    x = meta(2, 5, 16)
    with torch.no_grad():
        expected = [form(layer.train(mode)(x)) for mode in (True, False)]
        with Remembering():
            for _ in range(2):
                assert [form(layer.train(mode)(x)) for mode in (True, False)] == expected
