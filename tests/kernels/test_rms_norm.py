"""RMS norms against a reference in float64: in Triton (its interpreter on a CPU), and in plain torch."""

import pytest
import torch
from drawn import DEVICE, DTYPES, close, few, tensor
from hypothesis import given
from hypothesis import strategies as st

import kernelgraft
from kernelgraft.kernels import rms_norm as op
from kernelgraft.kernels import rms_norm_backward_kernels

pytest.importorskip("triton")

KINDS = {"llama": {}, "gemma": {"offset": 1.0, "rounds_first": False}}
shapes = st.tuples(
    st.lists(st.integers(0, 5), max_size=2).map(tuple), st.sampled_from([1, 2, 7, 64, 96, 100, 128, 300, 1024])
).map(lambda drawn: (*drawn[0], drawn[1]))


def exactly(x, weight, eps, **kind):
    """In float64, with the roundings that belong to the formula left out."""
    return op.reference(x.double(), weight.double(), eps, **kind)


def size(x, weight, upstream, eps, **kind):
    """Of the terms that a gradient is the difference of, in a short row nearly all of it."""
    rstd = torch.rsqrt(x.detach().double().pow(2).mean(-1, keepdim=True) + eps)
    return (rstd * upstream * (kind.get("offset", 0.0) + weight.detach())).abs().amax() if x.numel() else 0.0


