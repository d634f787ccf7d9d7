"""The MLPs, with a norm in front or without: numbers, gradients, what is kept for them, and in models."""

import pytest
import torch
from drawn import DEVICE, DTYPES, beside_the_originals, close, few, tensor
from hypothesis import given
from hypothesis import settings as of_hypothesis
from hypothesis import strategies as st

import kernelgraft
from kernelgraft.errors import PlanError
from kernelgraft.kernels import gated_mlp as op
from kernelgraft.kernels.few_tokens import Norm

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("few_are_four")

H, WIDTH = 32, 24
LLAMA, GEMMA = (1e-6, 0.0, True), (1e-6, 1.0, False)
few = of_hypothesis(few, max_examples=12)


def operands(tokens, dtype, norm, bias, requires_grad=True, hidden=H, width=WIDTH):
    drawn = [
        tensor(*tokens, hidden, dtype=dtype),
        tensor(hidden, dtype=dtype, seed=1, scale=0.2, offset=1) if norm else None,
        tensor(2 * width, hidden, dtype=dtype, seed=2, scale=1.7 * hidden**-0.5),
        tensor(2 * width, dtype=dtype, seed=3) if bias else None,
        tensor(hidden, width, dtype=dtype, seed=4, scale=1.7 * width**-0.5),
        tensor(hidden, dtype=dtype, seed=5) if bias else None,
        tensor(*tokens, hidden, dtype=dtype, seed=6),
    ]
    return [each if each is None else each.requires_grad_(requires_grad) for each in drawn]


def run(operands, act, kind=(1e-6, 0.0, True)):
    x, scale, gate_up, gate_up_bias, down, down_bias, residual = operands
    norm = None if scale is None else Norm(scale, *kind)
    return op.gated_mlp(x, gate_up, down, act, gate_up_bias, down_bias, norm, residual)


def exactly(operands, act, kind=(1e-6, 0.0, True)):
    wide = [each if each is None else each.detach().double().requires_grad_() for each in operands]
    x, scale, gate_up, gate_up_bias, down, down_bias, residual = wide
    if scale is not None:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + kind[0]) * (kind[1] + scale)
    return op.reference(op.reference(x, gate_up, gate_up_bias, None, act), down, down_bias, None, "", residual), wide


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("tokens", [(1,), (2, 2), (3, 4), (0, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize(
    ("act", "bias", "kind"),
    [("silu", False, LLAMA), ("gelu", False, GEMMA), ("gelu", True, LLAMA), ("gelu_tanh", True, GEMMA)],
)
def test_forward_and_backward(tokens, dtype, norm, act, bias, kind):
    check(operands(tokens, dtype, norm, bias), act, kind)


leading = st.one_of(st.just(()), st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple))


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    tokens=leading,
    hidden=st.sampled_from([9, 16, 33, 64, 130]),
    width=st.sampled_from([9, 24, 64, 131]),
    act=st.sampled_from([*op.activation.ACTIVATIONS]),
    norm=st.booleans(),
    bias=st.booleans(),
    kind=st.sampled_from([LLAMA, GEMMA]),
)
@few
def test_drawn_shapes(dtype, tokens, hidden, width, act, norm, bias, kind):
    check(operands(tokens, dtype, norm, bias, hidden=hidden, width=width), act, kind)


def check(drawn, act, kind):
    """Outputs with and without a gradient, and gradients, against the same in float64."""
    x, down = drawn[0], drawn[4]
    y = run(drawn, act, kind)
    assert y.dtype == x.dtype
    exact, wide = exactly(drawn, act, kind)
    terms = max(down.shape)
    size = exact.detach().abs().amax() if exact.numel() else 0.0  # what is added up may cancel
    close(y.detach(), exact.detach(), x.dtype, terms=terms, size=size)
    with torch.no_grad():
        close(run(drawn, act, kind), exact.detach(), x.dtype, terms=terms, size=size)
    upstream = tensor(*y.shape, dtype=x.dtype, seed=9)
    y.backward(upstream)
    exact.backward(upstream.double())
    for each, wider in zip(drawn, wide, strict=True):
        if each is not None:
            size = 2 * wider.grad.abs().amax() if wider.grad.numel() else 0.0
            close(each.grad, wider.grad, x.dtype, terms=terms + x.shape[:-1].numel(), size=size)


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (4,), (5,), (3, 6)], ids=str)
def test_only_gradients_that_are_wanted(wanted):
    drawn = operands((2, 4), torch.float32, True, True, requires_grad=False)
    for index in wanted:
        drawn[index].requires_grad_()
    run(drawn, "silu").sum().backward()
    exact, wide = exactly(drawn, "silu")
    exact.sum().backward()
    for index, each in enumerate(drawn):
        assert (each.grad is not None) == (index in wanted)
        if index in wanted:
            close(each.grad, wide[index].grad, torch.float32, terms=64, size=wide[index].grad.abs().amax())


