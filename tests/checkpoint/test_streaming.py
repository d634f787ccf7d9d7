"""The lane that streams through a ring, to a device that is made up: it copies when it pleases, in order.

`test_device.py` has the same with a GPU.
"""

import errno
import os
import sys
import time
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

import relaid
from interrupting import interrupt_main_thread
from kernelgraft import pausing
from kernelgraft.checkpoint import device, reader, streaming
from kernelgraft.checkpoint.files import Checkpoint
from kernelgraft.checkpoint.memory import RegistrationError
from kernelgraft.checkpoint.pieces import Pieces
from kernelgraft.checkpoint.ring import Ring, RingError
from kernelgraft.checkpoint.streaming import StreamingLane
from kernelgraft.errors import CheckpointError
from leftovers import open_files
from made_up_device import CPU, Driver, Stream, made_up_device
from relaid import layouts
from rings import needs_a_ring, open_rings

pytestmark = needs_a_ring


@pytest.fixture(params=[None, 0.0, 0.3], ids=["torch alone", "driver", "driver that refuses some"])
def driver(request):
    """What the driver's library does with it, if it is there."""
    return None if request.param is None else Driver(request.param)


@pytest.fixture(
    params=[(1 << 16, 1 << 16, 1), (1 << 16, 1 << 14, 3), (1 << 18, 1 << 17, 8)], ids=["1x64K", "3x64K", "8x256K"]
)
def streams(request, monkeypatch, driver):
    """The streams of a made-up device, and pieces of some size and number."""
    size, run, count = request.param
    monkeypatch.setattr(streaming, "PIECE", size)
    monkeypatch.setattr(streaming, "RUN", run)
    monkeypatch.setattr(streaming, "STREAMED", size * count)
    with made_up_device(monkeypatch, driver) as made:
        yield made


@pytest.fixture
def weights(tmp_path):
    tensors = relaid.tensors(500, 300, 200)
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint([tmp_path / "model.safetensors"]) as checkpoint:
        yield tensors, checkpoint


def fill(jobs, on_progress=None, others=()):
    reading = reader.Reading()
    reading.streams[CPU] = Stream()
    reading.start([partial(StreamingLane, reading.streams, Ring(8), 2), *others])
    return reading.run(reader._in_order(jobs, streaming.PIECE), (), on_progress)


def jobs_of(lazies, dtype=torch.float32):
    return [(lazy, torch.full(tuple(lazy.shape), torch.nan, dtype=dtype)) for lazy in lazies]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["same", "cast"])
@pytest.mark.parametrize("others", [[], [reader.CpuLane]], ids=["alone", "beside another"])
def test_every_layout_is_filled(streams, dtype, others, weights):
    tensors, checkpoint = weights
    for _ in range(3):
        jobs = jobs_of(layouts(checkpoint), dtype)
        seen = []
        assert fill(jobs, seen.append, others) == sum(seen)
        for (_, out), wanted in zip(jobs, layouts(tensors), strict=True):
            assert torch.equal(out, wanted.to(dtype))


def test_what_goes_straight_to_its_place_goes_by_the_driver(streams, driver, weights):
    tensors, checkpoint = weights
    jobs = [(lazy, torch.empty(lazy.shape)) for lazy in checkpoint.values()]
    fill(jobs)
    assert all(torch.equal(out, tensors[name]) for (_, out), name in zip(jobs, checkpoint, strict=True))
    if driver is not None:
        num_reads = len(reader._in_order(jobs, streaming.PIECE))
        assert driver.copied == num_reads if not driver.refuses else 0 < driver.copied < num_reads
        assert driver.recorded > 0


def test_what_is_begun_goes_on_its_way_while_nothing_more_is_known(streams, weights, monkeypatch):
    """However few pieces it takes."""
    monkeypatch.setattr(reader, "current_streams", lambda _: {CPU: Stream()})
    jobs = jobs_of(list(weights[1].values())[:1])
    num_reads = len(reader._in_order(jobs, streaming.PIECE))
    reading = reader.Reading()
    reading.most = streaming.PIECE
    reading.start([partial(StreamingLane, reading.streams, Ring(8), 2)])
    reading.begin(jobs)
    ends = time.monotonic() + 60
    while sum(each.number_put for each in streams) < num_reads and time.monotonic() < ends:
        time.sleep(0.001)
    assert sum(each.number_put for each in streams) == num_reads
    reading.run([], (), None)


