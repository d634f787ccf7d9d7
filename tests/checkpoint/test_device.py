"""Reads into the memory of a GPU, every way; these tests need one."""

import gc
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import kernelgraft
import relaid
from kernelgraft.checkpoint import device, memory, positioned, streaming
from kernelgraft.checkpoint.device import ReadingLane
from kernelgraft.checkpoint.files import Checkpoint
from kernelgraft.checkpoint.memory import PAGE
from kernelgraft.checkpoint.reader import fill
from kernelgraft.checkpoint.ring import RingError
from kernelgraft.errors import CheckpointError
from leftovers import mappings, open_files, our_threads
from relaid import layouts
from rings import needs_a_ring, open_rings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

GPU = torch.device("cuda", 0)


@pytest.fixture
def weights(tmp_path):
    tensors = relaid.tensors(1500, 1000, 500)
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint([tmp_path / "model.safetensors"]) as checkpoint:
        yield tensors, checkpoint


LANES = {
    "both": (2, 3),
    "registering": (3, 0),
    "reading": (0, 3),
    "refused": (2, 2),
}


@pytest.fixture
def without_a_ring(monkeypatch):
    """The kernel grants none."""

    def refuses(*_):
        raise RingError("no")

    monkeypatch.setattr(streaming, "ring_for_another", refuses)


@pytest.fixture(params=[*LANES, pytest.param("streaming", marks=needs_a_ring)])
def way(request, monkeypatch):
    """Which lanes there are; "refused" is a driver that takes no pages of files."""
    if request.param != "streaming":
        request.getfixturevalue("without_a_ring")
        monkeypatch.setattr(device, "REGISTERING", LANES[request.param][0])
        monkeypatch.setattr(device, "READING", LANES[request.param][1])
    monkeypatch.setattr(device, "CHUNK", 1 << 18)
    monkeypatch.setattr(streaming, "PIECE", 1 << 17)
    monkeypatch.setattr(streaming, "RUN", 1 << 16)
    monkeypatch.setattr(streaming, "STREAMED", 5 << 17)
    monkeypatch.setattr(device, "REGISTERED", 1 << 20)
    if request.param == "refused":
        real = memory.registered

        def refuses(address, nbytes, pinned, *, read_only):
            return real(1 if read_only else address, nbytes, pinned, read_only=read_only)  # no page is there

        monkeypatch.setattr(device, "registered", refuses)
    return request.param


def empty(shape, dtype, odd):
    if not odd:
        return torch.full(shape, torch.nan, dtype=dtype, device=GPU)
    return torch.full((*shape, 2), torch.nan, dtype=dtype, device=GPU)[..., 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["same", "cast"])
@pytest.mark.parametrize("odd", [False, True], ids=["contiguous", "strided"])
def test_every_layout_is_filled(way, dtype, odd, weights):
    tensors, checkpoint = weights
    jobs = [(lazy, empty(tuple(lazy.shape), dtype, odd)) for lazy in layouts(checkpoint)]
    fill(jobs)
    for (_, out), wanted in zip(jobs, layouts(tensors), strict=True):
        assert torch.equal(out.cpu(), wanted.to(dtype))
    assert device.pinned.bytes == 0


@pytest.mark.parametrize(
    "way", ["registering", "reading", pytest.param("streaming", marks=needs_a_ring)], indirect=True
)
def test_pages_are_registered(way, weights, monkeypatch):
    """A driver that refuses is gone round without a word: with one that always does, all else here would pass."""
    _, checkpoint = weights
    read, real = [], ReadingLane.run
    monkeypatch.setattr(ReadingLane, "run", lambda lane, task: (read.append(lane), real(lane, task)))
    monkeypatch.setattr(device.pinned, "peak_bytes", 0)
    # Each byte to one place: a page that goes to two may be another thread's at the moment, and is read.
    fill([(lazy, empty(tuple(lazy.shape), torch.float32, odd=False)) for lazy in checkpoint.values()])
    least = {
        "registering": device.REGISTERED - 2 * PAGE,  # its ends are no whole pages
        "reading": 2 * device.CHUNK,
        "streaming": streaming.STREAMED,
    }
    assert device.pinned.peak_bytes >= least[way]
    assert bool(read) == (way == "reading")


