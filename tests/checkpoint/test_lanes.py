"""Which lanes read to devices: one through a ring where the kernel grants one, and threads where it does not."""

import ctypes
import errno
import logging
import os
import resource
import struct
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from forked import forked
from kernelgraft.checkpoint import device, memory, reader, ring, sending, streaming
from kernelgraft.checkpoint.device import ReadingLane, RegisteringLane, device_lanes
from kernelgraft.checkpoint.files import Checkpoint
from kernelgraft.checkpoint.memory import PAGE
from kernelgraft.checkpoint.ring import Ring, RingError
from kernelgraft.checkpoint.streaming import StreamingLane
from made_up_device import CPU, Driver, OnDevice, Stream, made_up_device
from rings import needs_a_ring, open_rings, refusal

NUMBERS = {"setup": ring._SETUP, "enter": ring._ENTER, "register": ring._REGISTER}
# As of an administrator or a container, a kernel or a container, a kernel before 5.15, and too little memory.
CODES = {"EPERM": errno.EPERM, "ENOSYS": errno.ENOSYS, "EINVAL": errno.EINVAL, "ENOMEM": errno.ENOMEM}

each_call = pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS.keys())

forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def _few_threads(monkeypatch):
    monkeypatch.setattr(device, "REGISTERING", 1)
    monkeypatch.setattr(device, "READING", 3)


def kinds(lanes):
    return [lane.func for lane in lanes]


def assert_threads_read():
    assert refusal().startswith("io_uring cannot be used: ")
    lanes, most = device_lanes({}, 2)
    assert (kinds(lanes), most) == ([RegisteringLane, ReadingLane, ReadingLane], device.CHUNK)


@needs_a_ring
def test_where_a_ring_is_granted_one_thread_streams():
    lanes, most = device_lanes({}, 2)
    assert (kinds(lanes), most) == ([StreamingLane], streaming.PIECE)


@needs_a_ring
def test_the_ring_of_which_that_was_found_out_is_the_one_that_is_used(monkeypatch):
    rings, real = [], Ring.__init__

    def init(self, entries):
        if rings:
            raise RingError("no second one")
        rings.append(entries)
        real(self, entries)

    monkeypatch.setattr(Ring, "__init__", init)
    with made_up_device(monkeypatch):
        [lane], _ = device_lanes({}, 2)
        lane().close()
    assert rings == [streaming.STREAMED // streaming.RUN]


def limits(granted):
    """How many of the kernel's threads may read for this thread; there must be a ring to ask by."""
    found = (ctypes.c_uint * 2)(0, 0)  # they stay as they are
    ring._call(ring._REGISTER, granted._fd, ring._MAX_WORKERS, found, 2)
    return list(found)


@needs_a_ring
def test_rings_of_the_calling_thread_keep_their_threads(weights, monkeypatch):
    monkeypatch.setattr(reader, "_cores", lambda: 3)
    with made_up_device(monkeypatch):
        own = Ring(4)
        before = limits(own)
        assert before != [3, 3]
        fill([weights[1]["a.0"]])
        assert limits(own) == before
        own.close()


# --- what refuses


@each_call
@pytest.mark.parametrize("code", CODES.values(), ids=CODES.keys())
def test_where_the_kernel_refuses_threads_read(number, code, monkeypatch):
    real = ring._call

    def call(asked, *arguments, **options):
        if asked == number:
            raise OSError(code, os.strerror(code))
        return real(asked, *arguments, **options)

    before = open_rings()
    monkeypatch.setattr(ring, "_call", call)
    assert_threads_read()
    assert open_rings() == before


@needs_a_ring
@pytest.mark.parametrize("failing", [0, 1])
def test_where_a_ring_cannot_be_mapped_threads_read(failing, monkeypatch):
    real, asked = ring._mapped, []

    def mapped(*arguments):
        asked.append(arguments)
        if len(asked) % 2 == (failing + 1) % 2:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return real(*arguments)

    monkeypatch.setattr(ring, "_mapped", mapped)
    with pytest.raises(RingError, match="Cannot allocate memory"):
        Ring(4)
    assert len(asked) == failing + 1
    assert open_rings() == 0


def test_elsewhere_than_on_linux_threads_read(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert kinds(device_lanes({}, 1)[0]) == [RegisteringLane, ReadingLane]


def refuse_as_containers_do(number, code):
    """Let this process, from now on, get an error from one system call."""
    # Load the number of the call; if it is this one, fail with this code; else go on.
    steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | code), (0x06, 0, 0, 0x7FFF0000)]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    libc = ctypes.CDLL(None)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, struct.pack("@HP", len(steps), ctypes.addressof(filters)), 0, 0) == 0  # PR_SET_SECCOMP


