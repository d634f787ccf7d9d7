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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_load_over_two_gpus(dtype, qwen3_folder):
    device_map = {**dict.fromkeys(WHERE, 0), "model.layers.1": 1}
    model, plain = (each(qwen3_folder, device_map=device_map, dtype=dtype) for each in (load, plain_load))
    found, expected = model.state_dict(), plain.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].device == tensor.device == torch.device("cuda", int(".layers.1." in name)), name
        assert torch.equal(found[name], tensor), name
    torch.testing.assert_close(logits(model), logits(plain))
    assert graft_of(model).calls.kernel > graft_of(model).calls.reference == 0
    graft_of(model).remove()
    assert torch.equal(logits(model), logits(plain))


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


@pytest.mark.parametrize("streamed", [False, True])
def test_an_update_takes_no_memory_of_the_device(streamed, qwen3_folder):
    model = load(qwen3_folder, device_map="cuda")
    new = {name: -tensor for name, tensor in model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert graft_of(model).update(iter(new.items()) if streamed else new) == []
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == before
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert all(torch.equal(tensor, new[name]) for name, tensor in model.state_dict().items())


OTHERS = {
    "cpu": lambda tensor: tensor.cpu(),
    "pinned": lambda tensor: tensor.cpu().pin_memory(),
    "half": lambda tensor: tensor.bfloat16(),
    "half on the cpu": lambda tensor: tensor.bfloat16().cpu(),
}


@pytest.mark.parametrize("see", OTHERS.values(), ids=OTHERS)
def test_an_update_from_elsewhere(see, qwen3_folder):
    model = load(qwen3_folder, device_map="cuda")
    new = {name: see(-tensor) for name, tensor in model.state_dict().items()}
    assert graft_of(model).update(new) == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, new[name].to("cuda", tensor.dtype)), name


def test_a_pinned_buffer_can_be_refilled_at_once(qwen3_folder):
    model = load(qwen3_folder, device_map="cuda")
    new = {name: -tensor.cpu() for name, tensor in model.state_dict().items()}
    buffer = torch.empty(max(tensor.numel() for tensor in new.values()), pin_memory=True)

    def stream():
        for name, tensor in new.items():
            yield name, buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)
            buffer.zero_()

    assert graft_of(model).update(stream()) == []
    assert all(torch.equal(tensor.cpu(), new[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_graph_goes_on_with_the_weights_of_a_checkpoint(dtype, qwen3_folder, tmp_path):
    other = tiny.model("qwen3", seed=1)
    other.save_pretrained(tmp_path)
    model = load(qwen3_folder, device_map="cuda", dtype=dtype)
    site = model.model.layers[1].post_attention_layernorm
    hidden = torch.randn(1, 4, 32, device="cuda", dtype=dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(stream):
            site(hidden)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = site(hidden)
        pointers = [parameter.data_ptr() for parameter in model.parameters()]
        assert graft_of(model).update(tmp_path) == []
        assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, site(hidden))
    for (name, ours), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours.cpu(), theirs.to(dtype)), name


@pytest.mark.parametrize("size", ["50GB", "20KB"])
def test_a_save_from_the_gpu(size, qwen3_folder, tmp_path):
    plain_load(qwen3_folder).save_pretrained(tmp_path / "theirs", max_shard_size=size)
    load(qwen3_folder, device_map="cuda").save_pretrained(tmp_path / "ours", max_shard_size=size)
    for theirs in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / theirs.name).read_bytes() == theirs.read_bytes(), theirs.name
