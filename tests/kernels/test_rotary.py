"""Rotary embedding with norms over heads against a reference in float64: in Triton (interpreted on a CPU) and torch."""

import pytest
import torch
from drawn import DEVICE, DTYPES, close, few, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft.kernels import rotary as op
from kernelgraft.kernels import rotary_kernels

pytest.importorskip("triton")

KINDS = {"none": None, "llama": {}, "gemma": {"offset": 1.0, "rounds_first": False}}
heads = st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3), (5, 1)])
shapes = st.tuples(st.integers(0, 2), st.integers(0, 4), heads, st.sampled_from([2, 8, 40, 64]))
few = settings(few, max_examples=5)


def given_for(kind, shape, dtype=torch.float32, one_batch=False):
    """The arguments of `rotate` by name: tensors first, then numbers."""
    batch, tokens, (heads, kv_heads), dim = shape
    angles = tensor(1 if one_batch else batch, tokens, dim // 2, seed=9, scale=3).repeat(1, 1, 2)
    tensors = {
        "qkv": tensor(batch, tokens, (heads + 2 * kv_heads) * dim, dtype=dtype),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
    }
    if KINDS[kind] is not None:
        for seed, name in enumerate(("q_weight", "k_weight"), 1):
            tensors[name] = tensor(dim, dtype=dtype, seed=seed, scale=0.2, offset=1)
    return tensors, {"num_heads": heads, "head_dim": dim, **(KINDS[kind] or {})}


def exactly(tensors, numbers):
    return op.reference(**{name: each.double() for name, each in tensors.items()}, **numbers)


def needing_grad(tensors, dtype=None):
    return {
        name: each.detach().to(dtype or each.dtype).requires_grad_(name not in ("cos", "sin"))
        for name, each in tensors.items()
    }


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes, one_batch=st.booleans())
@few
def test_any_shape(kind, dtype, shape, one_batch):
    tensors, numbers = given_for(kind, shape, dtype, one_batch)
    for found, exact in zip(op.rotate(**tensors, **numbers), exactly(tensors, numbers), strict=True):
        assert found.dtype == dtype
        # The two products that are added up are each rounded, and can cancel.
        close(found, exact, dtype, size=2 * exact.abs().max() if exact.numel() else 0.0)


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes, one_batch=st.booleans())
@few
def test_gradients(kind, dtype, shape, one_batch):
    tensors, numbers = given_for(kind, shape, dtype, one_batch)
    ours, theirs = needing_grad(tensors), needing_grad(tensors, torch.float64)
    out, exact = op.rotate(**ours, **numbers), op.reference(**theirs, **numbers)
    upstream = [tensor(*each.shape, dtype=dtype, seed=seed) for seed, each in enumerate(exact, 20)]
    torch.autograd.backward(out, upstream)
    torch.autograd.backward(exact, [each.double() for each in upstream])
    rows = shape[0] * shape[1] * shape[2][0]
    for name, each in ours.items():
        if each.requires_grad:
            wanted = theirs[name].grad
            size = 0.0 if not wanted.numel() else wanted.abs().max() if name == "qkv" else 10.0
            close(each.grad, wanted, dtype, max(rows, shape[3]), size)


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_where_the_reference_rounds(kind, dtype):
    tensors, numbers = given_for(kind, (2, 9, (4, 2), 64), dtype)
    for found, wanted in zip(op.rotate(**tensors, **numbers), op.reference(**tensors, **numbers), strict=True):
        # The order in which squares are added up shows in a few last bits.
        assert (found == wanted).float().mean() > (0.99 if dtype != torch.float32 or kind == "none" else 0.5)
    assert found.dtype == dtype


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("over", [False, True])
def test_written_into_a_cache(kind, over):
    tensors, numbers = given_for(kind, (2, 3, (4, 2), 16))
    q, k, v = op.rotate(**tensors, **numbers)
    start = 6 if over else 4
    keys, values = (torch.full((2, 8, 2, 16), 7.0, device=DEVICE).transpose(1, 2) for _ in range(2))
    found = op.rotate_into(keys, values, torch.tensor(start, device=DEVICE), **tensors, **numbers)
    fits = 8 - start if over else 3
    assert torch.equal(found[:, :, :fits], q[:, :, :fits])
    assert found[:, :, fits:].isnan().all()
    for cache, new in ((keys, k), (values, v)):
        assert torch.equal(cache[:, :, start : start + fits], new[:, :, :fits])
        assert (cache[:, :, :start] == 7).all()
        assert (cache[:, :, start + fits :] == 7).all()


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize(
    "make",
    [lambda x: x[:, ::2], lambda x: x.transpose(0, 1), lambda x: x[..., 3:67], lambda x: x.mT],
    ids=["every other token", "batch and tokens exchanged", "a slice of each row", "columns"],
)
def test_inputs_that_are_not_contiguous(make):
    leaf = tensor(6, 64, 96).requires_grad_()
    qkv = make(leaf)
    heads, dim = qkv.shape[-1] // 16 - 2, 16
    angles = tensor(qkv.shape[1], 1, 8, seed=9).repeat(1, 1, 2).transpose(0, 1)
    tensors = {"qkv": qkv, "cos": angles.cos(), "sin": angles.mT.contiguous().mT.sin()}
    tensors |= {name: tensor(dim, seed=1, offset=1) for name in ("q_weight", "k_weight")}
    numbers = {"num_heads": heads, "head_dim": dim}
    out = op.rotate(**tensors, **numbers)
    twin = leaf.detach().double().requires_grad_()
    exact = exactly({**tensors, "qkv": make(twin)}, numbers)
    for found, wanted in zip(out, exact, strict=True):
        close(found, wanted, torch.float32, size=1.0)
    upstream = [tensor(*reversed(each.shape), seed=5).permute(3, 2, 1, 0) for each in exact]
    torch.autograd.backward(out, upstream)
    torch.autograd.backward(exact, [each.double() for each in upstream])
    close(leaf.grad, twin.grad, torch.float32, dim, size=5.0)