@needs_a_ring
@forks
@each_call
@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS], ids=["EPERM", "ENOSYS"])
def test_where_a_container_refuses_threads_read(number, code):
    def confined():
        refuse_as_containers_do(number, code)
        assert refusal().startswith(f"io_uring cannot be used: [Errno {code}]")
        assert_threads_read()
        assert open_rings() == 0

    assert forked(confined) == "done"


@needs_a_ring
@forks
def test_where_no_descriptor_is_left_threads_read():
    def without_descriptors():
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        assert "Too many open files" in refusal()
        assert_threads_read()

    assert forked(without_descriptors) == "done"


@needs_a_ring
@forks
@pytest.mark.parametrize("pages", [0, 1])
def test_where_no_memory_may_be_locked_threads_read_if_the_kernel_counts_it(pages):
    def with_little_locked_memory():
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (pages * PAGE, pages * PAGE))
        if os.getuid() == 0:
            os.setresuid(65534, 65534, 65534)  # root may lock what it likes
        # Linux 6.18 counts a ring's two pages, as 5.11 did, and those of all rings of a user; others between do not.
        if refusal() is None:
            assert kinds(device_lanes({}, 2)[0]) == [StreamingLane]
        else:
            assert "Cannot allocate memory" in refusal()
            assert_threads_read()

    assert forked(with_little_locked_memory) == "done"


# --- what they do


WAYS = [pytest.param(True, id="ring", marks=needs_a_ring), pytest.param(False, id="threads")]


@pytest.fixture(params=WAYS)
def granted(request, monkeypatch):
    """Whether there is a ring."""

    def refuses(*_):
        raise RingError("io_uring cannot be used: [Errno 1] EPERM, Operation not permitted")

    if not request.param:
        monkeypatch.setattr(streaming, "ring_for_another", refuses)
    return request.param


@pytest.fixture
def weights(tmp_path):
    tensors = {f"{name}.{i}": torch.randn(300, 100 + i) for name in "ab" for i in range(40)}
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint([tmp_path / "model.safetensors"]) as checkpoint:
        yield tensors, checkpoint


def fill(lazies):
    outs = [torch.full(tuple(lazy.shape), torch.nan) for lazy in lazies]
    reading = reader.ready_for_cuda()
    reading.streams[CPU] = Stream()
    reading.run(reader._in_order(zip(lazies, outs, strict=True), reading.most), (), None)
    return outs


def make_small(monkeypatch):
    for module, name, nbytes in (
        (streaming, "PIECE", 1 << 16),
        (streaming, "RUN", 1 << 15),
        (streaming, "STREAMED", 5 << 16),
        (device, "CHUNK", 1 << 17),
        (device, "REGISTERED", 1 << 18),
    ):
        monkeypatch.setattr(module, name, nbytes)


def by_threads(monkeypatch, registering, reading):
    """So many of each, and no ring."""

    def refuses(*_):
        raise RingError("no")

    monkeypatch.setattr(streaming, "ring_for_another", refuses)
    monkeypatch.setattr(device, "REGISTERING", registering)
    monkeypatch.setattr(device, "READING", reading)


