"""How much memory a call takes at its peak, and what of it stays, by what torch's allocator reports."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from drawn import DEVICE, tensor
from torch.autograd import DeviceType
from torch.profiler import profile

import kernelgraft
import tiny
from kernelgraft.kernels import gated_mlp, launching, rms_norm
from kernelgraft.kernels.few_tokens import Norm

pytest.importorskip("triton")
AttentionInterface = pytest.importorskip("transformers").AttentionInterface
pytestmark = pytest.mark.usefixtures("few_are_four", "in_triton", "_nothing_runs")

# Multiples of the 512 bytes in which a GPU's memory is given out.
ROWS, H, WIDTH = 128, 32, 64
BYTES = 4
Y, BOTH, ACTIVATED = ROWS * H * BYTES, 2 * ROWS * WIDTH * BYTES, ROWS * WIDTH * BYTES
NORM = Norm(tensor(H, seed=1), 1e-6, 0.0, True)


@pytest.fixture
def _nothing_runs(monkeypatch):
    """Triton's interpreter keeps what it was given until garbage is collected."""
    if DEVICE == "cpu":
        monkeypatch.setattr(launching, "_run_or_load", lambda *_: None)


@contextmanager
def memory():
    """Inside the block, what the allocator gives and takes back: the peak and the end, over the beginning."""
    found = SimpleNamespace()
    with profile(profile_memory=True) as profiler:
        yield found
    kind = DeviceType.CUDA if DEVICE == "cuda" else DeviceType.CPU
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]" and e.device_type() == kind]
    level = found.peak = 0
    for _, change in sorted(changes, key=lambda each: each[0]):
        level += change
        found.peak = max(found.peak, level)
    found.end = level


def measured(call):
    """Outputs, and memory, of a second call: what the first one alone makes stays."""
    call()
    with memory() as found:
        out = call()
    return out, found


@torch.no_grad()
def test_a_norm_makes_what_it_gives():
    x, residual = tensor(ROWS, H), tensor(ROWS, H, seed=2)
    _, found = measured(lambda: rms_norm.rms_norm(x, *NORM))
    assert found.peak == found.end == Y
    _, found = measured(lambda: rms_norm.add_rms_norm(x, residual, *NORM))
    assert found.peak == found.end == 2 * Y


@torch.no_grad()
@pytest.mark.parametrize("norm", [None, NORM], ids=["plain", "normed"])
@pytest.mark.parametrize("added", [False, True], ids=["alone", "with a residual"])
def test_an_mlp_keeps_nothing_longer_than_it_needs_it(norm, added):
    x, gate_up, down = tensor(ROWS, H), tensor(2 * WIDTH, H, seed=2), tensor(H, WIDTH, seed=3)
    residual = tensor(ROWS, H, seed=4) if added else None
    _, found = measured(lambda: gated_mlp.gated_mlp(x, gate_up, down, "silu", None, None, norm, residual))
    assert (found.peak, found.end) == (BOTH + ACTIVATED, Y)


@pytest.mark.parametrize("norm", [None, NORM], ids=["plain", "normed"])
def test_in_training_an_mlp_keeps_gate_and_up(norm):
    x, gate_up, down = (tensor(*s, seed=2).requires_grad_() for s in ((ROWS, H), (2 * WIDTH, H), (H, WIDTH)))
    _, found = measured(lambda: gated_mlp.gated_mlp(x, gate_up, down, "silu", None, None, norm))
    assert found.end == Y + BOTH


def test_in_training_a_norm_keeps_a_number_a_row():
    x, weight = tensor(ROWS, H).requires_grad_(), tensor(H, seed=1).requires_grad_()
    _, found = measured(lambda: rms_norm.rms_norm(x, weight, 1e-6, 0.0, True))
    assert found.end == Y + ROWS * BYTES


def _attend(module, query, key, value, attention_mask, **_):
    """In the place of attention, which is torch's: what that allocates depends on the device."""
    return query.transpose(1, 2), None


@pytest.fixture
def layer():
    """A call of a layer with more of an MLP than of anything else."""
    AttentionInterface.register("of_a_test", _attend)
    model = tiny.model("qwen3", intermediate_size=4 * WIDTH, max_position_embeddings=ROWS).to(DEVICE)
    model.config._attn_implementation = "of_a_test"
    graft = kernelgraft.graft(model, {"DecoderLayer": "kernelgraft.kernels:DecoderLayer"})
    x, places = tensor(1, ROWS, H), torch.arange(ROWS, device=DEVICE)[None]
    angles = model.model.rotary_emb(x, places)
    yield lambda: model.model.layers[0](x, position_embeddings=angles, position_ids=places)
    del AttentionInterface._global_mapping["of_a_test"]
    assert (graft.calls.kernel, graft.calls.reference) == (2, 0)


@pytest.mark.transformers
@torch.no_grad()
def test_beside_its_mlp_a_layer_holds_the_first_sum_alone(layer):
    _, found = measured(layer)
    assert (found.peak, found.end) == (4 * (BOTH + ACTIVATED) + Y, Y)


@pytest.mark.transformers
def test_what_of_a_layer_waits_for_the_backward(layer):
    _, found = measured(layer)
    qkv = ROWS * (4 + 2 + 2) * 8 * BYTES
    # Its output, the sum, gate and up; of attention the normed input, its rstd, qkv, and what attention gives.
    assert found.end == Y + Y + 4 * BOTH + Y + ROWS * BYTES + qkv + Y
