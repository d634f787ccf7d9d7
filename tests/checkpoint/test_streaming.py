"""The lane that streams through a ring, to a device that is made up: it copies when it pleases, in order.

`test_device.py` has the same with a GPU.
"""

import os
import random
import signal
import threading
import time
from collections import deque
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from test_files import open_files

from kernelgraft.checkpoint import device, reader
from kernelgraft.checkpoint.device import StreamingLane
from kernelgraft.checkpoint.files import Checkpoint
from kernelgraft.checkpoint.memory import RegistrationError
from kernelgraft.checkpoint.pieces import Pieces
from kernelgraft.errors import CheckpointError
from rings import needs_a_ring, open_rings

pytestmark = needs_a_ring

CPU = torch.device("cpu")


class Stream:
    """Work that waits until somebody waits for it, or a little longer."""

    random = random.Random(0)

    def __init__(self, device=CPU):
        self.waiting = deque()
        self.number_done = 0
        self.number_put = 0

    def put(self, work):
        self.waiting.append(work)
        self.number_put += 1

    def do(self, upto):
        while self.number_done < upto:
            self.waiting.popleft()()
            self.number_done += 1

    def synchronize(self):
        self.do(self.number_put)

    def wait_stream(self, other):
        other.synchronize()


class Event:
    def record(self, stream):
        self.stream, self.upto = stream, stream.number_put

    def query(self):
        stream = self.stream
        stream.do(min(stream.number_put, stream.number_done + stream.random.choice([0, 0, 1, 3])))
        return stream.number_done >= self.upto

    def synchronize(self):
        self.stream.do(self.upto)


@pytest.fixture(params=[(1 << 16, 1), (1 << 16, 3), (1 << 18, 8)], ids=["1x64K", "3x64K", "8x256K"])
def streams(request, monkeypatch):
    """The streams of a made-up device, and pieces of some size and number."""
    size, count = request.param
    monkeypatch.setattr(device, "PIECE", size)
    monkeypatch.setattr(device, "STREAMED", size * count)
    made = []

    def stream(of):
        made.append(Stream(of))
        return made[-1]

    @contextmanager
    def register(address, nbytes, pinned, *, read_only):
        pinned.add(nbytes)
        yield
        assert not any(each.waiting for each in made)  # the device still reads it
        pinned.add(-nbytes)

    real = StreamingLane._send

    def send(lane, read, source):
        lane._enter(read.out.device)
        lane._streams[read.out.device].put(partial(real, lane, read, source))

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(device, "registered", register)
    monkeypatch.setattr(StreamingLane, "_send", send)
    yield made
    assert device.pinned.bytes == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kernelgraft")]
    assert open_rings() == 0


@pytest.fixture
def weights(tmp_path):
    tensors = {name: torch.randn(500, 300) for name in "abcd"}
    tensors |= {f"small.{i}": torch.randn(7, 3) for i in range(200)}
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint([tmp_path / "model.safetensors"]) as checkpoint:
        yield tensors, checkpoint


def layouts(given):
    small = [given[f"small.{i}"] for i in range(200)]
    return [
        given["a"],
        torch.cat([given["b"], given["c"]]),
        given["d"].t(),
        torch.stack(small, 1),
        given["a"][100:400, 3:200],
        torch.stack([given["b"], given["c"]], 1).transpose(0, 2),
    ]


def fill(jobs, on_progress=None, others=()):
    reading = reader.Reading()
    reading.streams[CPU] = Stream()
    reading.start([partial(StreamingLane, reading.streams, 2), *others])
    return reading.run(reader._in_order(jobs, device.PIECE), (), on_progress)


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


def test_pages_that_cannot_be_pinned_serve_as_they_are(streams, weights, monkeypatch):
    @contextmanager
    def refuses(*_args, **_kwargs):
        raise RegistrationError("no")
        yield

    monkeypatch.setattr(device, "registered", refuses)
    tensors, checkpoint = weights
    jobs = jobs_of(layouts(checkpoint))
    fill(jobs)
    assert all(torch.equal(out, wanted) for (_, out), wanted in zip(jobs, layouts(tensors), strict=True))


def test_a_file_that_was_cut_off_leaves_nothing(streams, weights):
    _, checkpoint = weights
    path = checkpoint.files[0].path
    os.truncate(path, path.stat().st_size - 100_000)
    with pytest.raises(CheckpointError, match=r"ends at byte \d+, in the middle of \S+: it was cut off"):
        fill(jobs_of(layouts(checkpoint)))


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
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
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
    reading.start([partial(StreamingLane, reading.streams, 2)])
    reading.stop()


def test_a_failed_registration_gives_everything_back(streams, monkeypatch):
    @contextmanager
    def breaks(*_args, **_kwargs):
        raise RuntimeError("the driver is gone")
        yield

    monkeypatch.setattr(device, "registered", breaks)
    with pytest.raises(RuntimeError, match="the driver is gone"):
        StreamingLane({}, 1)


def test_files_are_let_go(streams, weights, tmp_path):
    _, checkpoint = weights
    fill(jobs_of(layouts(checkpoint)))
    checkpoint.close()
    assert open_files(tmp_path) == []