def test_either_way_tensors_are_filled(granted, weights, monkeypatch):
    make_small(monkeypatch)
    tensors, checkpoint = weights
    ran = set()
    for lane in (StreamingLane, ReadingLane, RegisteringLane):

        def run(self, task, real=lane.run):
            ran.add(type(self))
            real(self, task)

        monkeypatch.setattr(lane, "run", run)

    def layouts(given):
        stacked = torch.cat([given[f"b.{i}"] for i in range(40)], 1)
        return [*[given[f"a.{i}"] for i in range(40)], stacked, given["b.3"].t(), given["b.4"][7:200, 3:]]

    with made_up_device(monkeypatch):
        for _ in range(5):
            outs = fill(layouts(checkpoint))
            assert all(torch.equal(out, wanted) for out, wanted in zip(outs, layouts(tensors), strict=True))
    assert (StreamingLane in ran) == granted
    assert bool(ran & {ReadingLane, RegisteringLane}) != granted


def test_some_are_begun_before_the_others_are_known(granted, weights, monkeypatch):
    make_small(monkeypatch)
    monkeypatch.setattr(reader, "current_streams", lambda _: {CPU: Stream()})
    tensors, checkpoint = weights
    with made_up_device(monkeypatch):
        for number in (0, 1, 40, 79, 80):
            jobs = [(lazy, torch.full(tuple(lazy.shape), torch.nan)) for lazy in checkpoint.values()]
            reading = reader.ready_for_cuda()
            reading.begin(jobs[:number])
            time.sleep(0.01 * (number % 2))
            total = reading.run(reader._in_order(jobs[number:], reading.most), (), None)
            assert total == sum(tensor.nbytes for tensor in tensors.values())
            assert all(torch.equal(out, tensors[name]) for name, (_, out) in zip(checkpoint, jobs, strict=True))


def test_a_device_copies_by_itself_only_what_its_own_thread_has_registered(weights, monkeypatch):
    """Another thread, to which some of the same pages go, has them for a while, and takes them away."""
    for name, number in {"CHUNK": 1 << 13, "REGISTERED": 1 << 15}.items():
        monkeypatch.setattr(device, name, number)
    by_threads(monkeypatch, 3, 0)
    tensors, checkpoint = weights
    mine, strange, real_copy = threading.local(), [], torch.Tensor.copy_
    mapped = checkpoint.files[0].shared

    def copy(self, source, **kwargs):
        begin = source.data_ptr() - mapped.address
        if 0 <= begin < mapped.nbytes:
            low, high = mine.registered
            if not low <= begin <= begin + source.nbytes <= high:
                strange.append((begin, source.nbytes, low, high))
        return real_copy(self, source, **kwargs)

    with made_up_device(monkeypatch):
        real = device.registered

        @contextmanager
        def register(address, nbytes, *args, **kwargs):
            mine.registered = address - mapped.address, address - mapped.address + nbytes
            with real(address, nbytes, *args, **kwargs):
                yield

        monkeypatch.setattr(device, "registered", register)
        monkeypatch.setattr(torch.Tensor, "copy_", copy)
        names = [*tensors, "a.1", "b.2"]
        assert all(
            torch.equal(out, tensors[name])
            for name, out in zip(names, fill([checkpoint[name] for name in names]), strict=True)
        )
        monkeypatch.undo()
    assert strange == []


@pytest.mark.parametrize("way", ["registering", "reading", pytest.param("streaming", marks=needs_a_ring)])
def test_pages_are_registered(way, weights, monkeypatch):
    """A driver that refuses is gone round without a word."""
    make_small(monkeypatch)
    if way != "streaming":
        by_threads(monkeypatch, 2 * (way == "registering"), int(way == "reading"))
    monkeypatch.setattr(sending.pinned, "peak_bytes", 0)
    read, real = [], ReadingLane.run
    monkeypatch.setattr(ReadingLane, "run", lambda lane, task: (read.append(lane), real(lane, task)))
    tensors, checkpoint = weights
    with made_up_device(monkeypatch):
        outs = fill(list(checkpoint.values()))
        asked = torch.cuda.cudart().asked
    assert all(torch.equal(out, tensors[name]) for name, out in zip(checkpoint, outs, strict=True))
    if way == "registering":
        mapped = checkpoint.files[0].shared
        assert {flags for _, _, flags in asked} == {memory._REGISTER_READ_ONLY}
        assert all(mapped.address <= low < low + size <= mapped.address + mapped.nbytes for low, size, _ in asked)
        assert sum(size for _, size, _ in asked) > mapped.nbytes - 2 * PAGE * (len(asked) + 1)
        assert sending.pinned.peak_bytes >= max(size for _, size, _ in asked) > device.CHUNK
        assert read == []
    else:
        nbytes = [streaming.STREAMED] if way == "streaming" else [device.CHUNK] * 2
        assert [(size, flags) for _, size, flags in asked] == [(each, 0) for each in nbytes]
        assert sending.pinned.peak_bytes == sum(nbytes)
        assert bool(read) == (way == "reading")


