"""Shapes, tensors and tolerances that the tests of the kernels draw from."""

import importlib.util
import shutil

import pytest
import torch
from hypothesis import HealthCheck, settings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
few = settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck), derandomize=True)
"""For rules that each take a run of the interpreter."""

by_inductor = pytest.mark.skipif(shutil.which("g++") is None, reason="the inductor takes a compiler of C++")
"""The mark of a test that compiles with torch's inductor."""


def tensor(*shape, dtype=torch.float32, seed=0, scale=1.0, offset=0.0):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + offset
    return made.to(DEVICE, dtype)


def close(found, exact, dtype, terms=1, size=0.0):
    """Whether `found` is `exact`, which was computed in float32 or more, up to what rounding to `dtype` explains.

    Args:
        found: What a kernel gave.
        exact: The same from a reference in higher precision.
        dtype: The dtype of the kernel's inputs.
        terms: How many products are added up into one number.
        size: How large what is added up is, where the sum may be far smaller.
    """
    exact = exact.to(found.device)
    assert found.shape == exact.shape
    eps = torch.finfo(dtype).eps
    # A few roundings of the result, and those of the terms, whose errors add up as the root of their number.
    bound = (
        eps * (2 * exact.abs() + 3 * size + exact.abs().mean() + terms**0.5 * exact.pow(2).mean().sqrt() / 4) + 1e-30
    )
    error = (found.to(exact.dtype) - exact).abs()
    assert (error <= bound).all(), f"{(error / bound).max():.2f} times what is allowed"


@pytest.fixture
def in_triton(monkeypatch):
    """On a CPU too the kernels run in Triton, in its interpreter."""
    from kernelgraft.kernels import device

    monkeypatch.setattr(device, "in_triton", lambda x: True)


@pytest.fixture(autouse=True)
def rounded(monkeypatch):
    """Triton's interpreter rounds to bfloat16 as a GPU does; by itself it cuts off."""
    if DEVICE == "cuda" or importlib.util.find_spec("triton") is None:
        return
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_rounded(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        bits = torch.tensor(data.view("float32")).bfloat16().view(torch.int16)
        return bits.numpy().view("uint16")

    monkeypatch.setattr(interpreter, "_convert_float", convert_rounded)


@pytest.fixture
def few_are_four(monkeypatch):
    """The interpreter is slow: what runs for 65 tokens runs for 5."""
    from kernelgraft.kernels import few_tokens

    monkeypatch.setattr(few_tokens, "MAX_TOKENS", 4)


@pytest.fixture
def launched(monkeypatch):
    """How often each kernel of attention was launched."""
    from kernelgraft.kernels import decode_attention, one_token_attention, rotary

    counts = {}
    modules = (
        (rotary, "launch"),
        (rotary, "launch_into"),
        (one_token_attention, "launch"),
        (decode_attention, "launch"),
    )
    for module, name in modules:
        run = getattr(module, name)
        key = f"{module.__name__.rpartition('.')[2]}.{name}"
        counts[key] = 0

        def counted(*args, run=run, key=key, **kwargs):
            counts[key] += not args[0].is_meta  # where a graft prepares, nothing is launched
            return run(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    return counts


def beside_the_originals(found, graft, wanted):
    """Gradients of a grafted model, by the names that its parameters have, and the originals' put together."""
    for name, grad in found.items():
        sources = [original for original, packed in graft.names.items() if name in packed] or [name]
        yield name, grad, torch.cat([wanted[source] for source in sources if source in wanted])  # a tied one once
