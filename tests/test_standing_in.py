"""A grafted module in the place of the original: its class, its attributes, and who else may replace its forward."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kernelgraft
import toys
from kernelgraft import Kernel, KernelConfig
from kernelgraft.errors import PlanError

kernels = pytest.importorskip("kernels")


def graft(model, mapping, **options):
    return kernelgraft.graft(model, KernelConfig(mapping, **options), example_inputs=toys.inputs())


# --- kernels without a layout


def doubled(self, hidden_states):
    return 2 * F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


def test_a_stateless_kernel_runs_in_this_model_alone():
    model, other, x = toys.model(), toys.model(), toys.inputs()
    expected, weight, module = model.norm(x), model.norm.weight, model.norm
    with graft(model, {"Norm": toys.kernel(doubled)}) as grafted:
        assert torch.allclose(model.norm(x), 2 * expected)
        assert torch.equal(other.norm(x), expected)
        assert torch.equal(toys.Norm(toys.H)(x), F.rms_norm(x, (toys.H,), eps=1e-6))
        assert grafted.calls.kernel == 1
        assert model.norm is module
        assert model.norm.weight is weight
        assert isinstance(model.norm, toys.Norm)
        assert "kernel=Fast" in repr(model.norm)
        with grafted.reference():
            assert torch.equal(model.norm(x), expected)
    assert type(model.norm) is toys.Norm
    assert "_kernelgraft" not in vars(model.norm)
    assert torch.equal(model.norm(x), expected)


@kernels.use_kernel_forward_from_hub("ToyActivation")
class Activation(nn.Module):
    def forward(self, x):
        return F.silu(x)


REPOSITORY = """
import torch
from torch import nn

class Twice(nn.Module):
    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

class layers:
    Twice = Twice
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twice")
    build = folder / "build" / "torch-universal"
    build.mkdir(parents=True)
    (build / "__init__.py").write_text(REPOSITORY)
    metadata = {
        "name": "twice",
        "id": "_twice_of_kernelgrafts_tests",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (build / "metadata.json").write_text(json.dumps(metadata))
    return folder


def test_a_module_that_is_marked_for_the_kernels_library_is_found_by_its_mark(repository):
    model, other, x = nn.Sequential(Activation()), nn.Sequential(Activation()), toys.inputs()
    uses = [f"{repository}:Twice", kernels.LocalLayerRepository(repository, layer_name="Twice")]
    for use in uses:
        with graft(model, {"ToyActivation": use}) as grafted:
            assert torch.equal(model(x), 2 * x)
            assert torch.equal(other(x), F.silu(x))
            assert grafted.calls.kernel == 1
        assert torch.equal(model(x), F.silu(x))


def test_kernelize_afterwards_keeps_off(repository):
    model, x = nn.Sequential(Activation(), Activation()), toys.inputs()
    once = (("ToyActivation", "0"), ("ToyActivation", "1"))

    class Pair(nn.Module):
        def __init__(self, first, second):
            super().__init__()

    four_times = toys.kernel(lambda self, x: 4 * x)
    mapping = {"ToyActivation": {"cpu": kernels.LocalLayerRepository(repository, layer_name="Twice")}}
    for entries in ({"ToyActivation": four_times}, {once: toys.kernel(lambda self, x: 16 * x, Pair)}):
        with graft(model, entries):
            with kernels.use_kernel_mapping(mapping):
                kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
            assert torch.equal(model(x), 16 * x)
        assert torch.equal(model(x), F.silu(F.silu(x)))
    with kernels.use_kernel_mapping(mapping):
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
    with pytest.raises(PlanError, match="'0' has a forward of its own"):
        graft(model, {"ToyActivation": four_times})


# --- names that both the layout and the original have


class Odd(nn.Module):
    """Says in its class what layouts say in their instances."""

    scale = "a constant"
    blocks = 7

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), 3.0))
        self.only_here = "the original's"

    @property
    def eps(self):
        return "a property"

    def table(self):
        return "a method"

    def helper(self):
        return f"helped by {type(self).__name__}"

    def forward(self, x):
        return self.weight * x


class OddLayout(nn.Module):
    packing = {"scale": "weight"}

    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(dim))
        self.eps = 0.5
        self.blocks = 8
        self.register_buffer("table", torch.ones(dim), persistent=False)


