"""Products for few tokens against float64, with and without what can stand before and behind them."""

import dataclasses

import pytest
import torch
from drawn import DTYPES, close, few, tensor
from hypothesis import given
from hypothesis import strategies as st

from kernelgraft.kernels import activation, one_token_kernels
from kernelgraft.kernels import few_tokens as op
from kernelgraft.kernels import few_tokens_kernels as kernels

pytest.importorskip("triton")

shapes = st.tuples(
    st.sampled_from([(), (1,), (1, 1), (2,), (4,), (3, 2), (16,), (23,), (64,), (0, 3)]),
    st.sampled_from([1, 8, 33, 64]),
    st.sampled_from([16, 100, 128, 515]),
)


def operands(leading, columns, length, dtype, act="", norm=False, bias=False, residual=False):
    rows = 2 * columns if act else columns
    return {
        "x": tensor(*leading, length, dtype=dtype),
        "weight": tensor(rows, length, dtype=dtype, seed=1, scale=length**-0.5),
        "bias": tensor(rows, dtype=dtype, seed=2) if bias else None,
        "norm": op.Norm(tensor(length, dtype=dtype, seed=3, scale=0.2, offset=1), 1e-6) if norm else None,
        "act": act,
        "residual": tensor(*leading, columns, dtype=dtype, seed=4) if residual else None,
    }


