"""torch.compile over grafted layers: whole graphs, no more of them than without a graft, and the same numbers."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import kernelgraft
import tiny
import toys
from kernelgraft import KernelConfig

pytestmark = pytest.mark.transformers

NUM_LAYERS = 8


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def logits_over_modes(run, model):
    """Logits over eval, train, eval, train."""
    found = []
    for mode in (model.eval, model.train) * 2:
        mode()
        found.append(tiny.logits(run))
    return found


def frames_of(model):
    """How many frames were compiled over eval, train, eval, train, and the logits; a graph break is an error."""
    torch._dynamo.reset()
    counter = CompileCounter()
    found = logits_over_modes(torch.compile(model, backend=counter, fullgraph=True), model)
    return counter.frame_count, found


@torch._dynamo.config.patch(recompile_limit=64)
def frames_of_layers(model):
    """The same with each layer compiled by itself; the layers of Qwen3 differ in their index."""
    torch._dynamo.reset()
    counter = CompileCounter()
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    found = logits_over_modes(model, model)
    return counter.frame_count, found


@pytest.fixture(scope="module")
def untouched():
    """Frames and logits of the model without a graft."""
    return frames_of(tiny.model("qwen3", num_hidden_layers=NUM_LAYERS))


def equal(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_eight_grafted_layers_compile_without_a_break_and_no_more_often(untouched):
    plain, expected = untouched
    assert plain == 2
    model = tiny.model("qwen3", num_hidden_layers=NUM_LAYERS)
    with kernelgraft.graft(model, tiny.guide_config()) as graft:
        count, found = frames_of(model)
        assert count == plain
        assert equal(found, expected)
        assert (graft.calls.kernel, graft.calls.reference) == (0, 0)
        assert graft.calls.traced >= 2


def test_layers_that_are_compiled_one_by_one_compile_no_more_often():
    plain, expected = frames_of_layers(tiny.model("qwen3", num_hidden_layers=3))
    model = tiny.model("qwen3", num_hidden_layers=3)
    with kernelgraft.graft(model, tiny.guide_config()) as graft:
        count, found = frames_of_layers(model)
        assert 0 < count <= plain
        assert equal(found, expected)
        assert graft.calls.traced > 0
        assert graft.calls.sites["model.layers.0.post_attention_layernorm"] == (0, 0)
        assert graft.calls.sites["model.norm"] == (4, 0)


def test_the_reference_compiles_too_and_no_more_often(untouched):
    plain, expected = untouched
    model = tiny.model("qwen3", num_hidden_layers=NUM_LAYERS)
    with kernelgraft.graft(model, tiny.guide_config()) as graft, graft.reference():
        count, found = frames_of(model)
        assert count == plain
        assert equal(found, expected)
        assert graft.calls.traced == 0


def test_a_compiled_model_sees_the_graft_come_and_go(untouched):
    _, expected = untouched
    model = tiny.model("qwen3", num_hidden_layers=NUM_LAYERS)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(tiny.logits(compiled), expected[0])
    with kernelgraft.graft(model, tiny.guide_config()) as graft:
        assert kernelgraft.graft_of(compiled) is graft
        assert torch.equal(tiny.logits(compiled), expected[0])
        assert graft.calls.traced > 0
        traced = graft.calls.traced
        with graft.reference():
            assert torch.equal(tiny.logits(compiled), expected[0])
        assert graft.calls.traced == traced
        assert torch.equal(tiny.logits(compiled), expected[0])
    assert torch.equal(tiny.logits(compiled), expected[0])


def test_gradients_through_aot_autograd_are_the_eager_ones():
    model = tiny.model("qwen3").train()
    with kernelgraft.graft(model, tiny.guide_config()) as graft:
        expected = tiny.gradients(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        out = compiled(**tiny.inputs("qwen3")).logits
        names, parameters = zip(*model.named_parameters(), strict=True)
        grads = torch.autograd.grad(out.float().pow(2).mean(), parameters)
        assert graft.calls.traced > 0
        for name, grad in zip(names, grads, strict=True):
            torch.testing.assert_close(grad, expected[name])


def test_gradients_of_the_reference_through_aot_autograd():
    model, x = toys.model().train(), toys.inputs()
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    by_name = dict(zip(dict(model.named_parameters()), expected, strict=True))
    config = KernelConfig({toys.FUSION: toys.kernel(toys.norm_mlp, toys.NormMLPLayout)})
    with kernelgraft.graft(model, config, example_inputs=x) as graft, graft.reference():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        parameters = dict(model.named_parameters())
        grads = torch.autograd.grad(compiled(x).square().sum(), list(parameters.values()))
        found = dict(zip(parameters, grads, strict=True))
    merged = [by_name[f"layers.0.mlp.{name}.weight"] for name in ("w1", "w2")]
    torch.testing.assert_close(found["layers.0.norm.w12"], torch.cat(merged))
    torch.testing.assert_close(found["layers.1.norm.w3"], by_name["layers.1.mlp.w3.weight"])


# --- kernels that cannot run everywhere


def graft_toy(model, kernel, **options):
    return kernelgraft.graft(model, KernelConfig({toys.FUSION: kernel}, **options), example_inputs=toys.inputs())


@pytest.mark.parametrize("layout", [toys.NormMLPLayout, toys.LaterHostLayout])
def test_a_call_that_the_kernel_refuses_is_traced_through_the_originals(layout):
    model, short, long = toys.model(), toys.inputs(), toys.inputs().repeat(1, 2, 1)
    expected = {id(x): model(x) for x in (short, long)}
    kernel = toys.kernel(toys.norm_mlp, layout, supports=staticmethod(toys.short_only))
    with graft_toy(model, kernel, fallback="reference"):
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
        for x in (short, long, short, long):
            torch.testing.assert_close(compiled(x), expected[id(x)])


def detaches(self, hidden_states):
    return toys.norm_mlp(self, hidden_states).detach()


def test_a_lost_gradient_is_not_lost_under_torch_compile_either():
    model, x = toys.model().train(), toys.inputs()
    expected = torch.autograd.grad(model(x).square().sum(), model.layers[0].mlp.w3.weight)[0]
    kernel = toys.kernel(detaches, toys.NormMLPLayout)
    with graft_toy(model, kernel, fallback="reference"):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        found = torch.autograd.grad(compiled(x).square().sum(), model.layers[0].norm.w3)[0]
        torch.testing.assert_close(found, expected)
        with torch.no_grad():
            compiled(x)
    with graft_toy(model, kernel):
        compiled = torch.compile(model, backend="eager")
        with pytest.raises(Exception, match="without a gradient"):
            compiled(x)


def test_modes_under_torch_compile_have_kernels_of_their_own():
    def times(factor):
        return toys.kernel(lambda self, hidden_states: factor * toys.norm_mlp(self, hidden_states), toys.NormMLPLayout)

    model, x = toys.model(), toys.inputs()
    block = model.layers[0]
    expected = block.mlp(block.norm(x))
    mapping = {
        "cpu": {
            "inference": times(2),
            "inference|torch_compile": times(3),
            "training": times(4),
            "training|torch_compile": "",
        }
    }
    with graft_toy(model, mapping):

        def run(x):
            return block.mlp(block.norm(x))

        compiled = torch.compile(run, backend="eager", fullgraph=True)
        for mode, eager, traced in ((model.eval, 2, 3), (model.train, 4, 1)) * 2:
            mode()
            torch.testing.assert_close(run(x), eager * expected)
            torch.testing.assert_close(compiled(x), traced * expected)


def test_a_stateless_kernel_compiles():
    def forward(self, hidden_states):
        return 2 * F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)

    model, x = toys.model(), toys.inputs()
    expected = model.norm(x)
    with kernelgraft.graft(model, KernelConfig({"Norm": toys.kernel(forward)})) as graft:
        compiled = torch.compile(model.norm, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), 2 * expected)
        assert graft.calls.traced == 1
