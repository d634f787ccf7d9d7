"""What a first step launches has been loaded before, in the very forms in which it is launched."""

import pytest
import torch
from drawn import DEVICE

pytest.importorskip("triton")

import kernelgraft
import tiny
from kernelgraft import preparing as engine
from kernelgraft.kernels import first_steps, launching, linear_cross_entropy

pytestmark = pytest.mark.transformers

ATTENTION = (("RMSNorm", "model.layers.*.input_layernorm"), ("Attention", "model.layers.*.self_attn"))
MLP = (("RMSNorm", "model.layers.*.post_attention_layernorm"), ("MLP", "model.layers.*.mlp"))
NORM = ("RMSNorm", "model.layers.*.input_layernorm")
CONFIGS = {
    "layers": ("qwen3", {"DecoderLayer": "kernelgraft.kernels:DecoderLayer", "RMSNorm": "kernelgraft.kernels:RMSNorm"}),
    "layers with biases": ("qwen2", {"DecoderLayer": "kernelgraft.kernels:DecoderLayer"}),
    "fusions": ("llama", {ATTENTION: "kernelgraft.kernels:RMSNormAttention", MLP: "kernelgraft.kernels:RMSNormMLP"}),
    "swiglu": ("mistral", {"MLP": "kernelgraft.kernels:SwiGLUMLP"}),
    # Not the norms of heads, which have more rows than tokens.
    "gemma": ("gemma3", {"MLP": "kernelgraft.kernels:GeGLUMLP", NORM: "kernelgraft.kernels:OffsetRMSNorm"}),
}


@pytest.fixture
def looked_up(monkeypatch):
    """What Triton is asked for, and whether it is to run: by kernel, dtypes, what is not a pointer, and options."""
    prepared, launched = set(), set()
    real = launching._run_or_load

    def note(kernel, grid, args, options):
        shown = tuple(each.dtype if isinstance(each, torch.Tensor) else each for each in args)
        (prepared if args[0].is_meta else launched).add((kernel.fn.__name__, shown, *sorted(options.items())))
        return real(kernel, grid, args, options)

    monkeypatch.setattr(launching, "_run_or_load", note)
    return prepared, launched


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU what is loaded is counted")
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_step_launches_was_prepared(monkeypatch, looked_up, in_triton, name, trains):
    prepared, launched = looked_up
    monkeypatch.setattr(engine, "_is_gpu", lambda device: device.type == "cpu")
    monkeypatch.setattr(first_steps, "STEPS", {False: (1, 5, 70), True: (6,)})
    kind, config = CONFIGS[name]
    model = tiny.model(kind).train(trains)
    kernelgraft.graft(model, config)
    assert prepared
    assert not launched
    for length in first_steps.STEPS[trains]:
        inputs = tiny.inputs(kind, batch=1, length=length)
        with torch.set_grad_enabled(trains):
            out = model(**inputs, labels=inputs["input_ids"], use_cache=not trains)
        if trains:
            out.loss.backward()
    assert launched
    strange = {each for each in launched if each not in prepared}
    assert not strange, f"{strange} are launched, and not among {prepared}"


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU what is loaded is counted")
def test_in_training_the_loss_is_computed_before_as_the_model_computes_it(monkeypatch, looked_up, in_triton):
    _, launched = looked_up
    monkeypatch.setattr(engine, "_is_gpu", lambda device: device.type == "cpu")
    monkeypatch.setattr(linear_cross_entropy, "_ROWS", 8)
    config = {("Linear", "lm_head"): "kernelgraft.kernels:LinearCrossEntropy"}
    kernelgraft.graft(tiny.model("llama"), config)
    assert not launched
    model = tiny.model("llama").train()
    kernelgraft.graft(model, config)
    (before,) = launched
    inputs = tiny.inputs("llama", batch=2, length=40)
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    assert launched == {before}


def test_outside_of_it_the_meta_device_is_as_ever():
    x, weight = torch.empty(2, 3, 8, device="meta"), torch.empty(8, device="meta")
    from kernelgraft.kernels import device, rms_norm

    assert not device.in_triton(x)
    assert device.of(x) == x.device
    y = rms_norm.rms_norm(x, weight, 1e-6)
    assert y.is_meta
    assert y.shape == x.shape


def test_the_block_holds_for_its_thread_and_ends():
    from threading import Thread

    from kernelgraft.kernels import device

    x, cpu, found = torch.empty(1, device="meta"), torch.device("cpu"), []
    with device.preparing(cpu):
        assert (device.in_triton(x), device.of(x)) == (True, cpu)
        other = Thread(target=lambda: found.append(device.in_triton(x)))
        other.start()
        other.join()
        with pytest.raises(RuntimeError), device.preparing(torch.device("meta")):
            raise RuntimeError
        assert device.of(x) == cpu
    assert found == [False]
    assert not device.in_triton(x)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("trains", [False, True])
def test_on_a_gpu_a_first_step_loads_nothing(trains):
    import triton

    model = tiny.model("qwen3", head_dim=64).to(DEVICE).train(trains)
    config = {**CONFIGS["layers"][1], ("Linear", "lm_head"): "kernelgraft.kernels:LinearCrossEntropy"}
    graft = kernelgraft.graft(model, config)
    loaded = []
    triton.knobs.runtime.kernel_load_start_hook.add(note := lambda *args: loaded.append(args[2]))
    try:
        inputs = {k: v.to(DEVICE) for k, v in tiny.inputs("qwen3", batch=4, length=2048 if trains else 4).items()}
        if trains:
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        else:
            with torch.no_grad():
                logits = model(**inputs).logits
                model.generate(inputs["input_ids"][:1], max_new_tokens=3, do_sample=False)
    finally:
        triton.knobs.runtime.kernel_load_start_hook.remove(note)
    assert loaded == []
    if not trains:
        with torch.no_grad(), graft.reference():
            torch.testing.assert_close(logits, model(**inputs).logits)
