"""The backward kernels of RMS norm against float64, in Triton: where rows are few, and where they are many."""

import pytest
import torch
from drawn import DTYPES, close, few, tensor
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("triton")

from kernelgraft.kernels import add_rows
from kernelgraft.kernels import rms_norm_backward_kernels as op

EPS = 1e-5
KINDS = {"llama": (0.0, True), "gemma": (1.0, False), "offset, rounded": (1.0, True), "not rounded": (0.0, False)}
COLUMNS = [1, 2, 7, 64, 100, 130, 300, 1024]
LAUNCHED = (op._backward_few_rows, op._backward_rows, add_rows._add_rows)


@pytest.fixture
def multiprocessors(monkeypatch):
    """Has rows launched as on a device with so many of them; the interpreter's are 3."""
    real = op.settings

    def have(number):
        monkeypatch.setattr(op, "settings", lambda rows, columns, _, overlaps: real(rows, columns, number, overlaps))

    return have


@pytest.fixture
def launched():
    """Names of the kernels that are launched, in their order."""
    names = []
    for kernel in LAUNCHED:
        kernel.add_pre_run_hook(lambda *args, name=kernel.__name__, **kwargs: names.append(name))
    yield names
    for kernel in LAUNCHED:
        kernel.pre_run_hooks.clear()


def strided(*shape, stride, **made):
    """Rows that are dense, with something else between them."""
    return tensor(*shape[:-1], shape[-1] + stride, **made)[..., : shape[-1]]


def inputs(rows, columns, dtype, adds, stride=0):
    """grad_y, grad_sum, x, weight and rstd."""
    grad_y, x, grad_sum = (strided(rows, columns, stride=each * stride, dtype=dtype, seed=each) for each in (1, 2, 3))
    weight = tensor(columns, dtype=dtype, seed=4, scale=0.2, offset=1)
    return grad_y, grad_sum if adds else None, x, weight, torch.rsqrt(x.float().pow(2).mean(-1) + EPS)


def exactly(grad_y, grad_sum, x, weight, offset):
    """In float64, with nothing rounded."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * (offset + weight)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad_y.double())
    return grad_x if grad_sum is None else grad_x + grad_sum.double(), grad_weight


def check(given, offset, rounds_first):
    """Both gradients, and that the same bits come out again."""
    grad_y, _, x, weight, rstd = given
    found = op.launch_backward(*given, offset, rounds_first)
    again = op.launch_backward(*given, offset, rounds_first)
    exact = exactly(*given[:4], offset)
    normalized = (rstd[:, None] * x).double()
    sizes = rstd[:, None] * grad_y * (offset + weight), normalized * grad_y
    for grad, same, wanted, size, terms, like in zip(
        found, again, exact, sizes, (x.shape[-1], x.shape[0]), (x, weight), strict=True
    ):
        assert torch.equal(grad, same)
        assert (grad.dtype, grad.is_contiguous()) == (like.dtype, True)
        close(grad, wanted, grad.dtype, terms, size.abs().amax().double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(st.integers(1, 40), st.sampled_from(COLUMNS), st.sampled_from([5, 20, 40]), st.booleans(), st.integers(0, 9))
@example(20, 100, 20, True, 3)
@example(21, 100, 20, True, 3)
@few
def test_drawn_rows_on_both_sides_of_few(kind, dtype, multiprocessors, rows, columns, number, adds, stride):
    multiprocessors(number)
    check(inputs(rows, columns, dtype, adds, stride), *KINDS[kind])


@pytest.mark.parametrize(("rows", "columns"), [(70, 64), (132, 100), (9, 9000)])
def test_more_rows_and_columns_than_a_program_has_at_once(multiprocessors, rows, columns):
    multiprocessors(132)
    chosen = op.settings(rows, columns, 132, False)
    assert isinstance(chosen, op.FewRows)
    assert chosen.block_rows < rows or chosen.block_columns < columns
    check(inputs(rows, columns, torch.float32, True, stride=3), 0.0, True)


@pytest.mark.parametrize("rows", [12, 13])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_gradient_of_the_weight_takes_what_was_rounded(multiprocessors, dtype, rows):
    multiprocessors(12)
    grad_y, _, x, weight, rstd = inputs(rows, 96, dtype, False)
    normalized = x.float() * rstd[:, None]
    sums = {}
    for rounds_first, factor in ((True, normalized.to(dtype)), (False, normalized)):
        _, sums[rounds_first] = op.launch_backward(grad_y, None, x, weight.float(), rstd, 0.0, rounds_first)
        close(sums[rounds_first], (grad_y.double() * factor.double()).sum(0), torch.float32, terms=rows, size=1.0)
    assert (sums[True] - sums[False]).abs().max() > 100 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(
    ("rows", "names"), [(6, ["_backward_few_rows"]), (7, ["_backward_rows", "_add_rows"])], ids=["few", "many"]
)
def test_few_rows_take_one_launch_and_many_two(multiprocessors, launched, rows, names, adds):
    multiprocessors(6)
    given = inputs(rows, 64, torch.float32, adds)
    for _ in range(2):
        launched.clear()
        op.launch_backward(*given, 0.0, True)
        assert launched == names


def test_no_rows_take_none(launched):
    given = inputs(0, 64, torch.float32, False)
    grad_x, grad_weight = op.launch_backward(*given, 0.0, True)
    assert grad_x.shape == (0, 64)
    assert torch.equal(grad_weight, torch.zeros_like(given[3]))
    assert not launched


def test_few_are_no_more_than_a_program_each():
    chosen = op.settings(32, 4096, 132, True)
    assert isinstance(chosen, op.FewRows)
    assert (chosen.num_programs, chosen.block_rows, chosen.block_columns) == (32 + 64, 32, 64)
    for columns in (1, 64, 100, 4096, 5000, 32768):
        for rows in (1, 3, 131, 132):
            chosen = op.settings(rows, columns, 132, True)
            assert isinstance(chosen, op.FewRows)
            assert (chosen.num_programs - rows - 1) * chosen.block_columns < columns
            assert (chosen.num_programs - rows) * chosen.block_columns >= columns
            assert chosen.block_rows * chosen.block_columns <= 4096
        assert not isinstance(op.settings(133, columns, 132, True), op.FewRows)
