"""A decoding step's attention in one, against rotation and attention one after another, in Triton."""

import pytest
import torch
from drawn import DEVICE, DTYPES, close, few, tensor
from hypothesis import example, given
from hypothesis import settings as of_hypothesis
from hypothesis import strategies as st

from kernelgraft.kernels import decode_attention as op
from kernelgraft.kernels import decode_attention_kernels, one_token_attention, rotary

pytest.importorskip("triton")

few = of_hypothesis(few, max_examples=6)
shapes = st.tuples(
    st.integers(1, 2),
    st.sampled_from([(1, 1), (4, 2), (17, 1)]),
    st.sampled_from([1, 5, 63, 64, 65, 130, 260]),
    st.sampled_from(one_token_attention.HEAD_DIMS),
)
masks = st.sampled_from(["none", "bool", "float", "bool per head", "one for all"])
norms = st.sampled_from([None, (1e-6, 0.0, True), (1e-6, 1.0, False)])


def step(shape, norm, dtype=torch.float32, shared=True):
    """All that a step takes but position and mask; `shared` angles are the same for all sequences."""
    batch, (heads, kv_heads), keys, dim = shape
    angles = [tensor(1 if shared else batch, 1, dim, dtype=dtype, seed=each) for each in (7, 8)]
    weights = [None, None] if norm is None else [tensor(dim, dtype=dtype, seed=each, offset=1.0) for each in (9, 10)]
    held = [tensor(batch, kv_heads, keys, dim, dtype=dtype, seed=each) for each in (1, 2)]
    qkv = tensor(batch, 1, (heads + 2 * kv_heads) * dim, dtype=dtype)
    return [qkv, *angles, heads, dim, *weights, norm or (0.0, 0.0, True), *held]


def mask_of(kind, shape, keys, dtype):
    if kind == "none":
        return None
    batch, (heads, _), _, _ = shape
    mask = tensor(1 if kind == "one for all" else batch, heads if kind == "bool per head" else 1, 1, keys, seed=5)
    return mask.to(dtype) if kind == "float" else mask > -0.5


def exactly(arguments, position, scale, mask):
    wide = [each.double() if isinstance(each, torch.Tensor) else each for each in arguments]
    mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    return op.reference(*wide, position, scale, mask)


def size_of(arguments, keys, scale):
    """What is added up; and half the largest score, since a rounding of that, half an eps, is one of the weights too.

    Plain torch in float32 is further from the exact sums than a bound without it, where normed heads are long.
    """
    *rotated, norm, _, _ = (each.double() if isinstance(each, torch.Tensor) else each for each in arguments)
    q = rotary.reference(*rotated, *norm)[0]
    keys = keys.double().repeat_interleave(q.shape[1] // keys.shape[1], dim=1)
    return max(4.0, (q @ keys.mT).abs().max().item() * scale / 2)


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes, norm=norms, mask=masks, shared=st.booleans())
@few
@example(shape=(2, (4, 2), 260, 64), norm=(1e-6, 0.0, True), mask="bool", shared=False)
@example(shape=(1, (1, 1), 63, 256), norm=(1e-6, 1.0, False), mask="none", shared=False)
def test_a_cache_that_grows(dtype, shape, norm, mask, shared):
    arguments = step(shape, norm, dtype, shared)
    scale, mask = shape[3] ** -0.5, mask_of(mask, shape, shape[2] + 1, dtype)
    y, keys, values = op.attend_longer(*arguments, scale, mask)
    found = exactly(arguments, None, scale, mask)
    sizes = (size_of(arguments, found[1], scale), 4.0, 4.0)
    for one, other, terms, size in zip((y, keys, values), found, (shape[3], 4, 1), sizes, strict=True):
        assert one.dtype == dtype
        assert one.is_contiguous()
        close(one, other, dtype, terms=terms, size=size)
    assert torch.equal(keys[:, :, :-1], arguments[-2])
    assert torch.equal(values[:, :, :-1], arguments[-1])


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes, norm=norms, mask=masks, at=st.floats(0, 1))
@few
@example(shape=(2, (4, 2), 260, 64), norm=(1e-6, 0.0, True), mask="bool", at=0.5)
@example(shape=(2, (4, 2), 260, 64), norm=None, mask="float", at=1.0)
def test_a_cache_of_fixed_length(dtype, shape, norm, mask, at):
    arguments = step(shape, norm, dtype)
    place = round(at * (shape[2] - 1))
    position = torch.tensor(place, device=DEVICE)
    scale, mask = shape[3] ** -0.5, mask_of(mask, shape, shape[2], dtype)
    exact, *held = exactly(arguments, position, scale, mask)
    before = [each.clone() for each in arguments[-2:]]
    y = op.attend_into(*arguments, position, scale, mask)
    assert position == place + 1
    close(y, exact, dtype, terms=shape[3], size=size_of(arguments, held[0], scale))
    others = torch.arange(shape[2], device=DEVICE) != place
    for found, wanted, was in zip(arguments[-2:], held, before, strict=True):
        close(found, wanted, dtype, terms=4, size=2.0)
        assert torch.equal(found[:, :, others], was[:, :, others])


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes, norm=norms, mask=masks)
@few
def test_what_is_read_before_the_kernel_in_front_has_ended_changes_nothing(dtype, shape, norm, mask):
    arguments = step(shape, norm, dtype)
    scale, mask = shape[3] ** -0.5, mask_of(mask, shape, shape[2], dtype)
    found = []
    for follows in (False, True):
        held = [each.clone() for each in arguments[-2:]]
        position = torch.tensor(shape[2] - 1, device=DEVICE)
        y = op.attend_into(*arguments[:-2], *held, position, scale, mask, follows=follows)
        longer = op.attend_longer(*arguments, scale, follows=follows)
        found.append((y, *held, position, *longer))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize(("what", "early"), [("nothing", True), ("angles", False), ("mask", False)])
