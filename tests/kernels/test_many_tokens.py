"""Products of many tokens: which of them the kernel takes, what it is given, and on Hopper what it gives."""

import functools
import re
import struct

import pytest
import torch
from drawn import DEVICE, close, few, tensor
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from kernelgraft.kernels import activation, gated_mlp, many_tokens
from kernelgraft.kernels import many_tokens_kernels as kernels
from kernelgraft.kernels.few_tokens import Norm

HALVES = (torch.bfloat16, torch.float16)
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs an H100 or H200"
)


def by_library(x, weight, bias=None, act=""):
    y = F.linear(x, weight, bias)
    return activation.gated_activation(y, act) if act else y


# --- which products


@pytest.fixture
def on_hopper(monkeypatch):
    """As if on an H200, as far as it is decided who computes; the kernel is the library, and says what it was given."""
    launched = []

    def launch(x, weight, act):
        launched.append((tuple(x.shape), tuple(weight.shape), act))
        return by_library(x, weight, None, act)

    monkeypatch.setattr(many_tokens, "_multiprocessors", lambda of: 132)
    monkeypatch.setattr(many_tokens, "launch", launch)
    monkeypatch.setattr(many_tokens.device, "in_triton", lambda x: True)
    monkeypatch.setattr(many_tokens.activation, "launch", activation.reference)
    return launched


def taken(rows, length, columns, act="silu", dtype=torch.bfloat16, **how):
    x, weight = (torch.empty(shape, dtype=dtype) for shape in ((rows, length), (columns * (2 if act else 1), length)))
    return many_tokens.takes(x.requires_grad_(how.get("trains", False)), weight, how.get("bias"), act)


@pytest.mark.usefixtures("on_hopper")
def test_it_takes_what_it_is_faster_for():
    assert taken(8192, 1024, 3072)
    assert taken(512, 4096, 12288)
    assert taken(8192, 3072, 1024, "")
    assert taken(8192, 2048, 6144, "gelu_tanh", torch.float16)
    # Too few rows, or too few blocks in the last round for as many multiprocessors.
    assert not taken(256, 4096, 12288)
    assert not taken(768, 1024, 3072)
    assert not taken(2048, 3072, 1024, "")