def test_the_layouts_names_win_over_the_originals_class():
    def forward(self, x):
        assert self.eps == 0.5
        assert self.blocks == 8
        return self.scale * x + self.table

    with kernelgraft.recorded():
        model = nn.Sequential(Odd(toys.H))
    with graft(model, {"Odd": toys.kernel(forward, OddLayout)}):
        module = model[0]
        assert isinstance(module, Odd)
        assert torch.equal(model(toys.inputs()), 3 * toys.inputs() + 1)
        assert module.only_here == "the original's"
        assert module.helper() == "helped by Odd"
        module.eps = 0.25
        assert vars(module)["eps"] == 0.25
        with torch.no_grad():
            module.scale.fill_(5.0)
        model.to(torch.float64)
        assert module.table.dtype == module.scale.dtype == torch.float64
        module.scale = nn.Parameter(torch.full((toys.H,), 6.0))
        assert dict(model.named_parameters())["0.scale"] is module.scale
        assert torch.equal(model.state_dict()["0.weight"], module.scale)
    assert model[0].scale == "a constant"
    assert model[0].eps == "a property"
    assert torch.equal(model[0].weight, torch.full((toys.H,), 6.0))


# --- classes that do not combine


class Narrow(toys.FastNormLayout, toys.Norm):
    def __init__(self, dim, eps=1e-6):
        nn.Module.__init__(self)
        self.scale = nn.Parameter(torch.ones(dim))
        self.eps = eps


def test_a_layout_may_derive_from_the_originals_class():
    model, x = toys.model(), toys.inputs()
    expected = model(x)
    with graft(model, {"Norm": Kernel(toys.FastNorm, Narrow)}):
        assert torch.equal(model(x), expected)


class Meta(type):
    pass


class Strict(nn.Module, metaclass=Meta):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, hidden_states):
        return hidden_states


class OtherMeta(type):
    pass


class StrictLayout(nn.Module, metaclass=OtherMeta):
    packing = {"scale": "weight"}

    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.eps = 1e-6


class Mixin:
    pass


class MixedFirst(Mixin, nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, hidden_states):
        return hidden_states


class MixedLastLayout(nn.Module, Mixin):
    packing = {"scale": "weight"}

    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.eps = 1e-6


@pytest.mark.parametrize(("original", "layout"), [(Strict, StrictLayout), (MixedFirst, MixedLastLayout)])
def test_classes_that_do_not_combine_are_refused(original, layout):
    with kernelgraft.recorded():
        model = nn.Sequential(original(toys.H))
    with pytest.raises(PlanError) as caught:
        graft(model, {original.__name__: Kernel(toys.FastNorm, layout)})
    text = str(caught.value)
    assert f"{layout.__name__} cannot stand where a {original.__name__} stood" in text
    assert "Derive the layout from torch.nn.Module alone" in text
    assert type(model[0]) is original


# --- what was set on the instance


class Switched(toys.Norm):
    gradient_checkpointing = False
    factor = 1.0


def test_switches_on_the_instance_are_carried_and_handed_back():
    with kernelgraft.recorded():
        model = nn.Sequential(Switched(toys.H), Switched(toys.H))
    model[0].factor = 2.0

    def forward(self, hidden_states):
        return self.factor * hidden_states * self.scale

    with graft(model, {"Norm": toys.kernel(forward, toys.FastNormLayout)}):
        assert torch.equal(model(toys.inputs()), 2 * toys.inputs())
        model[0].factor = 4.0
        model[0].gradient_checkpointing = True
        assert torch.equal(model(toys.inputs()), 4 * toys.inputs())
    assert [module.factor for module in model] == [4.0, 1.0]
    assert [module.gradient_checkpointing for module in model] == [True, False]
    assert "gradient_checkpointing" not in vars(model[1])


def test_an_absorbed_module_says_who_absorbed_it():
    model = toys.model()
    with graft(model, {toys.FUSION: Kernel(toys.NormMLP)}):
        absorbed = model.layers[0].mlp
        assert isinstance(absorbed, toys.MLP)
        assert "absorbed by layers.0.norm" in repr(absorbed)
        x = toys.inputs()
        assert absorbed(x) is x
        assert absorbed(hidden_states=x) is x
        assert absorbed(x, "more", further=1) is x