def test_what_has_to_be_copied_is_not_read_early(what, early, monkeypatch):
    asked = []
    real = decode_attention_kernels._launches
    monkeypatch.setattr(decode_attention_kernels, "_launches", lambda *given: asked.append(given[-1]) or real(*given))
    arguments = step((2, (4, 2), 5, 64), None)
    mask = mask_of("bool", (2, (4, 2), 5, 64), 5, torch.float32)
    if what == "angles":
        arguments[1] = torch.stack([arguments[1]] * 2, dim=-1)[..., 0]
    if what == "mask":
        mask = torch.stack([mask] * 2, dim=-1)[..., 0]
    position = torch.tensor(2, device=DEVICE)
    exact, *_ = exactly(arguments, position, 0.125, mask)
    close(op.attend_into(*arguments, position, 0.125, mask, follows=True), exact, torch.float32, terms=64)
    assert asked == [early]


@pytest.mark.usefixtures("in_triton")
def test_it_rounds_as_rotation_and_attention_do_one_after_another():
    """In float32 to the last bit of the keys: what others read of the cache does not depend on who wrote it."""
    for norm in (None, (1e-6, 0.0, True)):
        arguments = step((2, (4, 2), 70, 64), norm)
        _, keys, values = op.attend_longer(*arguments, 0.125)
        *rotated, kind, _, _ = arguments
        _, k, v = rotary.rotate(*rotated, *kind)
        assert torch.equal(keys[:, :, -1:], k)
        assert torch.equal(values[:, :, -1:], v)


@pytest.mark.usefixtures("in_triton")
def test_what_is_masked_changes_nothing():
    arguments = step((1, (2, 1), 200, 64), None)
    mask = (torch.arange(200, device=DEVICE) <= 70).view(1, 1, 1, -1)
    wanted = op.attend_into(*arguments, torch.tensor(70, device=DEVICE), 0.125, mask)
    for held in arguments[-2:]:
        held[:, :, 71:] = float("nan")
    assert torch.equal(op.attend_into(*arguments, torch.tensor(70, device=DEVICE), 0.125, mask), wanted)


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("slots", [5, 200])
def test_behind_the_caches_end_nothing_is_written_and_nothing_is_right(slots):
    arguments = step((1, (2, 1), slots, 64), None)
    before = [each.clone() for each in arguments[-2:]]
    assert op.attend_into(*arguments, torch.tensor(slots, device=DEVICE), 0.125).isnan().all()
    assert all(map(torch.equal, before, arguments[-2:]))


@pytest.mark.usefixtures("in_triton")
def test_caches_in_any_order_of_memory():
    arguments = step((2, (4, 2), 70, 64), None)
    other = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in arguments[-2:]]
    for one, same in zip(
        op.attend_longer(*arguments, 0.125), op.attend_longer(*arguments[:-2], *other, 0.125), strict=True
    ):
        assert torch.equal(one, same)


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize(("keys", "dtype"), [(70, torch.float32), *((200, dtype) for dtype in DTYPES)], ids=str)
def test_operators(keys, dtype):
    given = step((1, (2, 1), keys, 64), (1e-6, 0.0, True), dtype)
    qkv, cos, sin, heads, dim, *weights, kind, held_keys, held_values = given
    arguments = (qkv, cos, sin, *weights, heads, dim, *kind, held_keys, held_values)
    torch.library.opcheck(op._longer, (*arguments, 0.125, None))
    mask = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=DEVICE)
    torch.library.opcheck(op._into, (*arguments, torch.tensor(3, device=DEVICE), 0.125, mask))


def test_what_it_does_not_take_is_said():
    def said(keys=None, mask=None, tokens=1, dim=64, total=6, **changed):
        arguments = step((1, (2, 1), 5, dim), None)
        qkv = arguments[0].expand(1, tokens, -1)
        held = {"keys": arguments[-2] if keys is None else keys, "values": arguments[-1], **changed}
        return op.refusal(qkv, arguments[1], dim, None, True, num_keys=total, mask=mask, **held)

    assert said() is None
    assert "one query token, and not 2" in said(tokens=2)
    assert "and not 72" in said(dim=72)
    assert "with tokens in it" in said(values=torch.empty(1, 1, 0, 64, device=DEVICE))
    assert "with tokens in it" in said(values=None)
    assert "of the same dtype" in said(keys=torch.empty(1, 1, 5, 64, dtype=torch.float16, device=DEVICE))
    assert "and not (2, 1, 5, 64)" in said(keys=torch.empty(2, 1, 5, 64, device=DEVICE))
    assert "1, 6), and not (1, 1, 1, 5)" in said(mask=torch.ones(1, 1, 1, 5, dtype=torch.bool))