@pytest.mark.usefixtures("in_triton")
def test_only_gate_and_up_wait_for_the_backward():
    drawn = operands((2, 4), torch.float32, True, False)
    kept = {}

    def pack(saved):
        kept[saved.data_ptr()] = saved.numel()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = run(drawn, "silu")
    own = sum(each.numel() for each in drawn[:-1] if each is not None)
    assert sum(kept.values()) == own + 8 * 2 * WIDTH
    y.sum().backward()


# Dynamo makes an instance itself, and means to hear nothing of it.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("tokens", [2, 7])
@pytest.mark.parametrize("trains", [False, True])
def test_compiled_in_one_piece(tokens, trains):
    once, again = (operands((tokens,), torch.float32, True, True, requires_grad=trains) for _ in range(2))
    out, wanted = torch.compile(run, fullgraph=True, backend="aot_eager")(once, "silu"), run(again, "silu")
    torch.testing.assert_close(out, wanted)
    if trains:
        out.sum().backward()
        wanted.sum().backward()
        for one, other in zip(once, again, strict=True):
            torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.usefixtures("in_triton")
def test_under_autocast_the_products_are_in_its_dtype():
    drawn = operands((2, 4), torch.float32, True, False)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = run(drawn, "silu")
    y.sum().backward()
    exact, _ = exactly(drawn, "silu")
    close(y.detach(), exact.detach(), torch.bfloat16, terms=H, size=20.0)
    assert drawn[2].grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operator_of_few_tokens_keeps_its_promises(dtype):
    for norm, bias in ((True, True), (False, False)):
        x, scale, gate_up, gate_up_bias, down, down_bias, residual = operands((3,), dtype, norm, bias, False)
        arguments = (x, gate_up, down, "silu", gate_up_bias, down_bias, scale, 1e-6, 0.0, True, residual)
        torch.library.opcheck(op._few, arguments)


def test_what_they_do_not_take_is_said():
    from kernelgraft.kernels.rms_norm_mlp import RMSNormMLPLayout

    assert "not torch.float64" in op.SwiGLUMLPLayout.supports(torch.empty(2, 4, dtype=torch.float64))
    assert "rows have up to 32768 numbers, and not 40000" in RMSNormMLPLayout.supports(torch.empty(2, 40000))
    assert op.GeGLUMLPLayout.supports(torch.empty(2, 40000)) is RMSNormMLPLayout.supports(torch.empty(2, 8)) is True


@pytest.mark.parametrize("act", op.activation.ACTIVATIONS)
@pytest.mark.parametrize(("width", "length"), [(7, 32), (8, 130), (48, 33), (77, 576), (301, 32)])
def test_on_a_cpu_it_is_the_original_bit_for_bit(act, width, length):
    for bias in (False, True):
        gate, up, down = (
            torch.nn.Linear(*sizes, bias=bias) for sizes in ((length, width), (length, width), (width, length))
        )
        both = torch.cat([gate.weight, up.weight]).detach().requires_grad_()
        biases = (torch.cat([gate.bias, up.bias]).detach(), down.bias) if bias else (None, None)
        for tokens in ((1,), (3,), (2, 7), (65,)):
            x = torch.randn(*tokens, length)
            wanted = down(op.activation.ACTIVATIONS[act](gate(x)) * up(x))
            y = op.gated_mlp(x, both, down.weight, act, *biases)
            assert torch.equal(y, wanted)
            (grad,) = torch.autograd.grad(y.sum(), both)
            assert torch.equal(grad, torch.cat(torch.autograd.grad(wanted.sum(), (gate.weight, up.weight))))


