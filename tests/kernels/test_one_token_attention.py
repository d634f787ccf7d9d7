"""Attention of one query token against a reference in float64: in Triton (interpreted on a CPU), and in plain torch."""

import pytest
import torch
from drawn import DEVICE, DTYPES, close, few, tensor
from hypothesis import example, given
from hypothesis import strategies as st

from kernelgraft.kernels import one_token_attention as op

pytest.importorskip("triton")

shapes = st.tuples(
    st.integers(0, 2),
    st.sampled_from([(1, 1), (4, 2), (6, 2), (17, 1)]),
    st.sampled_from([0, 1, 5, 63, 64, 65, 130, 260]),
    st.sampled_from(op.HEAD_DIMS),
)
masks = st.sampled_from(["none", "bool", "float", "bool per head", "one for all"])


def inputs(shape, dtype=torch.float32, seed=0):
    batch, (heads, kv_heads), keys, dim = shape
    q = tensor(batch, 1, heads, dim, dtype=dtype, seed=seed).transpose(1, 2)
    return q, *(tensor(batch, kv_heads, keys, dim, dtype=dtype, seed=seed + each) for each in (1, 2))


def mask_of(kind, shape, dtype):
    if kind == "none":
        return None
    batch, (heads, _), keys, _ = shape
    mask = tensor(1 if kind == "one for all" else batch, heads if kind == "bool per head" else 1, 1, keys, seed=5)
    return mask.to(dtype) if kind == "float" else mask > -0.5


def exactly(q, k, v, scale, mask=None, **limits):
    mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    return op.reference(q.double(), k.double(), v.double(), scale, mask, **limits)


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes, mask=masks)
@few
@example(shape=(2, (4, 2), 260, 64), mask="bool")
def test_any_shape_and_mask(dtype, shape, mask):
    q, k, v = inputs(shape, dtype)
    mask = mask_of(mask, shape, dtype)
    y = op.one_token_attention(q, k, v, shape[3] ** -0.5, mask)
    assert y.dtype == dtype
    assert y.is_contiguous()
    close(y, exactly(q, k, v, shape[3] ** -0.5, mask), dtype, terms=shape[3], size=2.0)


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("window", [None, 40, 100])
@pytest.mark.parametrize("length", [0, 1, 64, 70, 193, 200, "each"])
def test_length_and_window(length, window):
    q, k, v = inputs((2, (4, 2), 200, 64))
    # What lies beyond the length can be anything.
    length = torch.tensor([3, 150] if length == "each" else length, device=DEVICE)
    for batch in range(2):
        k[batch, :, length.expand(2)[batch] :] = float("nan")
    y = op.one_token_attention(q, k, v, 0.125, length=length, window=window)
    clean = [each.nan_to_num(0.0) for each in (q, k, v)]
    close(y, exactly(*clean, 0.125, length=length, window=window), torch.float32, terms=64, size=2.0)


@pytest.mark.usefixtures("in_triton")
def test_what_is_masked_is_not_read():
    q, k, v = inputs((1, (2, 1), 200, 64))
    mask = (torch.arange(200, device=DEVICE) < 70).view(1, 1, 1, -1)
    wanted = op.one_token_attention(q, k, v, 0.125, mask)
    k[:, :, 70:], v[:, :, 70:] = float("nan"), float("nan")
    assert torch.equal(op.one_token_attention(q, k, v, 0.125, mask), wanted)


@pytest.mark.usefixtures("in_triton")
def test_where_no_key_is_seen_it_is_zero():
    q, k, v = inputs((2, (2, 1), 70, 64))
    mask = torch.ones(2, 1, 1, 70, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    y = op.one_token_attention(q, k, v, 0.125, mask)
    assert (y[1] == 0).all()
    close(y, exactly(q, k, v, 0.125, mask), torch.float32, terms=64, size=2.0)


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("split", [True, False], ids=["in splits", "in one piece"])
def test_inputs_that_are_not_contiguous(split, monkeypatch):
    if not split:
        monkeypatch.setattr(op, "MAX_SPLITS", 1)
    op.settings.cache_clear()
    chosen = op.settings(2, 200, 64, 4, 3)
    assert (chosen.num_splits > 1) is split
    q = tensor(2, 4, 64, 3)[:, :, None, :, 1]
    k = tensor(2, 200, 1, 64, seed=1).transpose(1, 2)
    v = tensor(2, 1, 64, 200, seed=2).mT
    mask = tensor(200, 1, 1, 2, seed=3).permute(3, 1, 2, 0) > 0
    close(
        op.one_token_attention(q, k, v, 0.125, mask), exactly(q, k, v, 0.125, mask), torch.float32, terms=64, size=2.0
    )
    op.settings.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operator_keeps_its_promises(dtype):
    q, k, v = inputs((1, (2, 1), 5, 64), dtype)
    torch.library.opcheck(op._attend, (q, k, v, 0.125, None, None, None))
    mask, length = tensor(1, 1, 1, 5, dtype=dtype), torch.tensor(3, device=DEVICE)
    torch.library.opcheck(op._attend, (q, k, v, 0.125, mask, length, 2))


@pytest.mark.usefixtures("in_triton")
def test_compiled_in_one_piece():
    compiled = torch.compile(op.one_token_attention, fullgraph=True, backend="aot_eager")
    for keys in (5, 7, 140):
        q, k, v = inputs((2, (2, 1), keys, 64))
        assert torch.equal(compiled(q, k, v, 0.125), op.one_token_attention(q, k, v, 0.125))


def test_on_a_cpu_it_is_the_reference():
    shape = (2, (4, 2), 9, 64)
    q, k, v = (each.cpu() for each in inputs(shape))
    mask = mask_of("bool", shape, torch.float32).cpu()
    y = op.one_token_attention(q, k, v, 0.125, mask)
    assert torch.equal(y, op.reference(q, k, v, 0.125, mask))
    torch.testing.assert_close(
        y.transpose(1, 2),
        torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.125, enable_gqa=True),
    )


def test_what_it_does_not_take_is_said():
    q, k, v = inputs((2, (4, 2), 9, 64))
    assert op.refusal(q, k, v) is None
    assert "one query token, and not 3" in op.refusal(q.expand(-1, -1, 3, -1), k, v)
    assert "and not 40" in op.refusal(q[..., :40], k[..., :40], v[..., :40])
    assert "one dtype" in op.refusal(q.half(), k, v)
    assert "not torch.float64" in op.refusal(q.double(), k.double(), v.double())
    assert "1, 9), and not (2, 9)" in op.refusal(q, k, v, torch.ones(2, 9))