def exact_gradients(inputs, upstream, eps, **kind):
    wide = [each.detach().double().requires_grad_() for each in inputs]
    x, weight = (wide[0] + wide[1] if len(wide) == 3 else wide[0]), wide[-1]
    x_fp64 = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    outs = [x_fp64 * (kind.get("offset", 0.0) + weight), x][: len(upstream)]
    torch.autograd.backward(outs, [each.double() for each in upstream])
    return [each.grad for each in wide]


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes)
@few
def test_any_leading_shape(kind, dtype, shape):
    x, weight = tensor(*shape, dtype=dtype), tensor(shape[-1], dtype=dtype, seed=1, scale=0.2, offset=1)
    y = op.rms_norm(x, weight, 1e-6, **KINDS[kind])
    assert y.dtype == dtype
    close(y, exactly(x, weight, 1e-6, **KINDS[kind]), dtype)


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes)
@few
def test_gradients(kind, dtype, shape):
    x = tensor(*shape, dtype=dtype).requires_grad_()
    weight = tensor(shape[-1], dtype=dtype, seed=1, scale=0.2, offset=1).requires_grad_()
    upstream = tensor(*shape, dtype=dtype, seed=2)
    op.rms_norm(x, weight, 1e-5, **KINDS[kind]).backward(upstream)
    grad_x, grad_weight = exact_gradients([x, weight], [upstream], 1e-5, **KINDS[kind])
    close(x.grad, grad_x, dtype, shape[-1], size(x, weight, upstream, 1e-5, **KINDS[kind]))
    largest = (upstream * exactly(x.detach(), torch.ones_like(weight), 1e-5)).abs().amax() if x.numel() else 0.0
    close(weight.grad, grad_weight, dtype, max(x.numel() // shape[-1], 1), largest)


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes)
@few
def test_of_a_sum(dtype, shape):
    x, residual = (tensor(*shape, dtype=dtype, seed=seed).requires_grad_() for seed in (0, 3))
    weight = tensor(shape[-1], dtype=dtype, seed=1, scale=0.2, offset=1).requires_grad_()
    y, total = op.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    close(y, exactly(total, weight, 1e-6), dtype)
    upstream = [tensor(*shape, dtype=dtype, seed=seed) for seed in (4, 5)]
    torch.autograd.backward([y, total], upstream)
    wanted = exact_gradients([x, residual, weight], upstream, 1e-6)
    terms = size(total, weight, upstream[0], 1e-6)
    for each, exact in zip((x, residual, weight), wanted, strict=True):
        close(each.grad, exact, dtype, max(shape[-1], x.numel() // shape[-1], 1), terms)


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rounded_where_the_reference_rounds(kind, dtype):
    x, weight = tensor(40, 256, dtype=dtype), tensor(256, dtype=dtype, seed=1, scale=0.2, offset=1)
    same = op.rms_norm(x, weight, 1e-6, **KINDS[kind]) == op.reference(x, weight, 1e-6, **KINDS[kind])
    assert same.float().mean() > 0.99  # the order in which squares are added up shows in a few last bits


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize(
    "make",
    [lambda x: x[:, ::2], lambda x: x.transpose(0, 1), lambda x: x[..., 5:69], lambda x: x.mT],
    ids=["every other row", "batch and rows exchanged", "a slice of each row", "columns"],
)
def test_inputs_that_are_not_contiguous(make):
    base = tensor(6, 8, 96)
    x, weight = make(base), tensor(make(base).shape[-1], seed=1)
    close(op.rms_norm(x, weight, 1e-6), exactly(x, weight, 1e-6), torch.float32)
    leaf = base.clone().requires_grad_()
    upstream = make(tensor(6, 8, 96, seed=2))
    op.rms_norm(make(leaf), weight, 1e-6).backward(upstream)
    exact, _ = exact_gradients([x, weight], [upstream], 1e-6)
    close(make(leaf.grad), exact, torch.float32, x.shape[-1], size(x, weight, upstream, 1e-6))


@pytest.mark.usefixtures("in_triton")
def test_more_rows_than_programs():
    chosen = rms_norm_backward_kernels.settings(4000, 64, 3, False)
    assert chosen.num_programs * chosen.rows < 4000
    x, weight = tensor(4000, 64).requires_grad_(), tensor(64, seed=1).requires_grad_()
    upstream = tensor(4000, 64, seed=2)
    op.rms_norm(x, weight, 1e-6).backward(upstream)
    for each, exact in zip((x, weight), exact_gradients([x, weight], [upstream], 1e-6), strict=True):
        close(each.grad, exact, torch.float32, terms=4000)


@pytest.mark.usefixtures("in_triton")
def test_a_weight_in_float32_beside_bfloat16():
    x, weight = tensor(5, 64, dtype=torch.bfloat16), tensor(64, seed=1)
    for kind in KINDS.values():
        y, wanted = op.rms_norm(x, weight, 1e-6, **kind), op.reference(x, weight, 1e-6, **kind)
        assert y.dtype == wanted.dtype
        close(y, wanted, torch.bfloat16)


def samples(dtype):
    for needs_grad in (False, True):
        x, residual = (tensor(3, 2, 40, dtype=dtype, seed=seed).requires_grad_(needs_grad) for seed in (0, 1))
        weight = tensor(40, dtype=dtype, seed=2).requires_grad_(needs_grad)
        yield op._norm, (x, weight, 1e-6, 0.0, True)
        columns = x.detach().mT.requires_grad_(needs_grad)
        yield op._norm, (columns, tensor(2, dtype=dtype), 1e-6, 1.0, False)
        yield op._add_norm, (x, residual, weight, 1e-6, 0.0, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operators_keep_their_promises(dtype):
    for operator, arguments in samples(dtype):
        torch.library.opcheck(operator, arguments)


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("trains", [False, True])
def test_compiled_in_one_piece(trains):
    def both(x, residual, weight):
        y, total = op.add_rms_norm(x, residual, weight, 1e-6)
        return op.rms_norm(y, weight, 1e-6, 1.0, False) + total

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for tokens in (3, 5):
        given = [tensor(2, tokens, 32), tensor(2, tokens, 32, seed=1), tensor(32, seed=2)]
        once, again = ([each.clone().requires_grad_(trains) for each in given] for _ in range(2))
        out = compiled(*once)
        assert torch.equal(out, both(*again))
        if trains:
            out.sum().backward()
            both(*again).sum().backward()
            assert all(torch.equal(one.grad, other.grad) for one, other in zip(once, again, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cpu_it_is_the_reference(kind):
    x, weight = torch.randn(3, 5, 32), torch.randn(32)
    assert torch.equal(op.rms_norm(x, weight, 1e-6, **KINDS[kind]), op.reference(x, weight, 1e-6, **KINDS[kind]))
    y, total = op.add_rms_norm(x, x, weight, 1e-6, **KINDS[kind])
    assert torch.equal(total, 2 * x)
    assert torch.equal(y, op.reference(2 * x, weight, 1e-6, **KINDS[kind]))


def test_what_it_does_not_take_is_said():
    assert "rows have up to 32768 numbers, and not 40000" in op.RMSNormLayout.supports(torch.empty(2, 40000))
    assert "not torch.float64" in op.OffsetRMSNormLayout.supports(torch.empty(2, 4, dtype=torch.float64))
    assert op.RMSNormLayout.supports(torch.empty(2, 4, dtype=torch.bfloat16)) is True


@pytest.mark.transformers
def test_a_norm_is_told_by_what_it_does():
    import tiny

    found = {kind: op.kind_of(tiny.model(kind).get_submodule("model.norm")) for kind in ("llama", "qwen3", "gemma3")}
    llama, gemma = op.Kind(1e-6, 0.0, True), op.Kind(1e-6, 1.0, False)
    assert found == {"llama": llama, "qwen3": llama, "gemma3": gemma}
    for other in (
        torch.nn.LayerNorm(8),
        torch.nn.BatchNorm1d(8),
        torch.nn.Linear(8, 8),
        tiny.model("cohere").model.norm,
    ):
        with pytest.raises(ValueError, match=f"{type(other).__name__} does not compute the RMS norm of Llama"):
            op.kind_of(other)


class Odd(torch.nn.Module):
    """A norm that uses its epsilon in a way of its own."""

    def __init__(self, eps, rstd):
        super().__init__()
        self.weight, self.variance_epsilon, self.rstd = torch.nn.Parameter(torch.ones(8)), eps, rstd

    def forward(self, x):
        x_fp32 = x.float()
        rstd = self.rstd(x_fp32.pow(2).mean(-1, keepdim=True), self.variance_epsilon)
        return self.weight * (x_fp32 * rstd).to(x.dtype)


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-5, 1e-2])
def test_what_a_norm_does_with_its_epsilon_shows(eps):
    assert op.kind_of(Odd(eps, lambda mean, eps: torch.rsqrt(mean + eps))) == op.Kind(eps, 0.0, True)
    for rstd in (
        lambda mean, eps: torch.rsqrt(mean),
        lambda mean, eps: 1 / (mean.sqrt() + eps),
        lambda mean, eps: torch.rsqrt(mean.clamp_min(eps)),
        lambda mean, eps: torch.rsqrt(mean + 2 * eps),
    ):
        with pytest.raises(ValueError, match="Odd does not compute the RMS norm"):
            op.kind_of(Odd(eps, rstd))


MODELS = {"llama": ("RMSNorm", 5), "qwen3": ("RMSNorm", 9), "gemma3": ("OffsetRMSNorm", 13)}


@pytest.mark.transformers
@pytest.mark.parametrize("kind", MODELS)
def test_in_models(kind):
    import tiny

    kernel, count = MODELS[kind]
    with kernelgraft.graft(tiny.model(kind).to(DEVICE), {"RMSNorm": f"kernelgraft.kernels:{kernel}"}) as graft:
        assert len(graft.plan.sites) == count
        graft.verify(every_site=False).raise_for_failures()


@pytest.mark.transformers
@pytest.mark.parametrize("kind", MODELS)
def test_in_models_in_triton(kind, in_triton):
    import tiny

    kernel, count = MODELS[kind]
    model, grafted = tiny.model(kind).to(DEVICE), tiny.model(kind).to(DEVICE)
    with kernelgraft.graft(grafted, {"RMSNorm": f"kernelgraft.kernels:{kernel}"}) as graft:
        torch.testing.assert_close(tiny.logits(grafted, kind), tiny.logits(model, kind))
        assert graft.calls.kernel == count
        found, wanted = tiny.gradients(grafted, kind), tiny.gradients(model, kind)
        for name, grad in wanted.items():
            torch.testing.assert_close(found[name], grad, atol=2e-6, rtol=1e-4)
