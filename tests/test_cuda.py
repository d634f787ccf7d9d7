"""What only a GPU shows. The suite runs on CPU; on a machine with CUDA these run as well."""

import pytest
import torch
import transformers

import kernelgraft
import tiny
from kernelgraft import graft_of
from kernelgraft.errors import PlanError

pytestmark = [
    pytest.mark.transformers,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

GUIDE = tiny.guide_config()


def load(folder, **kwargs):
    return kernelgraft.AutoModelForCausalLM.from_pretrained(folder, kernel_config=GUIDE, **kwargs)


def plain_load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def logits(model):
    inputs = {name: tensor.cuda() for name, tensor in tiny.inputs("qwen3").items()}
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("device_map", ["cuda", "auto", {"": 0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_load_to_the_gpu(device_map, dtype, qwen3_folder):
    model = load(qwen3_folder, device_map=device_map, dtype=dtype)
    plain = plain_load(qwen3_folder, device_map=device_map, dtype=dtype)
    assert all(parameter.is_cuda for parameter in model.parameters())
    assert graft_of(model).plan.device == "cuda"
    torch.testing.assert_close(logits(model), logits(plain))
    assert graft_of(model).calls.reference == 0
    with graft_of(model).reference():
        assert torch.equal(logits(model), logits(plain))
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    graft_of(model).remove()
    assert torch.equal(logits(model), logits(plain))


def test_a_grafted_model_goes_to_the_gpu_and_back(qwen3_folder):
    model = plain_load(qwen3_folder)
    kernelgraft.graft(model, GUIDE)
    expected = tiny.logits(model)
    model.to("cuda")
    torch.testing.assert_close(logits(model), logits(plain_load(qwen3_folder).to("cuda")))
    assert torch.equal(tiny.logits(model.to("cpu")), expected)


WHERE = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")


def test_layers_that_are_offloaded_to_the_cpu(qwen3_folder):
    device_map = {**dict.fromkeys(WHERE, 0), "model.layers.1": "cpu"}
    model, plain = load(qwen3_folder, device_map=device_map), plain_load(qwen3_folder, device_map=device_map)
    torch.testing.assert_close(logits(model), logits(plain))
    assert graft_of(model).calls.reference == 0


def test_a_site_that_a_device_map_cuts_is_refused(qwen3_folder):
    rest = ("self_attn", "input_layernorm", "post_attention_layernorm")
    device_map = {
        **dict.fromkeys((*WHERE, *(f"model.layers.1.{name}" for name in rest)), 0),
        "model.layers.1.mlp": "cpu",
    }
    with pytest.raises(PlanError, match=r"device map cuts the site at 'model\.layers\.1\.post_attention_layernorm'"):
        load(qwen3_folder, device_map=device_map)


def test_a_captured_graph_goes_on_with_new_weights(qwen3_folder):
    model = load(qwen3_folder, device_map="cuda")
    site = model.model.layers[0].post_attention_layernorm
    hidden = torch.randn(1, 4, 32, device="cuda")
    with torch.no_grad():
        site(hidden)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            site(hidden)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = site(hidden)
        before = [parameter.data_ptr() for parameter in model.parameters()]
        assert graft_of(model).update({name: 2 * tensor for name, tensor in model.state_dict().items()}) == []
        assert [parameter.data_ptr() for parameter in model.parameters()] == before
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, site(hidden))