def test_while_it_runs_threads_hand_the_interpreter_over(streams, weights, monkeypatch):
    seen, before = [], sys.getswitchinterval()
    real = Pieces.begin

    def begin(pieces, task):
        seen.append(sys.getswitchinterval())
        real(pieces, task)

    monkeypatch.setattr(Pieces, "begin", begin)
    fill(jobs_of(layouts(weights[1])))
    assert {round(each * 1e6) for each in seen} == {round(pausing.TURN * 1e6)}
    assert before > pausing.TURN
    assert sys.getswitchinterval() == before


def test_pages_that_cannot_be_pinned_serve_as_they_are(streams, driver, weights, monkeypatch):
    @contextmanager
    def refuses(*_args, **_kwargs):
        raise RegistrationError("no")
        yield

    monkeypatch.setattr(streaming, "registered", refuses)
    tensors, checkpoint = weights
    jobs = jobs_of(layouts(checkpoint))
    fill(jobs)
    assert all(torch.equal(out, wanted) for (_, out), wanted in zip(jobs, layouts(tensors), strict=True))
    # It would wait for each, with the interpreter.
    assert driver is None or driver.copied == driver.recorded == 0


def test_a_file_that_was_cut_off_leaves_nothing(streams, weights):
    _, checkpoint = weights
    path = checkpoint.files[0].path
    os.truncate(path, path.stat().st_size - 100_000)
    with pytest.raises(CheckpointError, match=r"ends at byte \d+, in the middle of \S+: it was cut off"):
        fill(jobs_of(layouts(checkpoint)))


def test_a_disk_that_fails_leaves_nothing(streams, weights, monkeypatch):
    real, ended = Ring.completed, []

    def completed(ring):
        found = real(ring)
        ended.extend(found)
        return [(tag, -errno.EIO) for tag, _ in found] if len(ended) > 3 else found

    monkeypatch.setattr(Ring, "completed", completed)
    with pytest.raises(CheckpointError, match=r"safetensors: \S+ cannot be read at byte \d+: .*Input/output error"):
        fill(jobs_of(layouts(weights[1])))


def test_an_error_elsewhere_ends_it(streams, weights):
    def fails():
        raise CheckpointError("another lane cannot be made")

    with pytest.raises(CheckpointError, match="another lane"):
        fill(jobs_of(layouts(weights[1])), others=[fails])


def test_ctrl_c_ends_it(streams, weights, monkeypatch):
    seen = []
    real = Pieces.begin

    def interrupt(nbytes):
        if not seen:
            interrupt_main_thread()
        seen.append(nbytes)

    def slow(pieces, task):
        time.sleep(0.01)
        real(pieces, task)

    monkeypatch.setattr(Pieces, "begin", slow)
    jobs = jobs_of(layouts(weights[1]) * 20)
    with pytest.raises(KeyboardInterrupt):
        fill(jobs, interrupt)
    assert 0 < len(seen) < 50


def test_it_is_stopped_before_it_has_read_anything(streams):
    reading = reader.Reading()
    reading.start([partial(StreamingLane, reading.streams, Ring(8), 2)])
    reading.stop()


def test_a_failed_registration_gives_everything_back(streams, monkeypatch):
    @contextmanager
    def breaks(*_args, **_kwargs):
        raise RuntimeError("the driver is gone")
        yield

    monkeypatch.setattr(streaming, "registered", breaks)
    with pytest.raises(RuntimeError, match="the driver is gone"):
        StreamingLane({}, Ring(8), 1)


def test_threads_that_cannot_be_limited_give_everything_back(streams, monkeypatch):
    def fails(*_):
        raise RingError("io_uring's threads cannot be limited")

    monkeypatch.setattr(Ring, "limit", fails)
    with pytest.raises(RingError, match="cannot be limited"):
        StreamingLane({}, Ring(8), 1)


def test_lanes_that_nobody_starts_leave_nothing(streams):
    lanes, _ = device.device_lanes({}, 2)
    assert open_rings() > 0
    del lanes


def test_files_are_let_go(streams, weights, tmp_path):
    _, checkpoint = weights
    fill(jobs_of(layouts(checkpoint)))
    checkpoint.close()
    assert open_files(tmp_path) == []
