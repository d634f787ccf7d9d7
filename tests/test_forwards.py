"""Which forward runs: by mode, by what the kernel can take, by whether gradients flow; the original's where allowed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kernelgraft
import toys
from kernelgraft import Kernel, KernelConfig
from kernelgraft.errors import GraftError, PlanError


def times(factor, **flags):
    """The fused kernel, its output times a factor, so that one sees which one ran."""
    return toys.kernel(
        lambda self, hidden_states: factor * toys.norm_mlp(self, hidden_states), toys.NormMLPLayout, **flags
    )


def graft(model, mapping, **options):
    return kernelgraft.graft(model, KernelConfig(mapping, **options), example_inputs=toys.inputs())


def grads(model, x):
    out = model(x)
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(out.square().sum(), parameters.values()), strict=True))


def block_of(model, x):
    return model.layers[0].mlp(model.layers[0].norm(x))


# --- by mode


def test_train_and_eval_choose_the_kernel():
    model, x = toys.model(), toys.inputs()
    expected = block_of(model, x)
    mapping = {toys.FUSION: {"cpu": {"inference": times(2), "training": times(3)}}}
    with graft(model, mapping) as grafted:
        for _ in range(2):
            model.eval()
            assert torch.allclose(block_of(model, x), 2 * expected)
            model.train()
            assert torch.allclose(block_of(model, x), 3 * expected)
        assert grafted.calls.sites["layers.0.norm"] == (4, 0)
        model.layers[0].eval()
        assert torch.allclose(block_of(model, x), 2 * expected)


ONE_MODE = {toys.FUSION: {"cpu": {"inference": times(2)}}}


def test_a_mode_without_a_kernel_is_an_error_at_the_call():
    model, x = toys.model(), toys.inputs()
    with graft(model, ONE_MODE) as grafted:
        assert "runs in inference (Fast)" in str(grafted.plan)
        model.train()
        with pytest.raises(GraftError) as caught:
            model(x)
        text = str(caught.value)
        assert "At 'layers.0.norm' there is no kernel for training" in text
        assert 'fallback="reference"' in text
        model.eval()
        model(x)


def test_a_mode_without_a_kernel_runs_the_originals_under_a_fallback():
    model, x = toys.model(), toys.inputs()
    expected, expected_grads = model(x), grads(model, x)
    with graft(model, ONE_MODE, fallback="reference") as grafted:
        model.train()
        assert torch.equal(model(x), expected)
        assert grafted.calls.sites["layers.0.norm"] == (0, 1)
        found = grads(model, x)
        merged = [expected_grads[f"layers.0.mlp.{name}.weight"] for name in ("w1", "w2")]
        assert torch.equal(found["layers.0.norm.w12"], torch.cat(merged))
        assert torch.equal(found["layers.0.norm.scale"], expected_grads["layers.0.norm.weight"])
        assert torch.equal(found["norm.weight"], expected_grads["norm.weight"])


@pytest.mark.parametrize("target", [toys.FUSION, "Norm"])
def test_a_mode_that_the_config_leaves_alone_runs_the_originals(target):
    model, x = toys.model(), toys.inputs()
    expected = model(x)
    kernel = times(2) if target is toys.FUSION else Kernel(toys.FastNorm)
    with graft(model, {target: {"cpu": {"inference": kernel, "training": ""}}}) as grafted:
        model(x)
        ran = grafted.calls.kernel
        assert ran > 0
        model.train()
        assert torch.equal(model(x), expected)
        assert grafted.calls.kernel == ran


def test_use_kernels_false_removes_the_graft():
    model, x = toys.model(), toys.inputs()
    expected, modules, cls = model(x), dict(model.named_modules()), type(model)
    graft(model, {toys.FUSION: times(2)})
    assert model.use_kernels is True
    model.use_kernels = False
    assert kernelgraft.graft_of(model) is None
    assert type(model) is cls
    assert all(model.get_submodule(path) is module for path, module in modules.items())
    assert torch.equal(model(x), expected)


# --- gradients


def detaches(self, hidden_states):
    with torch.no_grad():
        return toys.norm_mlp(self, hidden_states)


def test_a_kernel_without_a_backward_is_not_used_in_training():
    model, x = toys.model(), toys.inputs()
    kernel = toys.kernel(detaches, toys.NormMLPLayout, has_backward=False)
    expected = grads(model, x)
    with graft(model, {toys.FUSION: kernel}, fallback="reference") as grafted:
        assert {use.training for use in grafted.plan.kinds[0].kernels} == {False}
        model.train()
        found = grads(model, x)
        assert torch.equal(found["layers.1.norm.w3"], expected["layers.1.mlp.w3.weight"])
        model.eval()
        with torch.no_grad():
            model(x)
        assert grafted.calls.sites["layers.0.norm"] == (1, 1)


def test_a_kernel_that_loses_the_gradient_is_an_error_where_gradients_are_asked_for():
    model, x = toys.model(), toys.inputs()
    with graft(model, {toys.FUSION: toys.kernel(detaches, toys.NormMLPLayout)}):
        with torch.no_grad():
            model(x)
        for _ in range(2):
            with pytest.raises(GraftError, match=r"'layers\.0\.norm'.*without a gradient"):
                model.train()(x)
        with torch.no_grad():
            model(x)


def test_a_kernel_that_loses_the_gradient_gives_way_to_the_originals_under_a_fallback():
    model, x = toys.model(), toys.inputs()
    expected, expected_grads = model(x), grads(model, x)
    kernel = toys.kernel(detaches, toys.NormMLPLayout)
    with graft(model, {toys.FUSION: kernel}, fallback="reference") as grafted:
        for _ in range(2):
            model.train()
            assert torch.equal(model(x), expected)
            assert torch.equal(grads(model, x)["layers.0.norm.w3"], expected_grads["layers.0.mlp.w3.weight"])
        assert grafted.calls.sites["layers.0.norm"] == (1, 4)
        with torch.no_grad():
            model(x)
        assert grafted.calls.sites["layers.0.norm"] == (2, 4)


class Frequencies(nn.Module):
    runs = 0

    @torch.no_grad()
    def forward(self, x):
        Frequencies.runs += 1
        return x.cos()


def test_an_output_that_never_had_a_gradient_needs_none():
    model, x = nn.Sequential(Frequencies()), toys.inputs().requires_grad_()
    kernel = toys.kernel(lambda self, x: x.detach().cos())
    before = Frequencies.runs
    with graft(model, {"Frequencies": kernel}) as grafted:
        for _ in range(3):
            assert torch.equal(model(x), x.cos())
        assert grafted.calls.sites == {"0": (3, 0)}
    assert Frequencies.runs == before + 1  # to see once that it has none


# --- what a kernel can take


@pytest.mark.parametrize("layout", [toys.NormMLPLayout, toys.LaterHostLayout])
def test_a_refused_call_runs_the_originals_of_all_members_and_the_next_one_the_kernel(layout):
    model, short, long = toys.model(), toys.inputs(), toys.inputs().repeat(1, 2, 1)
    expected = {id(x): model(x) for x in (short, long)}
    kernel = toys.kernel(toys.norm_mlp, layout, supports=staticmethod(toys.short_only))
    with graft(model, {toys.FUSION: kernel}, fallback="reference") as grafted:
        for x in (short, long, short, long, long, short):
            assert torch.allclose(model(x), expected[id(x)], atol=1e-6)
        (counts,) = set(grafted.calls.sites.values())
        assert counts == (3, 3)


def test_a_refused_call_is_an_error_without_a_fallback():
    model = toys.model()
    kernel = toys.kernel(toys.norm_mlp, toys.NormMLPLayout, supports=staticmethod(toys.short_only))
    with graft(model, {toys.FUSION: kernel}):
        model(toys.inputs())
        with pytest.raises(GraftError, match=r"'layers\.0\.norm': Fast refuses the call: 10 tokens are too many"):
            model(toys.inputs().repeat(1, 2, 1))


class ThreeBlock(nn.Module):
    """The host in the middle: one member before it and one behind."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp, self.post = toys.Norm(toys.H), toys.MLP(toys.H, toys.I), toys.Norm(toys.H)

    def forward(self, x):
        return self.post(self.mlp(hidden_states=self.norm(x)))