@pytest.mark.usefixtures("in_triton")
def test_more_rows_than_programs():
    chosen = rotary_kernels.settings(200, (4, 2, 2), 16, 3, True)
    assert chosen.num_programs[0] * chosen.tokens * chosen.heads < 200 * 4
    tensors, numbers = given_for("llama", (2, 100, (4, 2), 16))
    ours, theirs = needing_grad(tensors), needing_grad(tensors, torch.float64)
    out, exact = op.rotate(**ours, **numbers), op.reference(**theirs, **numbers)
    sum((each * each).sum() for each in out).backward()
    sum((each * each).sum() for each in exact).backward()
    for name in ("qkv", "q_weight", "k_weight"):
        close(ours[name].grad, theirs[name].grad, torch.float32, terms=2000, size=5.0)


@pytest.mark.usefixtures("in_triton")
def test_what_is_not_used_has_no_gradient():
    tensors, numbers = given_for("llama", (1, 3, (2, 1), 8))
    ours, theirs = needing_grad(tensors), needing_grad(tensors)
    op.rotate(**ours, **numbers)[1].sum().backward()
    op.reference(**theirs, **numbers)[1].sum().backward()
    for name in ("qkv", "k_weight"):
        torch.testing.assert_close(ours[name].grad, theirs[name].grad)
    assert (ours["q_weight"].grad == 0).all()


@pytest.mark.usefixtures("in_triton")
def test_dtypes_that_differ_are_promoted_as_in_torch():
    """As under autocast: the product is in bfloat16, while norms and angles are in float32."""
    tensors, numbers = given_for("llama", (1, 3, (2, 1), 8))
    tensors["qkv"] = tensors["qkv"].half()
    for found, wanted in zip(op.rotate(**tensors, **numbers), op.reference(**tensors, **numbers), strict=True):
        assert found.dtype == wanted.dtype
        close(found, wanted, torch.float16, size=1.0)