def small_and_large(tmp_path):
    tensors = {f"{i}": torch.randn(*shape) for i, shape in enumerate([(7, 3), (300, 100), (5, 9)] * 60)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors


TWO = {
    "ring, torch alone": (None, 0, 0, 0.0),
    "ring, driver": (Driver(), 0, 0, 0.0),
    "ring, driver that refuses some": (Driver(0.3), 0, 0, 0.0),
    "registering": (None, 3, 0, 0.0),
    "registering, often refused": (None, 2, 0, 0.5),
    "reading": (None, 0, 3, 0.0),
}


@pytest.mark.parametrize(
    ("driver", "registering", "reading", "refuses"),
    [pytest.param(*way, id=name, marks=needs_a_ring if name.startswith("ring") else ()) for name, way in TWO.items()],
)
def test_two_devices_are_filled_at_once(driver, registering, reading, refuses, tmp_path, monkeypatch):
    """What goes to a device is enqueued on a stream of that device, and is not read over before it is there."""
    make_small(monkeypatch)
    if registering or reading:
        by_threads(monkeypatch, registering, reading)
    monkeypatch.setattr(reader, "goes_to_cuda", lambda _: True)
    monkeypatch.setattr(reader, "current_streams", lambda devices: {each: Stream(each) for each in devices})
    tensors = small_and_large(tmp_path)
    devices = [torch.device("cpu", 0), torch.device("cpu", 1)]
    owner, strange = {}, []

    def made(lazy, on):
        out = OnDevice.empty(lazy.shape, on)
        owner[out.untyped_storage().data_ptr()] = on, out  # or another tensor might come to lie there
        return lazy, out

    def copied(storage, stream):
        if storage in owner and owner[storage][0] != stream.device:
            strange.append((storage, stream.device))

    real_copy, real_driver = torch.Tensor.copy_, Driver.copy

    def copy(self, source, **kwargs):
        if torch.cuda.current_stream() is not None:  # not in the main thread
            copied(self.untyped_storage().data_ptr(), torch.cuda.current_stream())
        return real_copy(self, source, **kwargs)

    def driver_copy(self, target, source, nbytes, stream):
        copied(target, stream)
        return real_driver(self, target, source, nbytes, stream)

    def layouts(given):
        whole = [given[name] for name in tensors]
        return [*whole, torch.cat([given["1"], given["4"]], 1), given["7"].t(), torch.stack([given["0"], given["3"]])]

    with Checkpoint([tmp_path / "model.safetensors"]) as checkpoint, made_up_device(monkeypatch, driver) as streams:
        torch.cuda.cudart().refuses = refuses
        monkeypatch.setattr(torch.Tensor, "copy_", copy)
        monkeypatch.setattr(Driver, "copy", driver_copy)
        for _ in range(3):
            jobs = [made(lazy, devices[i % 2]) for i, lazy in enumerate(layouts(checkpoint))]
            reader.fill(jobs)
            assert all(torch.equal(out, wanted) for (_, out), wanted in zip(jobs, layouts(tensors), strict=True))
    assert strange == []
    assert {each.device for each in streams} == set(devices)


def test_only_who_looks_for_it_is_told(granted, weights, monkeypatch, caplog):
    with made_up_device(monkeypatch), caplog.at_level(logging.DEBUG, "kernelgraft"):
        fill([weights[1]["a.0"]])
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    reason = "threads read in place of a ring: io_uring cannot be used: [Errno 1] EPERM, Operation not permitted"
    assert told == ([] if granted else [("DEBUG", reason)])