# --- in models

MLP = {"llama": "SwiGLUMLP", "qwen2": "SwiGLUMLP", "gemma3": "GeGLUMLP", "mistral": "SwiGLUMLP"}
FUSION = (("RMSNorm", "model.layers.*.post_attention_layernorm"), ("MLP", "model.layers.*.mlp"))
OF_GEMMA = (("RMSNorm", "model.layers.*.pre_feedforward_layernorm"), ("MLP", "model.layers.*.mlp"))
CASES = [
    *((kind, {"MLP": f"kernelgraft.kernels:{name}"}, {}) for kind, name in MLP.items()),
    ("llama", {"MLP": "kernelgraft.kernels:SwiGLUMLP"}, {"mlp_bias": True}),
    ("qwen3", {FUSION: "kernelgraft.kernels:RMSNormMLP"}, {}),
    ("llama", {FUSION: "kernelgraft.kernels:RMSNormMLP"}, {"mlp_bias": True}),
    ("gemma3", {OF_GEMMA: "kernelgraft.kernels:RMSNormMLP"}, {}),
    ("llama", {"MLP": "kernelgraft.kernels:GeGLUMLP"}, {"hidden_act": "gelu", "mlp_bias": True}),
    ("llama", {FUSION: "kernelgraft.kernels:RMSNormMLP"}, {"hidden_act": "gelu", "mlp_bias": True}),
]


@pytest.mark.transformers
@pytest.mark.parametrize(("kind", "config", "changes"), CASES)
def test_in_models(kind, config, changes, in_triton, monkeypatch):
    import tiny

    model, grafted = (tiny.model(kind, **changes).to(DEVICE) for _ in range(2))
    with kernelgraft.graft(grafted, config) as graft:
        torch.testing.assert_close(tiny.logits(grafted, kind), tiny.logits(model, kind))
        assert graft.calls.kernel == len(graft.plan.sites) == 2
        found, wanted = tiny.gradients(grafted, kind), tiny.gradients(model, kind)
        for _, grad, exact in beside_the_originals(found, graft, wanted):
            torch.testing.assert_close(grad, exact, atol=2e-6, rtol=1e-4)
        monkeypatch.undo()
        if DEVICE == "cpu":
            assert torch.equal(tiny.logits(grafted, kind), tiny.logits(model, kind))


@pytest.mark.transformers
@pytest.mark.parametrize("case", [1, 5, 7])
def test_verified(case):
    import tiny

    kind, config, changes = CASES[case]
    graft = kernelgraft.graft(tiny.model(kind, **changes).to(DEVICE), config)
    graft.verify(every_site=False).raise_for_failures()


@pytest.mark.transformers
def test_another_activation_is_refused():
    import tiny

    with pytest.raises(PlanError, match=r"activation has to be gelu or gelu_tanh, and its act_fn is ClippedGELU"):
        kernelgraft.graft(tiny.model("llama", hidden_act="gelu_10"), {"MLP": "kernelgraft.kernels:GeGLUMLP"})

    with pytest.raises(PlanError, match=r"activation has to be gelu or gelu_tanh, and its act_fn is .*which is silu"):
        kernelgraft.graft(tiny.model("llama"), {"MLP": "kernelgraft.kernels:GeGLUMLP"})
    with pytest.raises(PlanError, match=r"activation has to be silu, and its act_fn is ReLU\(\)"):
        kernelgraft.graft(tiny.model("llama", hidden_act="relu"), {"MLP": "kernelgraft.kernels:SwiGLUMLP"})
