"""What a plan proves before anything changes: every parameter filled once, none lost, and nothing touched."""

import gc
import sys

import pytest
import torch
from torch import nn

import kernelgraft
import toys
from kernelgraft import Kernel, KernelConfig
from kernelgraft.errors import ConversionError, KernelError, PlanError
from kernelgraft.sites import trace_program


def norm_kernel(layout):
    return Kernel(toys.FastNorm, layout)


def fusion(layout=toys.NormMLPLayout, **flags):
    return toys.kernel(toys.norm_mlp, layout, "NormMLP", **flags)


def plan_of(model, mapping):
    return kernelgraft.plan(model, KernelConfig(mapping), example_inputs=toys.inputs())


def refusal(model, mapping, error=PlanError):
    """The text of the refusal, which left nothing behind, neither at the plan nor at the graft."""
    before, random_state = toys.state(model), torch.get_rng_state()
    texts = set()
    for attempt in (kernelgraft.plan, kernelgraft.graft):
        with pytest.raises(error) as caught:
            attempt(model, KernelConfig(mapping), example_inputs=toys.inputs())
        texts.add(str(caught.value))
    assert toys.state(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    (text,) = texts
    return text


# --- every packed parameter is filled, every original used


class TwoScalesLayout(toys.FastNormLayout):
    def __init__(self, dim, eps=1e-6):
        super().__init__(dim, eps)
        self.shift = nn.Parameter(torch.zeros(dim))


class BufferLayout(toys.FastNormLayout):
    def __init__(self, dim, eps=1e-6):
        super().__init__(dim, eps)
        self.register_buffer("table", torch.zeros(3))


class WrongShapeLayout(toys.FastNormLayout):
    def __init__(self, dim, eps=1e-6):
        super().__init__(dim, eps)
        self.scale = nn.Parameter(torch.zeros(2 * dim))


class MisspeltLayout(toys.FastNormLayout):
    packing = {"scle": "weight"}


class UnknownSourceLayout(toys.FastNormLayout):
    packing = {"scale": "wieght"}


class TwiceWrittenLayout(toys.NormMLPLayout):
    packing = {**toys.NormMLPLayout.packing, "w12": ["mlp.w1.weight", "mlp.w1.weight"]}


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (TwoScalesLayout, ["TwoScalesLayout.shift [8]", "'layers.0.norm'", "Add a rule"]),
        (BufferLayout, ["BufferLayout.table [3]", "'layers.0.norm'", "Add a rule"]),
        (WrongShapeLayout, ["WrongShapeLayout.scale", "'layers.0.norm'", "[16]", "[8]", "Correct the rule"]),
        (MisspeltLayout, ["MisspeltLayout make scle", "'layers.0.norm'", "It has: scale"]),
    ],
)
def test_a_layout_that_the_originals_do_not_fill_is_refused(layout, said):
    text = refusal(toys.model(), {"Norm": norm_kernel(layout)})
    assert [part for part in said if part not in text] == []


def test_a_rule_over_a_name_that_the_site_lacks_is_refused_with_the_nearest():
    text = refusal(toys.model(), {"Norm": norm_kernel(UnknownSourceLayout)}, ConversionError)
    assert "wieght" in text
    assert "did you mean weight" in text


class ForgetsLayout(toys.NormMLPLayout):
    packing = {"scale": "norm.weight", "w12": toys.NormMLPLayout.packing["w12"]}

    def __init__(self, norm, mlp):
        super().__init__(norm, mlp)
        del self.w3


def test_an_original_that_no_rule_uses_is_refused():
    text = refusal(toys.model(), {toys.FUSION: fusion(ForgetsLayout)})
    assert "layers.0.mlp.w3.weight would be lost" in text
    assert "dropped = ('mlp.w3.weight',)" in text
    assert "layers.0.mlp.w2.weight would be lost" in refusal(toys.model(), {toys.FUSION: fusion(TwiceWrittenLayout)})


class DropsLayout(ForgetsLayout):
    dropped = ("mlp.w3.weight",)