class ThreeLayout(toys.NormMLPLayout):
    packing = {**toys.NormMLPLayout.packing, "post": "post.weight"}
    host = "mlp"

    def __init__(self, norm, mlp, post):
        super().__init__(norm, mlp)
        self.post = nn.Parameter(torch.empty_like(post.weight))


def three(self, hidden_states):
    return F.rms_norm(toys.norm_mlp(self, hidden_states), self.post.shape, self.post, self.eps)


def test_a_host_in_the_middle_and_arguments_by_keyword():
    torch.manual_seed(0)
    model = ThreeBlock()
    for norm in (model.norm, model.post):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    short, long = toys.inputs(), toys.inputs().repeat(1, 2, 1)
    expected = {id(x): model(x) for x in (short, long)}
    pairs = (("Norm", "norm"), ("MLP", "mlp"), ("Norm", "post"))
    kernel = toys.kernel(three, ThreeLayout, supports=staticmethod(toys.short_only))
    with graft(model, {pairs: kernel}, fallback="reference") as grafted:
        assert grafted.plan.sites[0].host == "mlp"
        for x in (short, long, short):
            assert torch.allclose(model(x), expected[id(x)], atol=1e-6)
        assert grafted.calls.sites == {"mlp": (2, 1)}
        with grafted.reference():
            assert torch.equal(model(short), expected[id(short)])


