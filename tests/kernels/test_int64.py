"""Rows further than 2^31 elements apart give what rows side by side give: no offset is computed in 32 bits."""

import mmap

import pytest
import torch
from drawn import DEVICE, tensor

from kernelgraft.kernels import (
    activation,
    add_rows,
    cross_entropy_rows,
    decode_attention,
    few_tokens,
    one_token_attention,
    rms_norm,
    rotary,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("in_triton")

HALF = torch.float16
BEFORE = AFTER = (1 << 33) + (1 << 26)  # bytes
NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which `mmap` names from Python 3.13 on
NORM = (1e-6, 0.0, True)


class Far:
    """Puts tensors where the last slice along a dimension is 3 * 2^30 elements, or 2^31 and some, behind the first.

    Each stride fits in 32 bits. An offset that is cut to 32 bits is negative, and there is memory in front: the result
    is wrong, and nothing crashes.
    """

    def __init__(self, memory):
        self._memory = memory
        self._next = BEFORE

    def __call__(self, x, dim=0):
        """`x` with its slices along `dim` far apart, and each of them dense."""
        size = x.shape[dim]
        distance = 3 << 30 if x.element_size() <= 2 else (1 << 31) + 64
        stride = distance // (size - 1) // 16 * 16
        assert size > 2, "a stride of 64 bits would hide an index of 32"
        strides = list(torch.empty_like(x.select(dim, 0), memory_format=torch.contiguous_format).stride())
        strides.insert(dim % x.ndim, stride)
        start, self._next = self._next, self._next + (1 << 20)
        out = self._memory[start:].view(x.dtype).as_strided(x.shape, strides)
        assert self._next < BEFORE + (1 << 26)
        assert x.numel() // size * x.element_size() <= 1 << 20
        assert (size - 1) * stride >= 1 << 31
        return out.copy_(x)


@pytest.fixture(scope="module")
def memory():
    """Bytes, of which only the pages that are touched are there, and on a GPU all."""
    size = BEFORE + AFTER
    if DEVICE == "cuda":
        if torch.cuda.mem_get_info()[0] < size + (1 << 31):
            pytest.skip(f"takes {size >> 30} GB of a GPU")
        yield torch.zeros(size, dtype=torch.uint8, device=DEVICE)
        torch.cuda.empty_cache()
    else:
        held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
        yield torch.frombuffer(held, dtype=torch.uint8)


@pytest.fixture
def far(memory):
    return Far(memory)


def assert_equal(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
        assert other.isfinite().all()
        assert other.any()


def gradients(run, inputs, upstream):
    """What `run` gives of these inputs, and their gradients."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    out = run(*leaves)
    return [*out, *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("num_rows", [3, 300])
def test_norm(num_rows, far):
    x, upstream = (tensor(num_rows, 64, dtype=HALF, seed=seed) for seed in (0, 1))
    weight = tensor(64, dtype=HALF, seed=2)

    def run(x, weight):
        return [rms_norm.rms_norm(x, weight, 1e-6)]

    assert_equal(run(far(x), weight), run(x, weight))
    assert_equal(gradients(run, [far(x), weight], [far(upstream)]), gradients(run, [x, weight], [upstream]))


@pytest.mark.parametrize("num_rows", [3, 300])
def test_norm_of_a_sum(num_rows, far):
    x, residual, upstream, of_sum = (tensor(num_rows, 64, dtype=HALF, seed=seed) for seed in range(4))
    weight = tensor(64, dtype=HALF, seed=4)

    def run(x, residual, weight):
        return rms_norm.add_rms_norm(x, residual, weight, 1e-6)

    assert_equal(run(far(x), far(residual), weight), run(x, residual, weight))
    found = gradients(run, [far(x), far(residual), weight], [far(upstream), far(of_sum)])
    assert_equal(found, gradients(run, [x, residual, weight], [upstream, of_sum]))


def test_activation(far):
    gate_up, upstream = tensor(4, 128, dtype=HALF), tensor(4, 64, dtype=HALF, seed=1)

    def run(gate_up):
        return [activation.gated_activation(gate_up, "silu")]

    assert_equal(run(far(gate_up)), run(gate_up))
    assert_equal(gradients(run, [far(gate_up)], [far(upstream)]), gradients(run, [gate_up], [upstream]))


@pytest.mark.parametrize("act", ["", "silu"])
@pytest.mark.parametrize(
    ("num_tokens", "num_columns", "length"),
    [
        pytest.param(1, 32, 64, id="one token"),
        pytest.param(1, 48, 8192, id="one token, in turns"),
        pytest.param(4, 64, 64, id="some tokens"),
        pytest.param(4, 16, 1024, id="some tokens, in parts"),
    ],
)
def test_product_of_few_tokens(num_tokens, num_columns, length, act, far):
    x = tensor(num_tokens, length, dtype=HALF)
    weight = tensor(num_columns * 2 if act else num_columns, length, dtype=HALF, seed=1, scale=length**-0.5)
    norm = few_tokens.Norm(tensor(length, dtype=HALF, seed=2), 1e-6)
    for each in (None, norm):
        found = few_tokens.product(far(x) if num_tokens > 1 else x, far(weight), norm=each, act=act)
        assert_equal([found], [few_tokens.product(x, weight, norm=each, act=act)])


HEADS, KV_HEADS, HEAD_DIM = 6, 3, 16


def rotated_inputs(batch, num_tokens):
    """A product of queries, keys and values, the angles, and the weights of both norms."""
    qkv = tensor(batch, num_tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=HALF)
    angles = [tensor(batch, num_tokens, HEAD_DIM, dtype=HALF, seed=seed) for seed in (1, 2)]
    weights = [tensor(HEAD_DIM, dtype=HALF, seed=seed, offset=1.0) for seed in (3, 4)]
    return [qkv, *angles], weights


@pytest.mark.parametrize(("dim", "batch", "num_tokens"), [(0, 3, 2), (1, 2, 3)], ids=["batch", "token"])
def test_rotation(dim, batch, num_tokens, far):
    (qkv, *angles), weights = rotated_inputs(batch, num_tokens)
    far_angles = [far(each, dim) for each in angles]

    def run(cos, sin):
        return lambda qkv, *weights: rotary.rotate(qkv, cos, sin, HEADS, HEAD_DIM, *weights, *NORM)

    with torch.no_grad():
        assert_equal(run(*far_angles)(far(qkv, dim), *weights), run(*angles)(qkv, *weights))
    upstream = [
        tensor(batch, heads, num_tokens, HEAD_DIM, dtype=HALF, seed=seed)
        for seed, heads in ((5, HEADS), (6, KV_HEADS), (7, KV_HEADS))
    ]
    wanted = gradients(run(*angles), [qkv, *weights], upstream)
    far_upstream = [far(each, 2 * dim) for each in upstream]
    assert_equal(gradients(run(*far_angles), [far(qkv, dim), *weights], far_upstream), wanted)
    by_head = [far(each, 1) for each in upstream]
    assert_equal(gradients(run(*angles), [qkv, *weights], by_head), wanted)


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "token"])
def test_rotation_into_a_cache(dim, far):
    given, weights = rotated_inputs(3, 2)
    held = [tensor(3, KV_HEADS, 9, HEAD_DIM, dtype=HALF, seed=seed) for seed in (5, 6)]
    position = torch.tensor(7, device=DEVICE)
    found = []
    for caches in ([far(each, dim) for each in held], held):
        q = rotary.rotate_into(*caches, position, *given, HEADS, HEAD_DIM, *weights, *NORM)
        found.append([q, *caches])
    assert_equal(*found)


ATTENDED = [(0, (3, (2, 1), 130, 64)), (1, (1, (6, 3), 130, 64)), (2, (1, (2, 1), 130, 64))]
"""Along which dimension of keys and values slices are far apart; and sequences, heads, keys and their length."""


@pytest.mark.parametrize(("dim", "shape"), ATTENDED, ids=["batch", "head", "token"])
def test_attention_of_one_token(dim, shape, far):
    batch, (heads, kv_heads), keys, head_dim = shape
    q = tensor(batch, heads, 1, head_dim, dtype=HALF)
    k, v = (tensor(batch, kv_heads, keys, head_dim, dtype=HALF, seed=seed) for seed in (1, 2))
    mask = tensor(batch, heads, 1, keys, dtype=HALF, seed=3)
    wanted = one_token_attention.one_token_attention(q, k, v, 0.125, mask)
    far_q, far_mask = (far(each, dim) if dim < 2 else each for each in (q, mask))
    found = one_token_attention.one_token_attention(far_q, far(k, dim), far(v, dim), 0.125, far_mask)
    assert_equal([found], [wanted])


@pytest.mark.parametrize("grows", [True, False], ids=["growing", "static"])
@pytest.mark.parametrize(("dim", "shape"), ATTENDED, ids=["batch", "head", "token"])
def test_decode_attention(dim, shape, grows, far):
    batch, (heads, kv_heads), keys, head_dim = shape
    qkv = tensor(batch, 1, (heads + 2 * kv_heads) * head_dim, dtype=HALF)
    cos, sin = (tensor(batch, 1, head_dim, dtype=HALF, seed=seed) for seed in (1, 2))
    weights = [tensor(head_dim, dtype=HALF, seed=seed, offset=1.0) for seed in (3, 4)]
    held = [tensor(batch, kv_heads, keys, head_dim, dtype=HALF, seed=seed) for seed in (5, 6)]
    mask = tensor(batch, heads, 1, keys + grows, dtype=HALF, seed=7)

    def run(qkv, cos, sin, mask, keys, values):
        given = (qkv, cos, sin, heads, head_dim, *weights, NORM, keys, values)
        if grows:
            return decode_attention.attend_longer(*given, 0.125, mask)
        position = torch.tensor(128, device=DEVICE)
        return decode_attention.attend_into(*given, position, 0.125, mask), keys, values

    far_held = [far(each, dim) for each in held]
    before = [far(each) for each in (qkv, cos, sin)] if dim == 0 else [qkv, cos, sin]
    found = run(*before, far(mask, dim) if dim < 2 else mask, *far_held)
    assert_equal(found, run(qkv, cos, sin, mask, *held))


def test_loss_and_its_gradient_in_place_of_logits(far):
    logits = tensor(4, 112, dtype=HALF)
    target = torch.tensor([3, -100, 99, 0], device=DEVICE)
    found = []
    for each in (far(logits), logits):
        loss = torch.empty(4, device=DEVICE)
        cross_entropy_rows.launch_rows(each, target, None, None, loss, cross_entropy_rows.Formula(), True)
        found.append([loss, each])
    assert_equal(*found)


def test_sum_of_rows(far):
    """Its rows are dense, and so many columns that one is further than 2^31 elements from the first would take long."""
    x = tensor(3, 32)
    apart, out = far(x), torch.empty(32, device=DEVICE)
    add_rows.run(add_rows._add_rows, (1,), apart, out, 3, apart.stride(0), False, 4, 32, num_warps=8)
    assert_equal([out], [add_rows.add_rows(x, torch.float32)])