@pytest.mark.parametrize("streams", [False, pytest.param(True, marks=needs_a_ring)], ids=["threads", "streaming"])
def test_memory_beyond_the_tensors_is_small(streams, weights, monkeypatch, request):
    _, checkpoint = weights
    if not streams:
        request.getfixturevalue("without_a_ring")
    monkeypatch.setattr(device.pinned, "peak_bytes", 0)
    jobs = [(lazy, empty(tuple(lazy.shape), torch.float32, odd=False)) for lazy in layouts(checkpoint)]
    torch.cuda.reset_peak_memory_stats()
    # What was asked for: the allocator may hand out a block that is larger, if it has one of another test.
    asked = "requested_bytes.all."
    before = torch.cuda.memory_stats()[f"{asked}current"]
    fill(jobs)
    after = torch.cuda.memory_stats()
    lanes = 1 if streams else device.REGISTERING + device.READING
    assert after[f"{asked}peak"] - before <= lanes * device.CHUNK
    assert after[f"{asked}current"] == before
    by_threads = device.REGISTERING * device.REGISTERED + 2 * device.READING * device.CHUNK
    assert device.pinned.peak_bytes <= (streaming.STREAMED if streams else by_threads)


@needs_a_ring
def test_pieces_are_used_again_and_again_while_the_device_is_slow(weights, monkeypatch):
    tensors, checkpoint = weights
    monkeypatch.setattr(streaming, "PIECE", 1 << 16)
    monkeypatch.setattr(streaming, "RUN", 1 << 16)
    monkeypatch.setattr(streaming, "STREAMED", 3 << 16)
    real = streaming.StreamingLane._enter

    def enter(lane, device):
        real(lane, device)
        torch.cuda._sleep(2_000_000)  # on the lane's stream, before each copy

    monkeypatch.setattr(streaming.StreamingLane, "_enter", enter)
    jobs = [(lazy, empty(tuple(lazy.shape), torch.float32, odd=False)) for lazy in layouts(checkpoint)[:3]]
    fill(jobs)
    for (_, out), wanted in zip(jobs, layouts(tensors), strict=False):
        assert torch.equal(out.cpu(), wanted)


@needs_a_ring
def test_a_file_that_was_cut_off_leaves_nothing_pinned(weights):
    _, checkpoint = weights
    path = checkpoint.files[0].path
    os.truncate(path, path.stat().st_size - 100_000)
    with pytest.raises(CheckpointError, match=r"ends at byte \d+, in the middle of"):
        fill([(lazy, empty(tuple(lazy.shape), torch.float32, odd=False)) for lazy in layouts(checkpoint)])
    assert device.pinned.bytes == 0
    assert open_rings() == 0
    assert our_threads() == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_several_devices_are_filled_at_once(way, weights):
    tensors, checkpoint = weights
    gpus = [torch.device("cuda", index % 2) for index in range(6)]
    jobs = [
        (lazy, torch.full(tuple(lazy.shape), torch.nan, device=gpu))
        for lazy, gpu in zip(layouts(checkpoint), gpus, strict=True)
    ]
    fill(jobs)
    for (_, out), wanted in zip(jobs, layouts(tensors), strict=True):
        assert torch.equal(out.cpu(), wanted)


def test_work_that_was_enqueued_before_is_waited_for(weights):
    tensors, checkpoint = weights
    for _ in range(5):
        old = torch.full((1500, 1000), 1.0, device=GPU)
        torch.cuda._sleep(20_000_000)
        old.mul_(2)
        del old  # its memory is handed on while the product still waits
        out = torch.empty(1500, 1000, device=GPU)
        fill([(checkpoint["a"], out)])
        assert torch.equal(out.cpu(), tensors["a"])


@pytest.mark.usefixtures("without_a_ring")
def test_a_disk_that_fails_leaves_nothing_pinned(weights, monkeypatch):
    _, checkpoint = weights

    def fails(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(positioned, "preadv", fails)
    monkeypatch.setattr(device, "REGISTERING", 0)
    with pytest.raises(CheckpointError, match="cannot be read at byte"):
        fill([(lazy, empty(tuple(lazy.shape), torch.float32, odd=False)) for lazy in layouts(checkpoint)])
    assert device.pinned.bytes == 0
    assert our_threads() == []
    torch.zeros(1, device=GPU).add_(1)
    torch.cuda.synchronize()


def test_a_module_goes_to_the_gpu_and_its_file_is_let_go(tmp_path):
    model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 100))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        loaded = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 100))
    kernelgraft.load(loaded, tmp_path, device=GPU)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    gc.collect()
    assert mappings(tmp_path) == []
    assert open_files(tmp_path) == []
