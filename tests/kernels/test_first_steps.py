"""What a first step launches has been loaded before, in the very forms in which it is launched."""

import inspect

import pytest
import torch
from drawn import DEVICE

pytest.importorskip("triton")

import kernelgraft
import tiny
from kernelgraft import preparing as engine
from kernelgraft.kernels import first_steps, launching, linear_cross_entropy
from kernelgraft.verify._drawing import cache_name

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


FREE = {"num_rows", "num_tokens", "num_slots", "num_keys", "num_splits", "mask_batch", "mask_head"}
FREE |= {"num_q_programs", "num_k_programs", "num_v_programs"}
"""Numbers of which kernels know nothing when they are compiled."""


def form(name, parameter, value):
    """What Triton compiles for: of a number whether it is 1, or a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    if "constexpr" in str(parameter.annotation):
        return value
    if not isinstance(value, int) or name in FREE:
        return type(value)
    return 1 if value == 1 else value % 16 == 0


@pytest.fixture
def looked_up(monkeypatch):
    """The forms of kernels that Triton is asked for: those that shall be there, and those that shall run."""
    prepared, launched = set(), set()
    real = launching._run_or_load

    def note(kernel, grid, args, options, is_meta):
        given = inspect.signature(kernel.fn).bind(*args, **{k: v for k, v in options.items() if k.isupper()})
        parameters = given.signature.parameters
        forms = tuple(form(name, parameters[name], value) for name, value in given.arguments.items())
        others = sorted((k, v) for k, v in options.items() if not k.isupper())
        (prepared if is_meta else launched).add((kernel.fn.__name__, forms, *others))
        return real(kernel, grid, args, options, is_meta)

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
@pytest.mark.parametrize("length", [5, 60, 120, 260])
def test_so_is_what_decodes(monkeypatch, looked_up, in_triton, length):
    """With a cache that grows; the interpreter is slow, so there is one layer, without a prompt that is many tokens."""
    prepared, launched = looked_up
    monkeypatch.setattr(engine, "_is_gpu", lambda device: device.type == "cpu")
    monkeypatch.setattr(first_steps, "STEPS", {False: (1,), True: ()})
    model = tiny.model("qwen3", head_dim=64, num_hidden_layers=1, max_position_embeddings=512)
    graft = kernelgraft.graft(model, CONFIGS["layers"][1])
    with torch.no_grad():
        with graft.reference():
            cache = model(**tiny.inputs("qwen3", batch=1, length=length)).past_key_values
        launched.clear()
        model(**tiny.inputs("qwen3", batch=1, length=1), **{cache_name(model): cache})
    assert "_decode_split" in {name for name, *_ in launched}
    assert launched <= prepared


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