@pytest.mark.usefixtures("on_hopper")
def test_it_leaves_what_it_cannot_do():
    assert not taken(8192, 1024, 3072, "gelu")
    assert not taken(8192, 1024, 3072, dtype=torch.float32)
    assert not taken(8192, 1024, 3072, bias=torch.empty(6144))
    assert not taken(8192, 1024, 3072, trains=True)
    assert not taken(8192, 1020, 3072)
    assert not taken(8192, 1024, 3076)
    assert not taken(8192, kernels.MIN_LENGTH - 1, 3072)
    with torch.no_grad():
        assert taken(8192, 1024, 3072, trains=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert not taken(8192, 1024, 3072)
    mixed = torch.empty(8192, 1024, dtype=torch.float16), torch.empty(6144, 1024, dtype=torch.bfloat16)
    assert not many_tokens.takes(*mixed, None, "silu")


def test_it_is_for_hopper_alone(monkeypatch):
    assert not many_tokens._multiprocessors(torch.device("cpu"))
    assert not taken(8192, 1024, 3072)
    monkeypatch.setattr(many_tokens, "KNOWN", True)
    monkeypatch.setattr(many_tokens.device, "INTERPRETED", False)
    monkeypatch.setattr(many_tokens.device, "num_multiprocessors", lambda of: 132)
    for capability, expected in (((9, 0), 132), ((8, 9), 0), ((10, 0), 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of=None, given=capability: given)
        assert many_tokens._multiprocessors(torch.device("cuda")) == expected


@pytest.mark.filterwarnings("error")
def test_a_compiler_is_told_and_does_not_warn(monkeypatch):
    monkeypatch.setattr(many_tokens, "KNOWN", True)
    for name, said in (("INTERPRETED", False), ("in_triton", lambda x: True), ("of", lambda x: torch.device("cuda"))):
        monkeypatch.setattr(many_tokens.device, name, said)
    monkeypatch.setattr(many_tokens.device, "num_multiprocessors", functools.cache(lambda of: 132))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of=None: (9, 0))

    def which(x, weight):
        return x + 1 if many_tokens.takes(x, weight, None, "silu") else x - 1

    compiled = torch.compile(which, fullgraph=True, backend="eager")
    x, weight = torch.zeros(8192, 576, dtype=torch.bfloat16), torch.zeros(1536, 576, dtype=torch.bfloat16)
    assert (compiled(x, weight) == 1).all()
    assert (compiled(x[:256], weight) == -1).all()


def test_both_products_of_an_mlp_go_by_it(on_hopper, monkeypatch):
    monkeypatch.setattr(many_tokens, "takes", lambda *given: True)
    x, scale = tensor(4, 300, 64, dtype=torch.bfloat16), tensor(64, dtype=torch.bfloat16, seed=1)
    gate_up, down = tensor(96, 64, dtype=torch.bfloat16, seed=2), tensor(64, 48, dtype=torch.bfloat16, seed=3)
    with torch.no_grad():
        y = gated_mlp.gated_mlp(x, gate_up, down, "silu", norm=Norm(scale, 1e-6))
    assert on_hopper == [((4, 300, 64), (96, 64), "silu"), ((4, 300, 48), (64, 48), "")]
    monkeypatch.undo()
    torch.testing.assert_close(y, gated_mlp.gated_mlp(x, gate_up, down, "silu", norm=Norm(scale, 1e-6)))


def test_both_ways_are_prepared(on_hopper, monkeypatch):
    activated = []
    monkeypatch.setattr(many_tokens.activation, "launch", lambda y, act: activated.append(act) or y)
    x, weight = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((768, 1024), (6144, 1024)))
    with many_tokens.device.preparing(torch.device("cpu")), torch.no_grad():
        assert not many_tokens.takes(x, weight, None, "silu")
        many_tokens.product(x, weight, None, "silu")
    assert on_hopper == [((768, 1024), (6144, 1024), "silu")]
    assert activated[-1] == "silu"


def test_what_the_kernel_refuses_is_the_librarys(on_hopper, monkeypatch):
    monkeypatch.setattr(many_tokens, "takes", lambda *given: True)
    monkeypatch.setattr(many_tokens, "launch", lambda *given: None)
    x, weight = tensor(600, 64, dtype=torch.bfloat16), tensor(96, 64, dtype=torch.bfloat16, seed=1)
    with torch.no_grad():
        y = many_tokens.product(x, weight, None, "silu")
    assert torch.equal(y, by_library(x, weight, None, "silu"))


# --- what the kernel is given


@pytest.fixture
def captured(monkeypatch):
    """What is launched, in the place of launching it."""
    pytest.importorskip("triton.experimental.gluon")
    made = []

    class Launch:
        def __init__(self, kernel, grid, values, describe, **options):
            self.grid, self.values, self.describe, self.options = grid, values, describe, options

        def __call__(self, *pointers):
            made.append(self)
            self.descriptors = [self.describe(which, each) for which, each in enumerate(pointers)]

    kernels._launch_of.cache_clear()
    monkeypatch.setattr(kernels, "DescribedLaunch", Launch)
    monkeypatch.setattr(kernels.device, "num_multiprocessors", lambda of: 132)
    yield made
    kernels._launch_of.cache_clear()


def test_descriptors_and_programs(captured):
    x, weight = torch.empty(2, 4096, 1024, dtype=torch.bfloat16), torch.empty(6144, 1024, dtype=torch.bfloat16)
    assert kernels.launch(x, weight, "silu").shape == (2, 4096, 3072)
    assert kernels.launch(x[..., :640], weight[:, :640], "").shape == (2, 4096, 6144)
    gated, plain = captured
    # 64 x 24 blocks in 12 rounds, for which 128 of the 132 are enough.
    assert gated.grid == (128,)
    assert gated.values[:7] == (64, 24, 16, 3072, 8192 + 128, True, kernels.assembly("silu", torch.bfloat16))
    assert plain.values[:7] == (64, 24, 10, 128, 8192 + 128, False, "")
    shapes = [(list(each.shape), list(each.strides), list(each.block_shape)) for each in gated.descriptors]
    assert shapes == [
        ([8192, 1024], [1024, 1], [128, 64]),
        ([6144, 1024], [1024, 1], [128, 64]),
        ([8192, 3072], [3072, 1], [64, 64]),
    ]
    assert list(plain.descriptors[0].shape) == [8192, 640]
    assert list(plain.descriptors[0].strides) == [1024, 1]