def widened(given):
    wide = {name: each.double() if isinstance(each, torch.Tensor) else each for name, each in given.items()}
    norm = given["norm"]
    return {**wide, "norm": norm and norm._replace(weight=norm.weight.double())}


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    shape=shapes,
    act=st.sampled_from(["", "silu", "gelu", "gelu_tanh"]),
    norm=st.booleans(),
    bias=st.booleans(),
    residual=st.booleans(),
)
@few
def test_all_that_can_stand_before_and_behind(dtype, shape, act, norm, bias, residual):
    drawn = operands(*shape, dtype, act, norm, bias, residual)
    y, exact = op.product(**drawn), op.reference(**widened(drawn))
    assert y.dtype == dtype
    # Roundings on the way, of the normalized x and of the gate, come on top of that of the result.
    close(y, exact, dtype, size=2.0 + (exact.abs().amax() if exact.numel() else 0.0))


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_more_columns_than_a_program_has(tokens):
    drawn = operands((tokens,), 700, 64, torch.float32, "silu", norm=True)
    close(op.product(**drawn), op.reference(**widened(drawn)), torch.float32, terms=64, size=8.0)


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("splits", [2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_the_rows_are_added_up(monkeypatch, dtype, splits):
    """Also where the last parts are shorter than the others, or empty."""
    real = kernels.settings
    monkeypatch.setattr(kernels, "settings", lambda *given: dataclasses.replace(real(*given), splits=splits, length=64))
    for length, act, norm in ((515, "", True), (256, "gelu", False), (130, "silu", True)):
        drawn = operands((3,), 40, length, dtype, act, norm, bias=True, residual=True)
        exact = op.reference(**widened(drawn))
        y = op.product(**drawn)
        close(y, exact, dtype, terms=length, size=2.0 + exact.abs().amax())
        assert torch.equal(y, op.product(**drawn))


SIZES = [(6144, 1024), (1024, 3072), (24576, 4096), (4096, 12288), (28672, 8192), (8192, 28672), (151936, 1024)]


@pytest.mark.parametrize("shared", [220 << 10, 92 << 10])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("num_columns", "length"), SIZES)
def test_launches_fill_a_gpu(num_columns, length, itemsize, gated, shared):
    gates = 2 if gated else 1
    chosen = one_token_kernels.settings(num_columns, length, itemsize, gated, 132, shared, True)
    assert chosen.num_programs >= 132
    assert chosen.num_stages == 1 or gates * chosen.columns * chosen.length * itemsize * chosen.num_stages <= shared
    for num_tokens in range(2, 65):
        chosen = kernels.settings(num_tokens, num_columns, length, itemsize, gated, 132, shared, True)
        assert -(-num_columns // chosen.columns) * chosen.splits >= 64
        assert chosen.tokens >= num_tokens
        assert chosen.length * itemsize >= 128
        # A program fits; what the compiler takes is asked in test_compiled.py. On a smaller GPU the block that is
        # worked on is in registers.
        block = (gates * chosen.columns + chosen.tokens) * chosen.length * itemsize
        assert chosen.num_stages > 1
        assert block * chosen.num_stages <= 220 << 10
        assert block * (chosen.num_stages - 1) <= shared


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_all_at_once_or_rows_on_their_way(monkeypatch, dtype, once):
    """Also where the last rows are fewer than a program has at once, and some programs have none."""
    real = one_token_kernels.settings

    def changed(*given):
        return dataclasses.replace(real(*given), columns=4, num_programs=11 if once else 3, num_stages=1 if once else 3)

    monkeypatch.setattr(one_token_kernels, "settings", changed)
    for columns, length, act, norm in (
        (41, 100, "", True),
        (41, 128, "gelu", False),
        (42, 515, "silu", True),
        (9, 16, "", False),
    ):
        drawn = operands((1,), columns, length, dtype, act, norm, bias=True, residual=True)
        exact = op.reference(**widened(drawn))
        close(op.product(**drawn), exact, dtype, terms=length, size=2.0 + exact.abs().amax())


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("columns", [64, 256])
def test_weights_that_have_just_been_written(columns):
    """On a GPU a product begins before the kernel in front has ended, but not before a copy has."""
    given = operands((1,), columns, columns, torch.float32, norm=True, residual=True)
    versions = [(tensor(columns, columns, seed=each), tensor(columns, seed=each)) for each in range(6)]
    weight, norm, found = given["weight"], given["norm"], []
    for rows, scale in versions:
        weight.copy_(rows)
        norm.weight.copy_(scale)
        found.append(op.product(op.product(**given), weight, norm=norm))
    for (rows, scale), y in zip(versions, found, strict=True):
        wide = widened(given | {"weight": rows, "norm": norm._replace(weight=scale)})
        exact = op.reference(op.reference(**wide), wide["weight"], norm=wide["norm"])
        close(y, exact, torch.float32, terms=columns, size=2.0 + exact.abs().amax())


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_is_rounded_before_the_product(tokens, offset, dtype):
    """With a weight that only picks numbers, the product is the norm."""
    drawn = operands((tokens,), 64, 64, dtype, norm=True)
    drawn["norm"] = drawn["norm"]._replace(offset=offset, rounds_first=not offset)
    drawn["weight"] = torch.eye(64, dtype=dtype, device=drawn["x"].device)
    same = op.product(**drawn) == op.reference(**drawn)
    assert same.float().mean() > 0.98


@pytest.mark.usefixtures("in_triton")
def test_slices_of_larger_tensors():
    drawn = operands((3,), 20, 64, torch.float32, residual=True)
    wide = tensor(3, 2, 96, seed=7)
    drawn["x"], drawn["weight"] = wide[:, 1, 10:74], tensor(40, 100, seed=8)[::2, 3:67]
    drawn["residual"] = tensor(20, 3, seed=9).mT
    close(op.product(**drawn), op.reference(**widened(drawn)), torch.float32, terms=64, size=9.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ["", *activation.ACTIVATIONS])
def test_the_operator_keeps_its_promises(dtype, act):
    for tokens in (1, 5):
        drawn = operands((2, tokens), 8, 32, dtype, act, norm=True, bias=True, residual=True)
        arguments = (drawn["x"], drawn["weight"], drawn["bias"], *drawn["norm"], act, drawn["residual"])
        torch.library.opcheck(op._product, arguments)
    torch.library.opcheck(op._product, (drawn["x"], drawn["weight"], None, None, 0.0, 0.0, True, act, None))


def launched(monkeypatch):
    counts = []
    real = op.launch
    monkeypatch.setattr(op, "launch", lambda *args: counts.append(args[0].shape) or real(*args))
    return counts


@pytest.mark.usefixtures("in_triton")
def test_the_kernels_are_for_few_tokens_without_a_gradient(monkeypatch):
    counts = launched(monkeypatch)
    few_rows, many = operands((64,), 8, 32, torch.float32), operands((65,), 8, 32, torch.float32)
    op.product(**few_rows)
    assert len(counts) == 1
    close(op.product(**many), op.reference(**widened(many)), torch.float32, terms=32, size=4.0)
    few_rows["weight"].requires_grad_()
    op.product(**few_rows).sum().backward()
    assert few_rows["weight"].grad is not None
    assert len(counts) == 1
    with torch.no_grad():
        op.product(**few_rows)
    assert len(counts) == 2
    with torch.no_grad(), torch.autocast(few_rows["x"].device.type, torch.bfloat16):
        assert op.product(**few_rows).dtype == torch.bfloat16
    assert len(counts) == 2


@pytest.mark.usefixtures("in_triton")
def test_of_long_rows_half_as_many_tokens_are_few():
    for tokens, columns, taken in ((64, 2048, True), (32, 2049, True), (33, 2049, False), (64, 4096, False)):
        assert op.takes(tensor(tokens, columns)) is taken


@pytest.mark.usefixtures("in_triton")
def test_compiled_in_one_piece():
    drawn = operands((2, 3), 8, 32, torch.float32, "silu", norm=True)
    compiled = torch.compile(lambda **given: op.product(**given) + 1, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(**drawn), op.product(**drawn) + 1)


def test_on_a_cpu_it_is_the_reference():
    drawn = {
        name: each.cpu() if isinstance(each, torch.Tensor) else each
        for name, each in operands((2, 3), 8, 32, torch.float32, "silu", bias=True, residual=True).items()
    }
    assert torch.equal(op.product(**drawn), op.reference(**drawn))