def samples(kind, dtype):
    tensors, numbers = given_for(kind, (2, 2, (2, 1), 8), dtype)
    options = {"eps": 1e-6, "offset": 0.0, "rounds_first": True, **numbers}
    weights = {"q_weight": None, "k_weight": None, **tensors}
    if kind == "none":
        yield op._rotate, {**weights, **options, "copies": False}
    yield op._rotate, {**weights, **needing_grad(tensors), **options, "copies": True}
    cache = {name: tensor(2, 1, 5, 8, dtype=dtype) for name in ("keys", "values")}
    yield op._rotate_into, {**weights, **options, **cache, "position": torch.tensor(1, device=DEVICE)}


@pytest.mark.parametrize(("kind", "dtype"), [*zip(KINDS, DTYPES, strict=True)], ids=str)  # each takes two seconds
def test_the_operators_keep_their_promises(kind, dtype):
    for operator, arguments in samples(kind, dtype):
        torch.library.opcheck(operator, (), arguments)


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("trains", [False, True])
def test_compiled_in_one_piece(trains):
    compiled = torch.compile(op.rotate, fullgraph=True, backend="aot_eager")
    for tokens in (3, 5):
        tensors, numbers = given_for("llama", (2, tokens, (4, 2), 8))
        once, again = (needing_grad(tensors) if trains else tensors for _ in range(2))
        out, wanted = compiled(**once, **numbers), op.rotate(**again, **numbers)
        assert all(torch.equal(one, other) for one, other in zip(out, wanted, strict=True))
        if trains:
            sum(each.sum() for each in out).backward()
            sum(each.sum() for each in wanted).backward()
            for name in ("qkv", "q_weight", "k_weight"):
                assert torch.equal(once[name].grad, again[name].grad)


@pytest.mark.usefixtures("in_triton")
def test_a_cache_is_written_in_a_compiled_graph():
    tensors, numbers = given_for("none", (2, 1, (4, 2), 8))
    compiled = torch.compile(op.rotate_into, fullgraph=True, backend="aot_eager")
    caches = [[torch.zeros(2, 2, 6, 8, device=DEVICE) for _ in range(2)] for _ in range(2)]
    position = torch.tensor(2, device=DEVICE)
    found = compiled(*caches[0], position, **tensors, **numbers)
    assert torch.equal(found, op.rotate_into(*caches[1], position, **tensors, **numbers))
    assert all(torch.equal(one, other) for one, other in zip(*caches, strict=True))
    assert caches[0][0].abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cpu_it_is_the_reference(kind):
    tensors, numbers = given_for(kind, (2, 3, (4, 2), 8))
    tensors = {name: each.cpu() for name, each in tensors.items()}
    wanted = op.reference(**tensors, **numbers)
    assert all(torch.equal(one, other) for one, other in zip(op.rotate(**tensors, **numbers), wanted, strict=True))
    keys, values = torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 8)
    assert torch.equal(op.rotate_into(keys, values, torch.tensor(1), **tensors, **numbers), wanted[0])
    assert torch.equal(keys[:, :, 1:4], wanted[1])
    assert torch.equal(values[:, :, 1:4], wanted[2])


def test_a_head_that_is_rotated_in_part_is_refused():
    tensors, numbers = given_for("none", (2, 3, (4, 2), 8))
    tensors = {name: each[..., :4] if name in ("cos", "sin") else each for name, each in tensors.items()}
    with pytest.raises(ValueError, match="have 8 columns, and not 4"):
        op.rotate(**tensors, **numbers)


@pytest.mark.usefixtures("in_triton")
def test_autograd_notices_a_written_cache():
    tensors, numbers = given_for("none", (2, 1, (4, 2), 8))
    keys, values = (torch.zeros(2, 2, 6, 8, device=DEVICE) for _ in range(2))
    factor = torch.ones((), device=DEVICE, requires_grad=True)
    product = (factor * keys).sum()
    op.rotate_into(keys, values, torch.tensor(2, device=DEVICE), **tensors, **numbers)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
