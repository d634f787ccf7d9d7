"""No kernel waits for the device, forward or backward."""

from contextlib import contextmanager

import pytest
import torch
import transformers
from drawn import DEVICE, tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernelgraft
import tiny
from kernelgraft.kernels import cross_entropy, gated_mlp, rms_norm
from kernelgraft.kernels.few_tokens import Norm

pytest.importorskip("triton")
pytestmark = [pytest.mark.transformers, pytest.mark.usefixtures("few_are_four", "in_triton")]

H, WIDTH = 32, 24

# What gives the host a number or a size that the device has worked out.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "is_nonzero", "equal"}


class _Refusing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        assert name not in WAITS, f"{func} waits"
        devices = {each.device.type for each in args if isinstance(each, torch.Tensor) and each.dim()}
        assert not (name in ("_to_copy", "copy_") and len(devices) > 1), f"{func} goes between devices"
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_waits():
    """Inside the block nothing may; on a GPU torch itself sees to it."""
    if DEVICE == "cpu":
        with _Refusing():
            yield
        return
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def both_ways(call, *leaves):
    """Call it twice, the second time watched, and its backward."""
    for leaf in leaves:
        leaf.requires_grad_()
    for watched in (False, True):
        y = call()
        upstream = torch.ones_like(y)
        if not watched:
            torch.autograd.grad(y, leaves, upstream)
            continue
        with nothing_waits():
            torch.autograd.grad(call(), leaves, upstream)


def test_what_waits_is_seen():
    x = tensor(3)
    with pytest.raises((AssertionError, RuntimeError), match=r"waits|synchronizing"), nothing_waits():
        x.sum().item()


@pytest.mark.parametrize("rows", [(2,), (3, 4), (0, 2)], ids=str)
def test_a_norm(rows):
    x, weight = tensor(*rows, H), tensor(H, seed=1)
    both_ways(lambda: rms_norm.rms_norm(x, weight, 1e-6, 1.0, False), x, weight)


@pytest.mark.parametrize("rows", [(2,), (3, 4), (0, 2)], ids=str)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
def test_an_mlp(rows, act):
    x, scale = tensor(*rows, H), tensor(H, seed=1)
    gate_up, down = tensor(2 * WIDTH, H, seed=2), tensor(H, WIDTH, seed=3)
    norm = Norm(scale, 1e-6, 0.0, True)
    both_ways(lambda: gated_mlp.gated_mlp(x, gate_up, down, act, None, None, norm, x), x, scale, gate_up, down)
    with torch.no_grad(), nothing_waits():
        gated_mlp.gated_mlp(x, gate_up, down, act, None, None, norm, x)


def test_a_loss():
    x, weight = tensor(12, H), tensor(65, H, seed=1)
    labels = torch.arange(12, device=DEVICE)
    labels[3] = -100
    both_ways(lambda: cross_entropy.linear_cross_entropy(x, weight, labels), x, weight)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_layer(kind):
    model = tiny.model(kind).to(DEVICE)
    kernelgraft.graft(model, {"DecoderLayer": "kernelgraft.kernels:DecoderLayer"})
    x, places = tensor(2, 6, H), torch.arange(6, device=DEVICE)[None]
    angles = model.model.rotary_emb(x, places)
    layer = model.model.layers[0]
    both_ways(lambda: layer(x, position_embeddings=angles, position_ids=places), x, *layer.parameters())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_tokens_with_a_cache(cache):
    """A prompt, and one token after the other; what a cache makes at its first step is Transformers'."""
    model = tiny.model("qwen3").to(DEVICE)
    kernelgraft.graft(model, {"DecoderLayer": "kernelgraft.kernels:DecoderLayer"})
    held = transformers.DynamicCache() if cache == "dynamic" else transformers.StaticCache(model.config, 12)
    layer, places = model.model.layers[0], torch.arange(12, device=DEVICE)[None]
    x = tensor(1, 12, H)
    angles = model.model.rotary_emb(x, places)

    def step(first, last):
        now = slice(first, last)
        layer(
            x[:, now],
            position_embeddings=tuple(each[:, now] for each in angles),
            position_ids=places[:, now],
            past_key_values=held,
        )

    step(0, 6)
    step(6, 7)
    with nothing_waits():
        step(7, 8)
        step(8, 9)
