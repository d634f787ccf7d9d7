"""Calls of the driver's library: that it is found where it is, and on a GPU that it does what torch would."""

import ctypes

import pytest
import torch

from kernelgraft.checkpoint.driver import Driver, driver
from kernelgraft.checkpoint.memory import Mapped, Pinned, registered

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="the driver copies to a GPU")


@pytest.fixture(autouse=True)
def looked_up_anew():
    driver.cache_clear()
    yield
    driver.cache_clear()


def test_there_is_none_where_torch_works_with_something_else(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(ctypes, "PyDLL", lambda _: pytest.fail("it was looked for"))
    assert driver() is None


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_there_is_none_where_the_library_or_a_function_is_missing(error, monkeypatch):
    def missing(_):
        raise error("libcuda.so.1")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(ctypes, "PyDLL", missing)
    assert driver() is None


@needs_a_gpu
@pytest.mark.parametrize("nbytes", [1, 4097, 3 << 20])
def test_it_copies_and_its_events_tell_when(nbytes):
    found, stream, event = driver(), torch.cuda.Stream(), torch.cuda.Event()
    memory, out = Mapped(nbytes), torch.zeros(nbytes + 2, dtype=torch.uint8, device="cuda")
    memory.bytes.random_(1, 255)
    torch.cuda.synchronize()
    event.record(stream)
    with registered(memory.address, nbytes, Pinned(), read_only=False):
        torch.cuda.set_stream(stream)
        torch.cuda._sleep(10_000_000)
        assert found.copy(out.data_ptr() + 1, memory.address, nbytes, stream.cuda_stream)
        assert found.record(event.cuda_event, stream.cuda_stream)
        assert not event.query()
        event.synchronize()
        torch.cuda.set_stream(torch.cuda.default_stream())
    assert torch.equal(out[1:-1].cpu(), memory.bytes)
    assert out[0] == out[-1] == 0
    memory.close()


@needs_a_gpu
def test_what_it_refuses_leaves_no_error_behind():
    found = Driver()
    assert not found.copy(1, 1, 1 << 20, torch.cuda.current_stream().cuda_stream)
    assert not found.record(0, torch.cuda.current_stream().cuda_stream)
    assert float(torch.ones(3, device="cuda").sum()) == 3
