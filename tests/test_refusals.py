"""What a graft must not touch: each is refused, with the path and with what to do instead."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import distribute_tensor, init_device_mesh
from torch.nn.utils import parametrizations

import kernelgraft
import toys
from kernelgraft import Kernel, KernelConfig
from kernelgraft.errors import PlanError
from kernelgraft.planner import Subject, make_blueprint
from kernelgraft.refusals import check_sources_agree

FUSED = {toys.FUSION: Kernel(toys.NormMLP)}


def refusal(model, mapping=None, **options):
    """The text of the refusal, the same from `plan` and from `graft`; the model still runs as before."""
    texts = set()
    for attempt in (kernelgraft.plan, kernelgraft.graft):
        with pytest.raises(PlanError) as caught:
            attempt(model, KernelConfig(mapping or FUSED, **options))
        texts.add(str(caught.value))
    assert kernelgraft.graft_of(model) is None
    (text,) = texts
    return text


def said(text, *parts):
    return [part for part in parts if part not in text] == []


# --- hooks and forwards


@pytest.mark.parametrize(
    "add",
    [
        lambda module: module.register_forward_hook(lambda *_: None),
        lambda module: module.register_forward_pre_hook(lambda *_: None),
        lambda module: module.register_full_backward_hook(lambda *_: None),
        lambda module: module.register_full_backward_pre_hook(lambda *_: None),
    ],
)
@pytest.mark.parametrize("path", ["layers.1.norm", "layers.1.mlp", "layers.1.mlp.w1"])
def test_hooks_of_members_and_inside_them(add, path):
    model = toys.model()
    handle = add(model.get_submodule(path))
    assert said(refusal(model), repr(path), "hooks", "Remove the hooks before grafting")
    handle.remove()
    kernelgraft.graft(model, FUSED)


def test_hooks_of_a_module_that_is_replaced_alone_go_on_running():
    model = toys.model()
    seen = []
    model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    with kernelgraft.graft(model, {"Norm": Kernel(toys.FastNorm)}):
        out = model(toys.inputs())
    assert [id(each) for each in seen] == [id(out)]


def test_a_forward_on_the_instance():
    model = toys.model()
    model.layers[0].mlp.forward = lambda x: x
    assert said(refusal(model), "'layers.0.mlp'", "a forward of its own", "Undo what put it there")


def test_a_forward_that_accelerate_put_there_is_taken_over():
    hooks = pytest.importorskip("accelerate.hooks")
    model = toys.model()
    expected = model(toys.inputs())
    hooks.add_hook_to_module(model.layers[0].norm, hooks.AlignDevicesHook("cpu"))
    with kernelgraft.graft(model, FUSED) as graft:
        assert torch.equal(model(toys.inputs()), expected)
        assert graft.calls.kernel == 2
        assert hasattr(model.layers[0].norm, "_hf_hook")
    assert torch.equal(model(toys.inputs()), expected)


def test_offloaded_weights():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(toys.model(), torch.device("cpu"))
    assert said(refusal(model), "'layers.0.norm' is offloaded", "Graft before offloading")


def test_weights_without_values():
    model = toys.model()
    model.layers[1].mlp.w3.to("meta")
    with pytest.raises(PlanError) as caught:
        kernelgraft.graft(model, FUSED)
    assert said(str(caught.value), "layers.1.mlp.w3.weight", "no values", "kernelgraft.from_pretrained")


# --- weights that are not plain


def test_parametrized_weights():
    model = toys.model()
    parametrizations.orthogonal(model.layers[0].mlp.w2)
    assert said(refusal(model), "'layers.0.mlp.w2' is parametrized (weight)", "remove_parametrizations")


def test_adapted_weights():
    peft = pytest.importorskip("peft")
    model = toys.model()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["w1"], r=2), model)
    assert said(refusal(model), "'layers.0.mlp.w1' is adapted", "merge_and_unload")


def test_weights_of_integers():
    model = toys.model()
    weight = nn.Parameter(torch.zeros(toys.I, toys.H, dtype=torch.int8), requires_grad=False)
    model.layers[0].mlp.w1.weight = weight
    assert said(refusal(model), "layers.0.mlp.w1.weight", "torch.int8", "leave this module out")


class Quantized(torch.Tensor):
    pass


def test_weights_that_are_a_tensor_subclass():
    model = toys.model()
    model.layers[0].mlp.w1.weight = nn.Parameter(torch.zeros(toys.I, toys.H).as_subclass(Quantized))
    assert said(refusal(model), "layers.0.mlp.w1.weight is a Quantized", "load the model unquantized")


class QuantizedLinear(nn.Linear):
    __module__ = "torchao.quantization.linear"


def test_modules_of_a_quantization_library():
    model = toys.model()
    model.layers[0].mlp.w1 = QuantizedLinear(toys.H, toys.I)
    assert said(refusal(model), "'layers.0.mlp.w1' is quantized", "QuantizedLinear", "Load the model unquantized")


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_weights_that_are_distributed(mesh):
    model = toys.model()
    linear = model.layers[0].mlp.w1
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh))
    assert said(refusal(model), "layers.0.mlp.w1.weight is a DTensor", "Graft before the model is distributed")


# --- devices


def test_a_device_map_that_cuts_a_site():
    subject = Subject(toys.model(), live=False, arguments=lambda path: None)
    subject.device_of = lambda name: torch.device("cuda", int("layers.1.mlp" in name))
    with pytest.raises(PlanError) as caught:
        make_blueprint(subject, KernelConfig(FUSED))
    assert said(str(caught.value), "'layers.1.norm'", "layers.1.mlp.w1.weight: cuda:1", "on one device")
    subject.device_of = lambda name: torch.device("cuda", int("layers.1" in name))
    assert len(make_blueprint(subject, KernelConfig(FUSED)).plan.sites) == 2


def test_sources_on_two_devices():
    tensors = {"a.w1": torch.zeros(1), "a.w2": torch.zeros(1)}
    with pytest.raises(PlanError, match=r"a\.w12 .* differ in device \(a\.w1: cpu, a\.w2: cuda:0\)"):
        check_sources_agree(
            "a", "w12", tensors, dict.fromkeys(tensors, torch.float32), {"a.w1": "cpu", "a.w2": "cuda:0"}
        )


# --- tied weights


def test_a_merged_weight_that_is_tied():
    model = toys.model()
    model.layers[0].mlp.w1.weight = model.layers[1].mlp.w1.weight
    assert said(refusal(model), "layers.0.mlp.w1.weight is shared with layers.1.mlp.w1.weight", "untie the weights")
    model = toys.model()
    model.layers[0].mlp.w1.weight = model.layers[0].mlp.w2.weight
    assert said(refusal(model), "layers.0.mlp.w1.weight is shared with layers.0.mlp.w2.weight", "untie the weights")


def test_a_weight_that_is_tied_and_packed_whole_stays_tied():
    model = toys.model()
    model.layers[0].mlp.w3.weight = model.layers[1].mlp.w3.weight
    with kernelgraft.graft(model, FUSED):
        assert model.layers[0].norm.w3 is model.layers[1].norm.w3
    assert model.layers[0].mlp.w3.weight is model.layers[1].mlp.w3.weight


class TransposedLayout(nn.Module):
    packing = {"weight": {"sources": "weight", "operations": [["transpose", 0, 1]]}}

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))


class Transposed(nn.Module):
    def forward(self, input):
        return input @ self.weight


@pytest.mark.transformers
@pytest.mark.parametrize("load", [True, False])
def test_tied_embeddings(load, checkpoint):
    import tiny

    mapping = {"Linear": Kernel(Transposed, TransposedLayout)}
    if load:
        folder = checkpoint("qwen3", tie_word_embeddings=True)
        with pytest.raises(PlanError) as caught:
            kernelgraft.AutoModelForCausalLM.from_pretrained(
                folder, kernel_config=KernelConfig(mapping, inherit_mapping=False)
            )
        text = str(caught.value)
    else:
        text = refusal(tiny.model("qwen3", tie_word_embeddings=True), mapping)
    assert said(text, "lm_head.weight is shared with model.embed_tokens.weight (tied weights)", "untie")


# --- outputs that are recorded


class BlockLayout(nn.Module):
    def __init__(self, *members):
        super().__init__()
        self.members = nn.ModuleList(members)


class Block(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return self.members[1](self.members[0](hidden_states), *args, **kwargs)


@pytest.mark.transformers
@pytest.mark.parametrize(("kind", "target"), [("qwen3", "attentions"), ("qwen3_moe", "router_logits")])
def test_outputs_that_the_config_asks_to_record(kind, target):
    import tiny

    members = [("RMSNorm", "input_layernorm"), ("Attention", "self_attn")]
    if target == "router_logits":
        members = [("RMSNorm", "post_attention_layernorm"), ("SparseMoeBlock", "mlp")]

    class Layout(BlockLayout):
        def __init__(self, norm, block):
            super().__init__(norm, block)

    mapping = {tuple((name, f"model.layers.*.{child}") for name, child in members): Kernel(Block, Layout)}
    model = tiny.model(kind, **{f"output_{target}": True})
    text = refusal(model, mapping)
    assert said(text, f"The config asks for {target!r}", f"'model.layers.0.{members[1][1]}", f"output_{target} off")
    setattr(model.config, f"output_{target}", False)
    kernelgraft.graft(model, mapping)


# --- and once more


def test_a_model_that_is_grafted_already():
    model = toys.model()
    first = kernelgraft.graft(model, FUSED)
    for attempt in (kernelgraft.plan, kernelgraft.graft):
        with pytest.raises(PlanError, match=r"grafted already.*graft_of\(model\)\.remove\(\)"):
            attempt(model, {"Norm": Kernel(toys.FastNorm)})
        with pytest.raises(PlanError, match="grafted already"):
            attempt(model.layers[0], {"Norm": Kernel(toys.FastNorm)})
    assert first.is_applied
    first.remove()
    kernelgraft.graft(model, {"Norm": Kernel(toys.FastNorm)})