def test_what_the_accelerator_cannot_address_is_refused(captured):
    x, weight = torch.empty(600, 1032, dtype=torch.bfloat16), torch.empty(1024, 1024, dtype=torch.bfloat16)
    assert kernels.launch(x[:, :1024], weight, "silu") is not None
    assert kernels.launch(x[:, 1:1025], weight, "silu") is None
    assert kernels.launch(torch.empty(600, 1025, dtype=torch.bfloat16)[:, :1024], weight, "silu") is None
    assert kernels.launch(x[:, :1024], weight.t(), "silu") is None
    assert kernels.launch(x[:, :1024], weight[:1020], "") is None
    assert len(captured) == 1


# --- the activation, instruction by instruction


def executed(assembly, gate, up, dtype):
    """What the few instructions that are used give for pairs of numbers; sums and products in float32 as on a GPU."""
    bits = {torch.bfloat16: torch.int16, torch.float16: torch.int16}[dtype]
    packed = [each.view(bits).to(torch.int64) & 0xFFFF for each in (gate, up)]
    at = {f"${n + 1}": each[0::2] | (each[1::2] << 16) for n, each in enumerate(packed)}

    def value(name):
        if name.startswith("0f"):
            return torch.tensor(struct.unpack(">f", bytes.fromhex(name[2:]))[0])
        return at[name]

    def as_float(pattern):
        return pattern.to(torch.int32).view(torch.float32)

    def halves(pattern):
        return [(pattern >> shift & 0xFFFF).to(torch.int16).view(dtype) for shift in (0, 16)]

    def pack(low, high):
        return low.view(bits).to(torch.int64) & 0xFFFF | ((high.view(bits).to(torch.int64) & 0xFFFF) << 16)

    for line in assembly.strip("{}").split(";"):
        name, _, rest = line.strip().partition(" ")
        to, *of = [each.strip() for each in re.split(r",(?![^{]*})", rest)] if rest else [""]
        match name.split("."):
            case ["" | ".reg"] | ["", "reg", *_]:
                pass
            case ["shl", _]:
                at[to] = as_float(
                    (at[of[0]] << 16).where(at[of[0]] & 0x8000 == 0, (at[of[0]] << 16 & 0xFFFFFFFF) - 2**32)
                )
            case ["and", _]:
                high = at[of[0]] & 0xFFFF0000
                at[to] = as_float(high.where(high < 2**31, high - 2**32))
            case ["mov", _]:
                at["c"], at["d"] = halves(at[of[0]])
            case ["cvt", "f32", _]:
                at[to] = at[of[0]].float()
            case ["cvt", "rn", _, _]:
                at[to] = pack(at[of[1]].to(dtype), at[of[0]].to(dtype))
            case ["mul", "f32"]:
                at[to] = value(of[0]) * value(of[1])
            case ["fma", *_]:
                at[to] = value(of[0]) * value(of[1]) + value(of[2])
            case ["add", "f32"]:
                at[to] = value(of[0]) + value(of[1])
            case ["ex2", *_]:
                at[to] = torch.exp2(at[of[0]])
            case ["rcp", *_]:
                at[to] = 1 / at[of[0]]
            case ["mul", "rn", _]:
                first, second = halves(at[of[0]]), halves(at[of[1]])
                return torch.stack([low * high for low, high in zip(first, second, strict=True)], 1).flatten()
            case _:
                raise NotImplementedError(line)
    raise AssertionError("it gives nothing")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("act", kernels.EXPONENTS)
