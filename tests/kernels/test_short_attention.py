"""Attention of short sequences: which are taken, what is computed, and that models of Transformers come to it."""

import pytest
import torch
from drawn import DEVICE, close, few, tensor
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernelgraft.kernels import rms_norm_attention, short_attention

has_plans = pytest.mark.skipif(
    DEVICE != "cuda" or torch.cuda.get_device_capability() not in ((9, 0), (10, 0)), reason="needs an H100 or B200"
)
HALVES = (torch.bfloat16, torch.float16)


def states(batch, num_heads, num_kv_heads, length, dim, dtype=torch.bfloat16):
    """As `rotate` gives them: q and k dense, v a part of what the projections gave."""
    q, k = (tensor(batch, each, length, dim, dtype=dtype, seed=each) for each in (num_heads, num_kv_heads))
    v = tensor(batch, length, num_kv_heads + 2, dim, dtype=dtype, seed=5)[:, :, 2:].transpose(1, 2)
    return q, k, v


def by_torch(q, k, v, is_causal, scale):
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=True)


# --- which are taken


def takes(*shape, length_of_keys=None, dtype=torch.bfloat16, device="meta"):
    batch, num_heads, num_kv_heads, length, dim = shape
    q = torch.empty(batch, num_heads, length, dim, dtype=dtype, device=device)
    k = torch.empty(batch, num_kv_heads, length_of_keys or length, dim, dtype=dtype, device=device)
    return short_attention.takes(q, k, k)


def test_it_takes_what_is_short_and_what_flash_attention_can():
    assert takes(1, 16, 8, 16, 128)
    assert takes(1, 16, 16, 1024, 128)
    assert takes(4, 16, 8, 512, 64)
    assert takes(2, 9, 3, 100, 72, dtype=torch.float16)
    assert not takes(1, 16, 8, 1025, 128)
    assert not takes(8, 16, 8, 512, 128)
    assert not takes(1, 16, 8, 16, 128, dtype=torch.float32)
    assert not takes(1, 16, 8, 16, 264)
    assert not takes(1, 16, 8, 16, 100)
    assert not takes(1, 16, 6, 16, 128)
    assert not takes(1, 16, 8, 16, 128, length_of_keys=17)
    assert not takes(0, 16, 8, 16, 128)
    q, k, v = states(1, 4, 2, 6, 16)
    assert short_attention.takes(q, k, v)
    assert not short_attention.takes(q, k, v.half())
    assert not short_attention.takes(q.transpose(2, 3).contiguous().transpose(2, 3), k, v)


@pytest.fixture
def on_hopper(monkeypatch):
    """As if on an H200, as far as it is decided who attends."""
    monkeypatch.setattr(short_attention, "_has_plans", lambda of: True)


def test_only_where_torch_would_have_it_planned(monkeypatch):
    assert not short_attention.is_planned(torch.device("cpu"))
    for capability, expected in (((9, 0), True), ((10, 0), True), ((8, 9), False), ((12, 0), False)):
        short_attention._has_plans.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of=None, given=capability: given)
        assert short_attention.is_planned(torch.device("cuda")) == expected
        assert not short_attention.is_planned(torch.device("cpu"))
    short_attention._has_plans.cache_clear()