def test_an_original_that_the_layout_drops_by_name_stays_in_the_state_dict():
    model = toys.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def first_half(self, hidden_states):
        return toys.F.linear(hidden_states * self.scale, self.w12)[..., : toys.H]

    mapping = {toys.FUSION: toys.kernel(first_half, DropsLayout)}
    with kernelgraft.graft(model, KernelConfig(mapping), example_inputs=toys.inputs()) as graft:
        assert "drops   mlp.w3.weight" in str(graft.plan)
        assert graft.plan.kinds[0].dropped == ("1.w3.weight",)
        assert graft.names["layers.0.mlp.w3.weight"] == ()
        model(toys.inputs())
        grafted = model.state_dict()
        assert list(grafted) == list(before)
        assert all(torch.equal(grafted[name], before[name]) for name in before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- sources that are merged must agree


def halved(model):
    model.layers[1].mlp.w2.to(torch.bfloat16)


def frozen(model):
    model.layers[1].mlp.w2.weight.requires_grad_(False)


@pytest.mark.parametrize(("change", "what"), [(halved, "dtype"), (frozen, "requires_grad")])
def test_merged_sources_that_differ_are_refused(change, what):
    model = toys.model()
    change(model)
    text = refusal(model, {toys.FUSION: fusion()})
    assert f"layers.1.norm.w12 would be packed from parameters that differ in {what}" in text
    assert "layers.1.mlp.w2.weight" in text
    assert "Make them agree" in text


def test_a_parameter_packed_alone_may_differ_from_the_others():
    model = toys.model()
    model.layers[0].norm.weight.requires_grad_(False)
    with kernelgraft.graft(model, KernelConfig({toys.FUSION: fusion()}), example_inputs=toys.inputs()):
        host = model.layers[0].norm
        assert not host.scale.requires_grad
        assert host.w12.requires_grad


# --- entries that want the same


def test_entries_that_overlap_are_refused():
    one = (("Norm", "layers.0.norm"), ("MLP", "layers.0.mlp"))
    text = refusal(toys.model(), {toys.FUSION: fusion(), one: fusion()})
    assert "'layers.0.norm' is asked for twice" in text
    assert "Keep one" in text


def test_fusions_claim_first_and_single_modules_get_the_rest():
    found = plan_of(toys.model(), {"Norm": norm_kernel(toys.FastNormLayout), toys.FUSION: fusion()})
    hosts = {found.kinds[site.kind].layout: [] for site in found.sites}
    for site in found.sites:
        hosts[found.kinds[site.kind].layout].append(site.host)
    assert hosts == {"NormMLPLayout": ["layers.0.norm", "layers.1.norm"], "FastNormLayout": ["norm"]}


def test_an_entry_whose_modules_are_all_fused_is_listed():
    found = plan_of(toys.model(), {"MLP": toys.kernel(toys.MLP.forward), toys.FUSION: fusion()})
    assert [(r.target, r.reason) for r in found.rejected] == [
        ("MLP", "entries with paths have taken all of its modules over")
    ]


def test_one_module_at_two_paths_is_refused():
    model = toys.model()
    model.layers[1].norm = model.layers[0].norm
    text = refusal(model, {"Norm": norm_kernel(toys.FastNormLayout)})
    assert "'layers.0.norm' is one module that stands at several paths (layers.0.norm, layers.1.norm)" in text


def test_a_function_for_modules_and_a_fusion_without_a_layout_are_refused():
    text = refusal(toys.model(), {"Norm": lambda x: x}, KernelError)
    assert "Norm names modules, and its kernel is a function" in text
    assert "no layout" in refusal(toys.model(), {toys.FUSION: toys.kernel(toys.norm_mlp)}, KernelError)


class OtherLayout(toys.FastNormLayout):
    pass


def test_modes_with_different_layouts_are_refused():
    mapping = {"cpu": {"inference": norm_kernel(toys.FastNormLayout), "training": norm_kernel(OtherLayout)}}
    text = refusal(toys.model(), {"Norm": mapping})
    assert "different layouts (FastNormLayout, OtherLayout)" in text


def test_no_kernel_for_the_device_is_refused_or_listed_under_a_fallback():
    mapping = {"Norm": {"cuda": norm_kernel(toys.FastNormLayout)}}
    assert "the config has no kernel for 'cpu'" in refusal(toys.model(), mapping)
    found = kernelgraft.plan(toys.model(), KernelConfig(mapping, fallback="reference"))
    assert found.sites == ()
    assert found.rejected[0].place == "layers.{0..1}.norm, norm"


# --- what is worked out once


def test_rules_are_run_once_for_a_kind(monkeypatch):
    traced = []

    def counted(rules, made, paths, *args):
        traced.append(tuple(paths))
        return trace_program(rules, made, paths, *args)

    monkeypatch.setattr("kernelgraft.sites.trace_program", counted)
    model = toys.model(num_layers=12)
    model.layers[7] = toys.Block(toys.H, 2 * toys.I)
    found = plan_of(model, {"Norm": norm_kernel(toys.FastNormLayout), toys.FUSION: fusion()})
    assert (len(found.sites), len(found.kinds)) == (13, 3)
    assert sorted(traced) == [("layers.0.norm", "layers.0.mlp"), ("layers.7.norm", "layers.7.mlp"), ("norm",)]


# --- nothing changes


def test_a_plan_changes_nothing_and_does_not_move_the_random_state():
    model = toys.model()
    before, random_state = toys.state(model), torch.get_rng_state()
    plan_of(model, {"Norm": norm_kernel(toys.FastNormLayout), toys.FUSION: fusion()})
    assert toys.state(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)


class FailsLateLayout(toys.FastNormLayout):
    """Can be made while the graft is planned, and no more when its values are wanted."""

    made_on_cpu = 0

    def __init__(self, dim, eps=1e-6):
        super().__init__(dim, eps)
        self.table = torch.ones(dim)
        FailsLateLayout.made_on_cpu += self.table.device.type == "cpu"
        if FailsLateLayout.made_on_cpu > 1:
            raise RuntimeError("out of tables")


def test_an_error_in_the_middle_of_a_graft_leaves_the_model_as_it_was():
    model = toys.model()
    before = toys.state(model)
    mapping = {toys.FUSION: fusion(), "Norm": norm_kernel(FailsLateLayout)}
    with pytest.raises(PlanError, match="out of tables"):
        kernelgraft.graft(model, KernelConfig(mapping), example_inputs=toys.inputs())
    assert without_bytes(toys.state(model)) == without_bytes(before)
    assert torch.equal(model(toys.inputs()), toys.model()(toys.inputs()))


def without_bytes(found):
    """What stands where, without the storages and versions of tensors: what was packed has been unpacked."""

    def told(value):
        if isinstance(value, dict):
            return {name: told(inner) for name, inner in value.items()}
        return (value[0], *value[3:]) if isinstance(value, tuple) else value

    return {path: (cls, told(held)) for path, (cls, held) in found.items()}


# --- rules of Transformers over full names


def by_rules(prefix):
    """The norm + MLP kernel with rules that hold at `^<prefix>layers.<n>.` only; `prefix` may name one layer."""
    loading = pytest.importorskip("transformers.core_model_loading")
    layer = prefix if prefix.endswith(".") and prefix[-2].isdigit() else rf"{prefix}layers\.(\d+)."
    norm = f"^{layer}post_attention_layernorm"
    target = layer.replace("\\.", ".").replace(r"(\d+)", r"\1") + "post_attention_layernorm"

    class Layout(nn.Module):
        conversion_mapping = [
            loading.WeightRenaming(rf"{norm}\.weight", f"{target}.scale"),
            loading.WeightRenaming(rf"^{layer}mlp\.down_proj\.weight", f"{target}.w3"),
            loading.WeightConverter(
                [rf"^{layer}mlp\.gate_proj\.weight", rf"^{layer}mlp\.up_proj\.weight"],
                f"{target}.w12",
                [loading.Concatenate(dim=0)],
            ),
        ]

        def __init__(self, norm, mlp):
            super().__init__()
            inner, dim = mlp.gate_proj.weight.shape
            self.eps = norm.variance_epsilon
            self.scale = nn.Parameter(torch.ones(dim))
            self.w12 = nn.Parameter(torch.empty(2 * inner, dim))
            self.w3 = nn.Parameter(torch.empty(dim, inner))

    return fusion(Layout)


@pytest.mark.transformers
@pytest.mark.parametrize("rules", ["model.", ""])
@pytest.mark.parametrize("base", [False, True])
def test_rules_hold_with_and_without_the_prefix_of_the_base_model(rules, base):
    import tiny

    model = tiny.model("qwen3")
    inner = model.model if base else model
    expected = inner(**tiny.inputs("qwen3"))[0].detach()
    with kernelgraft.graft(inner, KernelConfig({tiny.FUSION: by_rules(rules.replace(".", r"\."))})) as graft:
        assert len(graft.plan.sites) == 2
        assert torch.allclose(inner(**tiny.inputs("qwen3"))[0], expected, atol=1e-5)
        assert graft.calls.kernel == 2


@pytest.mark.transformers
def test_a_rule_that_names_one_layer_serves_that_layer_and_no_other():
    import tiny

    model = tiny.model("qwen3")
    first = tuple((name, pattern.replace("*", "0")) for name, pattern in tiny.FUSION)
    kernel = by_rules(r"model\.layers\.0.")
    sites = kernelgraft.plan(model, KernelConfig({first: kernel})).sites
    assert [site.host for site in sites] == ["model.layers.0.post_attention_layernorm"]
    text = refusal(model, {tiny.FUSION: kernel})
    assert "Nothing fills Layout.scale [32] at 'model.layers.1.post_attention_layernorm'" in text


# --- the random state


@pytest.mark.transformers
@pytest.mark.parametrize("work", [kernelgraft.plan, kernelgraft.graft])
def test_no_garbage_is_looked_for_while_the_random_state_is_asked_for(work):
    """Torch holds the generator's lock there: Python code that a collection runs may let another thread wait for it."""
    import tiny

    model, config, seen = tiny.model("qwen3"), tiny.guide_config(), []

    def note(*_):
        frame = sys._getframe(1)
        while frame is not None:
            seen.extend(["collection"] if frame.f_code.co_name == "get_rng_state" else [])
            frame = frame.f_back

    before = gc.get_threshold()
    gc.callbacks.append(note)
    gc.set_threshold(1, 1, 1)
    try:
        work(model, config)
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(note)
    assert seen == []
