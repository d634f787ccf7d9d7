"""How a layout is made: with which arguments, without memory, and what it computes besides its parameters."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kernelgraft
import toys
from kernelgraft import Kernel, KernelConfig
from kernelgraft.errors import PlanError


def graft(model, target, kernel):
    return kernelgraft.graft(model, KernelConfig({target: kernel}), example_inputs=toys.inputs())


def norm_kernel(layout):
    return Kernel(toys.FastNorm, layout)


def refusal(model, target, kernel):
    with pytest.raises(PlanError) as caught:
        graft(model, target, kernel)
    return str(caught.value)


# --- arguments


class NoEpsLayout(nn.Module):
    packing = {"scale": "weight"}
    eps = 1e-6

    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))


class NeedsMoreLayout(NoEpsLayout):
    def __init__(self, dim, eps, device_mesh):
        super().__init__(dim)


class FromModuleLayout(NoEpsLayout):
    @classmethod
    def from_module(cls, module):
        made = cls(module.weight.shape[0])
        made.eps = module.eps
        return made


class NoLayoutFromModule(NoEpsLayout):
    @classmethod
    def from_module(cls, module):
        return module.weight.shape


class RaisesLayout(NoEpsLayout):
    def __init__(self, dim, eps):
        raise LookupError("no table for this size")


def test_a_layout_gets_what_the_originals_init_got():
    with kernelgraft.recorded():
        model = nn.Sequential(toys.Norm(toys.H, eps=0.25))
    expected = model(toys.inputs())
    with graft(model, "Norm", norm_kernel(toys.FastNormLayout)) as grafted:
        assert model[0].eps == 0.25
        assert torch.equal(model(toys.inputs()), expected)
        assert grafted.calls.kernel == 1


def test_an_argument_that_the_layout_does_not_take_may_only_be_the_default():
    graft(toys.model(), "Norm", norm_kernel(NoEpsLayout))
    with kernelgraft.recorded():
        model = nn.Sequential(toys.Norm(toys.H, eps=0.25))
    text = refusal(model, "Norm", norm_kernel(NoEpsLayout))
    assert "does not take 'eps' = 0.25" in text
    assert "NoEpsLayout(dim)" in text
    assert "Norm(dim, eps=1e-06), built with (dim=8, eps=0.25)" in text


def test_a_layout_that_needs_more_is_refused_with_both_signatures():
    text = refusal(toys.model(), "Norm", norm_kernel(NeedsMoreLayout))
    assert "needs 'device_mesh', which Norm does not have" in text
    assert "NeedsMoreLayout(dim, eps, device_mesh)" in text
    assert "Norm(dim, eps=1e-06)" in text
    assert "from_module" in text


def test_a_layout_whose_init_raises_is_refused_with_what_it_got():
    text = refusal(toys.model(), "Norm", norm_kernel(RaisesLayout))
    assert "RaisesLayout(8, 1e-06) raised LookupError: no table for this size" in text


class TwoArgumentsLayout(toys.NormMLPLayout):
    def __init__(self, norm):
        super().__init__(norm, norm)


def test_a_fusions_layout_that_takes_fewer_modules_is_refused():
    text = refusal(toys.model(), toys.FUSION, toys.kernel(toys.norm_mlp, TwoArgumentsLayout))
    assert "TwoArgumentsLayout(Norm, MLP) raised TypeError" in text
    assert "takes the fused modules in the order of the config's tuple" in text


def test_without_recorded_arguments_the_way_out_is_named():
    model = nn.Sequential(toys.Norm(toys.H))
    text = refusal(model, "Norm", norm_kernel(toys.FastNormLayout))
    assert "FastNormLayout wants what Norm.__init__ got" in text
    assert "kernelgraft.recorded()" in text
    assert "from_module" in text


def test_from_module_needs_no_recording_and_wins():
    for make in (lambda: nn.Sequential(toys.Norm(toys.H, eps=0.25)), lambda: toys.model()):
        model = make()
        expected = model(toys.inputs())
        with graft(model, "Norm", norm_kernel(FromModuleLayout)) as grafted:
            assert torch.equal(model(toys.inputs()), expected)
            assert grafted.calls.kernel
    text = refusal(toys.model(), "Norm", norm_kernel(NoLayoutFromModule))
    assert "NoLayoutFromModule.from_module returned a Size, not a layout" in text


@pytest.mark.transformers
def test_a_live_transformers_model_is_rebuilt_to_learn_the_arguments():
    import tiny

    model = tiny.model("qwen3", rms_norm_eps=0.125)
    config = model.config.to_dict()
    with graft(model, "RMSNorm", f"{tiny.EXAMPLE}:CustomRMSNorm"):
        assert {layer.input_layernorm.variance_epsilon for layer in model.model.layers} == {0.125}
    assert model.config.to_dict() == config


@pytest.mark.transformers
def test_a_module_that_was_swapped_after_the_model_was_built_is_not_guessed_at():
    import tiny

    model = tiny.model("qwen3")
    model.model.norm = type(model.model.norm)(16, eps=0.5)
    text = refusal(model, "RMSNorm", f"{tiny.EXAMPLE}:CustomRMSNorm")
    assert "was not recorded" in text


# --- making it


class HoldsRandomLayout(toys.NormMLPLayout):
    """Does what published layouts do: allocates, initializes and computes in its `__init__`."""

    def __init__(self, norm, mlp):
        super().__init__(norm, mlp)
        nn.init.normal_(self.w12)
        self.register_buffer("inverse", 1.0 / (1e4 ** (torch.arange(0, 8, 2) / 8)), persistent=False)
        self.table = torch.linspace(0, 1, 5)
        self.inner = nn.Module()
        self.inner.noise = torch.randn(4)


def test_what_a_layout_computes_has_values_and_the_random_state_is_where_it_was():
    model = toys.model()
    expected = model(toys.inputs())
    random_state = torch.get_rng_state()
    with graft(model, toys.FUSION, toys.kernel(toys.norm_mlp, HoldsRandomLayout)):
        assert torch.equal(torch.get_rng_state(), random_state)
        host = model.layers[1].norm
        assert torch.equal(host.inverse, 1.0 / (1e4 ** (torch.arange(0, 8, 2) / 8)))
        assert torch.equal(host.table, torch.linspace(0, 1, 5))
        assert host.inner.noise.device.type == "cpu"
        assert torch.equal(model(toys.inputs()), expected)
        assert not any("inverse" in name for name in model.state_dict())
        model.to(torch.float64)
        assert host.inverse.dtype == torch.float64


class FromWeightsLayout(toys.NormMLPLayout):
    def __init__(self, norm, mlp):
        super().__init__(norm, mlp)
        self.row_sums = mlp.w1.weight.detach().sum(1)


def test_what_is_computed_from_weights_cannot_be_had_while_planning():
    config = KernelConfig({toys.FUSION: toys.kernel(toys.norm_mlp, FromWeightsLayout)})
    with pytest.raises(PlanError) as caught:
        kernelgraft.plan(toys.model(), config)
    text = str(caught.value)
    assert "FromWeightsLayout.row_sums is made from a member's tensors" in text
    assert "make it a parameter with a rule" in text


class KeepsNormLayout(nn.Module):
    packing = {"w12": ["mlp.w1.weight", "mlp.w2.weight"]}

    def __init__(self, norm, mlp):
        super().__init__()
        self.norm, self.w3 = norm, mlp.w3
        self.w12 = nn.Parameter(torch.empty(2 * mlp.w1.out_features, mlp.w1.in_features))


def keeps_norm(self, hidden_states):
    gate, up = F.linear(self.norm(hidden_states), self.w12).chunk(2, dim=-1)
    return self.w3(F.silu(gate.contiguous()) * up)


def test_a_layout_may_keep_members_and_their_submodules_whole():
    model = toys.model()
    expected, names = model(toys.inputs()), list(model.state_dict())
    scale, down = model.layers[0].norm.weight, model.layers[0].mlp.w3.weight
    with graft(model, toys.FUSION, toys.kernel(keeps_norm, KeepsNormLayout)) as grafted:
        assert torch.equal(model(toys.inputs()), expected)
        assert grafted.calls.kernel == 2
        assert model.layers[0].norm.norm.weight is scale
        assert model.layers[0].norm.w3.weight is down
        assert list(model.state_dict()) == names
        assert model.state_dict()["layers.0.norm.weight"].data_ptr() == scale.data_ptr()
    assert model.layers[0].norm.weight is scale
    assert torch.equal(model(toys.inputs()), expected)


class ChildLayout(nn.Module):
    """Renames nothing: what no rule names is filled by its own name."""

    def __init__(self, dim, inner):
        super().__init__()
        self.w1, self.w2 = nn.Linear(dim, inner, bias=False), nn.Linear(dim, inner, bias=False)
        self.w3 = nn.Linear(inner, dim, bias=False)


def test_parameters_that_no_rule_names_keep_their_names():
    model = toys.model()
    expected = model(toys.inputs())
    with graft(model, "MLP", toys.kernel(toys.MLP.forward, ChildLayout)) as grafted:
        assert grafted.names["layers.1.mlp.w2.weight"] == ("layers.1.mlp.w2.weight",)
        assert torch.equal(model(toys.inputs()), expected)
        assert grafted.calls.kernel == 2


def test_packed_parameters_take_dtype_and_requires_grad_of_their_sources():
    model = toys.model().to(torch.bfloat16)
    model.layers[0].requires_grad_(False)
    with graft(model, toys.FUSION, toys.kernel(toys.norm_mlp, toys.NormMLPLayout)):
        packed = dict(model.named_parameters())
        assert {p.dtype for p in packed.values()} == {torch.bfloat16}
        assert not packed["layers.0.norm.w12"].requires_grad
        assert packed["layers.1.norm.w12"].requires_grad