@pytest.mark.usefixtures("on_hopper")
def test_who_is_told_which_attention_to_use_uses_it():
    of = torch.device("cuda")
    assert short_attention.is_planned(of)
    for backend in (SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        with sdpa_kernel(backend):
            assert not short_attention.is_planned(of)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
        assert short_attention.is_planned(of)


@pytest.mark.usefixtures("on_hopper")
def test_compilers_transforms_and_autocast_see_torchs_own():
    def which(x):
        return x + 1 if short_attention.is_planned(torch.device(DEVICE)) else x - 1

    x = torch.zeros(3)
    assert (which(x) == 1).all()
    assert (torch.compile(which, fullgraph=True, backend="eager")(x) == -1).all()
    assert (torch.func.vmap(which)(x) == -1).all()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert (which(x) == -1).all()


# --- in models


@pytest.fixture
def attended(on_hopper, monkeypatch):
    """Torch's own attention in the place of flash attention; what it is called with."""
    calls = []

    def flash(q, k, v, dropout, is_causal, scale):
        assert not dropout
        calls.append((q.shape[2], k.shape[2], is_causal, torch.is_grad_enabled() and q.requires_grad))
        y = by_torch(q, k, v, is_causal, scale)
        return (y.transpose(1, 2).contiguous().transpose(1, 2),)

    monkeypatch.setattr(short_attention, "_flash", flash)
    return calls


def model_pair(calls=None, **options):
    """A model, its grafted twin and their layers; of `calls`, what the graft itself makes on a GPU is forgotten."""
    pytest.importorskip("triton")
    pytest.importorskip("transformers")
    from test_rms_norm_attention import NUM_LAYERS, pair

    plain, grafted, _ = pair("qwen3", dtype=torch.bfloat16, **options)
    if calls is not None:
        calls.clear()
    return plain, grafted, NUM_LAYERS


def near(found, expected):
    """But for roundings here and there, which go on through the layers."""
    assert (found - expected).norm() < 0.02 * expected.norm()


def prompt(length=7):
    return torch.arange(2 * length, device=DEVICE).view(2, length)


@pytest.mark.transformers
def test_a_prompt_without_a_mask(attended):
    plain, grafted, num_layers = model_pair(attended)
    with torch.no_grad():
        near(grafted(prompt()).logits, plain(prompt()).logits)
    assert attended == [(7, 7, True, False)] * num_layers


@pytest.mark.transformers
def test_gradients(attended):
    plain, grafted, num_layers = model_pair(attended)
    found = []
    for model in (plain, grafted):
        model(prompt(), labels=prompt(), use_cache=False).loss.backward()
        found.append(model.model.embed_tokens.weight.grad)
    near(*found)
    assert attended == [(7, 7, True, True)] * num_layers


@pytest.mark.transformers
def test_of_a_cache_with_room_what_is_filled(attended):
    import transformers
    from test_rms_norm_attention import step

    plain, grafted, num_layers = model_pair(attended)
    found = []
    for model in (plain, grafted):
        cache = transformers.StaticCache(model.config, 12)
        with torch.no_grad():
            found.append(torch.cat([step(model, part, cache).logits for part in prompt().split([5, 1, 1], dim=1)], 1))
    near(*found)
    assert attended == [(5, 5, True, False)] * num_layers


@pytest.mark.transformers
def test_what_is_left_to_the_library(attended):
    import transformers
    from test_rms_norm_attention import step

    plain, grafted, num_layers = model_pair(attended)
    mask = torch.ones_like(prompt())
    mask[0, :3] = 0
    with torch.no_grad():
        for given in ({"attention_mask": mask}, {}):
            grafted.set_attn_implementation("eager" if not given else "sdpa")
            plain.set_attn_implementation("eager" if not given else "sdpa")
            seen = mask.bool() if given else ...
            near(grafted(prompt(), **given).logits[seen], plain(prompt(), **given).logits[seen])
        assert attended == []
        grafted.set_attn_implementation("sdpa")
        cache = transformers.DynamicCache()
        step(grafted, prompt()[:, :3], cache)
        attended.clear()
        step(grafted, prompt()[:, 3:], cache)  # behind others, which takes a mask
        step(grafted, prompt()[:, :1], cache)
    assert attended == []
    grafted.train()
    for layer in grafted.model.layers:
        layer.self_attn.attention_dropout = 0.1
    grafted(prompt())
    assert attended == []
    grafted.eval()
    grafted(prompt())
    assert len(attended) == num_layers


@pytest.mark.transformers
def test_attention_of_both_sides(attended):
    """What the call says about it, or else the module."""
    plain, grafted, num_layers = model_pair(attended)
    with torch.no_grad():
        near(grafted(prompt(), is_causal=False).logits, plain(prompt(), is_causal=False).logits)
    assert attended == [(7, 7, False, False)] * num_layers


@pytest.mark.transformers
@pytest.mark.parametrize("trains", [False, True])
def test_both_ways_are_called_once_before(attended, trains):
    _, grafted, _ = model_pair(attended)
    rms_norm_attention._attend_once(grafted.model.layers[0].self_attn, torch.device(DEVICE), trains)
    assert attended == [(16, 16, True, trains)]


# --- on the GPU


@has_plans
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@given(
    shape=st.sampled_from([(1, 16, 8, 16, 128), (2, 9, 3, 77, 64), (3, 4, 4, 130, 80), (1, 8, 2, 33, 256)]),
    is_causal=st.booleans(),
)
@few
def test_forward_and_backward(dtype, shape, is_causal):
    inputs = [each.detach().requires_grad_() for each in states(*shape, dtype=dtype)]
    exact_inputs = [each.detach().double().requires_grad_() for each in inputs]
    assert short_attention.is_planned(inputs[0].device)
    assert short_attention.takes(*inputs)
    scale = 0.7 * shape[-1] ** -0.5
    y = short_attention.attend(*inputs, scale, is_causal)
    exact = by_torch(*exact_inputs, is_causal, scale).transpose(1, 2)
    assert y.dtype == dtype
    close(y, exact, dtype, size=1.0)
    upstream = tensor(*y.shape, dtype=dtype, seed=9)
    grads = torch.autograd.grad(y, inputs, upstream)
    for grad, one in zip(grads, torch.autograd.grad(exact, exact_inputs, upstream.double()), strict=True):
        close(grad, one, dtype, terms=shape[3], size=3.0)


@has_plans
@pytest.mark.transformers
def test_a_short_prompt_is_not_planned():
    """Nor is its backward."""
    _, grafted, _ = model_pair(head_dim=64)
    grafted(prompt(16)).logits.sum().backward()  # what is loaded once
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        grafted(prompt(23)).logits.sum().backward()
    names = {each.key for each in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention" in names
    assert not any("cudnn_attention" in name for name in names)