class LostHostLayout(toys.NormMLPLayout):
    host = "attention"


def test_a_host_that_is_no_member_is_refused():
    with pytest.raises(PlanError, match=r"LostHostLayout\.host is 'attention', and the fusion's modules are norm, mlp"):
        graft(toys.model(), {toys.FUSION: toys.kernel(toys.norm_mlp, LostHostLayout)})


# --- by device


def test_the_kernels_change_with_the_device():
    model, x = toys.model(), toys.inputs()
    expected = block_of(model, x)
    mapping = {toys.FUSION: {"cpu": times(2), "cuda": {"inference": times(3), "training": ""}}}
    with graft(model, mapping) as grafted:
        grafted.moved_to(torch.device("cuda"))
        assert torch.allclose(block_of(model, x), 3 * expected)
        model.train()
        assert torch.allclose(block_of(model, x), expected)
        grafted.moved_to(torch.device("cpu"))
        assert torch.allclose(block_of(model, x), 2 * expected)


def test_a_device_without_a_kernel_is_an_error_before_the_model_moves():
    model, x = toys.model(), toys.inputs()
    expected = block_of(model, x)
    with graft(model, {toys.FUSION: {"cpu": times(2)}}) as grafted:
        with pytest.raises(GraftError, match="no kernel for 'cuda'"):
            grafted.moved_to(torch.device("cuda"))
        assert torch.allclose(block_of(model, x), 2 * expected)
    with graft(model, {toys.FUSION: {"cpu": times(2)}}, fallback="reference") as grafted:
        grafted.moved_to(torch.device("cuda"))
        assert torch.equal(block_of(model, x), expected)
        grafted.moved_to(torch.device("cpu"))
        assert torch.allclose(block_of(model, x), 2 * expected)


class OtherLayout(toys.NormMLPLayout):
    pass


def test_a_device_whose_kernel_packs_otherwise_is_an_error_before_the_model_moves():
    other = toys.kernel(toys.norm_mlp, OtherLayout)
    with (
        graft(toys.model(), {toys.FUSION: {"cpu": times(2), "cuda": other}}) as grafted,
        pytest.raises(GraftError, match="another layout"),
    ):
        grafted.moved_to(torch.device("cuda"))
