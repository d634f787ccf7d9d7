"""A kernel that is launched again is found without Triton's search, and is the kernel that Triton would have found."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from kernelgraft.kernels import device, launching
from kernelgraft.kernels.launching import Launch


def test_by_a_driver_that_writes_down_what_it_gets():
    script = Path(__file__).with_name("launched_without_gpu.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@triton.jit
def _doubled(x_ptr, y_ptr, num, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < num, other=0.0) * 2, mask=at < num)


def test_what_is_launched_runs():
    launch = Launch(_doubled, (2,), (20, 16), num_warps=1)
    for start in (0, 1, 4):
        x = torch.arange(40.0, device="cuda" if torch.cuda.is_available() else "cpu")[start:]
        y = torch.zeros_like(x)
        for _ in range(2):
            launch(x, y)
            assert torch.equal(y[:20], 2 * x[:20])
            assert not y[20:].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_follows_the_stream_and_is_captured_in_a_graph():
    launch, x = Launch(_doubled, (2,), (20, 16), num_warps=1), torch.arange(20.0, device="cuda")
    y = torch.zeros_like(x)
    launch(x, y)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch(y, x)
    stream.synchronize()
    assert torch.equal(x, 2 * y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(x, y)
    x.fill_(3)
    graph.replay()
    assert (y == 6).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_gpu_that_is_not_the_current_one():
    launch = Launch(_doubled, (2,), (20, 16), num_warps=1)
    for index in (1, 0, 1):
        x = torch.arange(20.0, device=f"cuda:{index}")
        y = torch.zeros_like(x)
        launch(x, y)
        assert torch.equal(y, 2 * x)
        assert torch.cuda.current_device() == 0


class Recorder:
    """A kernel in Triton's place."""

    pre_run_hooks = ()

    def __init__(self, made):
        self.made, self.calls = made, 0

    def __getitem__(self, grid):
        def run(*_, **__):
            self.calls += 1
            return self.made

        return run


CUDA, HIP = (SimpleNamespace(target=SimpleNamespace(backend=name)) for name in ("cuda", "hip"))


@pytest.mark.parametrize(
    "made",
    [
        None,
        object(),
        SimpleNamespace(metadata=CUDA, run=None),
        SimpleNamespace(metadata=HIP, run=None, function=1, packed_metadata=2),
        SimpleNamespace(run=None, function=1, packed_metadata=2),
    ],
)
def test_a_kernel_that_it_does_not_know_how_to_run_is_left_to_triton(monkeypatch, made):
    monkeypatch.setattr(launching, "_KNOWN", True)
    monkeypatch.setattr(device, "in_triton", lambda x: True)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0))
    monkeypatch.setattr(triton.runtime, "driver", driver)
    kernel = Recorder(made)
    launch = Launch(kernel, (1,), ())
    for _ in range(3):
        launch(torch.zeros(4))
    assert kernel.calls == 3