def test_the_activation_is_that_of_the_reference(act, dtype):
    large = torch.tensor([0.0, -0.0, 90.0, -90.0, 3e3, -3e3, 6e4, -6e4])
    gate = torch.cat([torch.linspace(-20, 20, 2000), large]).to(dtype)
    up = tensor(2008, seed=1).cpu().to(dtype)
    found = executed(kernels.assembly(act, dtype), gate, up, dtype)
    exact = activation.reference(torch.cat([gate, up]).double(), act)
    # The rounding of act(gate), and that of the product; in float64 too 1 + tanh(u) is a few 1e-16 where it is nothing.
    bound = 2.2 * torch.finfo(dtype).eps * exact.abs() + max(torch.finfo(dtype).tiny, 1e-12)
    assert ((found.double() - exact).abs() <= bound).all()


# --- on the GPU


@hopper
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@given(
    leading=st.sampled_from([(512,), (700,), (2, 300), (1, 1030), (3, 5, 77), (129,), (5000,)]),
    length=st.sampled_from([520, 576, 1000, 2048]),
    columns=st.sampled_from([8, 136, 640, 1000]),
    act=st.sampled_from(["silu", "gelu_tanh", ""]),
    padding=st.sampled_from([0, 8]),
)
@few
def test_products_of_all_shapes(dtype, leading, length, columns, act, padding):
    x = tensor(*leading, length + padding, dtype=dtype)[..., :length]
    weight = tensor(2 * columns if act else columns, length, dtype=dtype, seed=1, scale=length**-0.5)
    y = kernels.launch(x, weight, act)
    exact = F.linear(x.double(), weight.double())
    exact = activation.reference(exact, act) if act else exact
    assert y.dtype == dtype
    assert y.is_contiguous()
    close(y, exact, dtype, size=2.0 + exact.abs().amax())


@hopper
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_it_rounds_where_the_library_does(act):
    x, weight = tensor(2048, 1024, dtype=torch.bfloat16), tensor(6144, 1024, dtype=torch.bfloat16, seed=1, scale=0.03)
    y, theirs = kernels.launch(x, weight, act), by_library(x, weight, None, act)
    # Sums in another order, and the exponential: a bit here and there.
    assert (y != theirs).float().mean() < 0.02


@hopper
def test_one_behind_another_gives_the_same_each_time():
    """Each begins before the one in front has ended, and memory goes from hand to hand."""
    x, scale = tensor(4096, 1024, dtype=torch.bfloat16), tensor(1024, dtype=torch.bfloat16, seed=1)
    gate_up = tensor(6144, 1024, dtype=torch.bfloat16, seed=2, scale=0.03)
    down = tensor(1024, 3072, dtype=torch.bfloat16, seed=3, scale=0.02)

    def call(given):
        with torch.no_grad():
            for _ in range(4):
                given = gated_mlp.gated_mlp(given, gate_up, down, "silu", norm=Norm(scale, 1e-6), residual=given)
        return given

    first = call(x)
    for _ in range(30):
        assert torch.equal(call(x), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x)
    graph.replay()
    assert torch.equal(y, first)


@hopper
def test_operator_and_compiler():
    x = tensor(1024, 1024, dtype=torch.bfloat16)
    weight = tensor(8192, 1024, dtype=torch.bfloat16, seed=1, scale=0.03)
    assert many_tokens.takes(x, weight, None, "silu")
    torch.library.opcheck(many_tokens._product, (x, weight, "silu"))
    expected = many_tokens.product(x, weight, None, "silu")
    compiled = torch.compile(lambda a, b: many_tokens.product(a, b, None, "silu"), fullgraph=True)
    assert torch.equal(compiled(x, weight), expected)


@hopper
def test_gradients_go_by_the_library():
    x = tensor(1024, 1024, dtype=torch.bfloat16).requires_grad_()
    weight = tensor(8192, 1024, dtype=torch.bfloat16, seed=1, scale=0.03)
    assert not many_tokens.takes(x, weight, None, "silu")
    many_tokens.product(x, weight, None, "silu").sum().backward()
    assert x.grad.isfinite().all()
    assert DEVICE == "cuda"
