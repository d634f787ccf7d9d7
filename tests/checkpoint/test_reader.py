"""Reads shared out among threads: what they give, what they touch, and what is left when they fail."""

import errno
import os
import re
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from headers import entry, write
from interrupting import interrupt_main_thread
from kernelgraft.checkpoint import positioned, reader
from kernelgraft.checkpoint.files import Checkpoint
from kernelgraft.checkpoint.reader import check_readable, fill
from kernelgraft.checkpoint.waiting import Waiting
from kernelgraft.conversion.lazy import LazyTensor, TensorSource
from kernelgraft.errors import CheckpointError

E, H, INNER = 128, 8, 16


@pytest.fixture
def experts(tmp_path):
    tensors = {f"{i}.{name}": torch.randn(INNER, H) for i in range(E) for name in ("gate", "up")}
    tensors |= {f"{i}.down": torch.randn(H, INNER) for i in range(E)}
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint([tmp_path / "model.safetensors"]) as checkpoint:
        yield tensors, checkpoint


def stacked(given):
    gate, up = (torch.stack([given[f"{i}.{name}"] for i in range(E)]) for name in ("gate", "up"))
    return {"gate_up": torch.cat([gate, up], 1), "down": torch.stack([given[f"{i}.down"] for i in range(E)])}


def empty(lazies):
    return [(lazy, torch.full(lazy.shape, torch.nan, dtype=lazy.dtype)) for lazy in lazies]


@pytest.fixture
def calls(monkeypatch):
    """(offset, bytes) of every read of a file."""
    found = []

    def counted(fd, buffers, offset):
        got = os.preadv(fd, buffers, offset)
        found.append((offset, got))
        return got

    monkeypatch.setattr(positioned, "preadv", counted)
    return found


def test_experts_are_stacked_in_one_pass_over_the_file(experts, calls):
    tensors, checkpoint = experts
    jobs = empty(stacked(checkpoint).values())
    total = fill(jobs, threads=1)
    for (_, out), wanted in zip(jobs, stacked(tensors).values(), strict=True):
        assert torch.equal(out, wanted)
    assert total == sum(got for _, got in calls) == 3 * E * H * INNER * 4
    # Each byte once, in the order of the file, by far fewer calls than there are tensors.
    assert [offset for offset, _ in calls[1:]] == [offset + got for offset, got in calls[:-1]]
    assert len(calls) <= 2


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_fill_what_one_fills(experts, threads, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK", 1000)
    tensors, checkpoint = experts
    jobs = empty([*stacked(checkpoint).values(), stacked(checkpoint)["gate_up"].transpose(1, 2)])
    fill(jobs, threads=threads)
    wanted = [*stacked(tensors).values(), stacked(tensors)["gate_up"].transpose(1, 2)]
    assert all(torch.equal(out, each) for (_, out), each in zip(jobs, wanted, strict=True))


def test_a_slice_reads_its_bytes_alone(experts, calls):
    tensors, checkpoint = experts
    jobs = empty([stacked(checkpoint)["gate_up"][32:64, :4]])
    fill(jobs)
    assert torch.equal(jobs[0][1], stacked(tensors)["gate_up"][32:64, :4])
    assert sum(got for _, got in calls) == 32 * 4 * H * 4


def test_short_reads_are_read_on(experts, monkeypatch):
    tensors, checkpoint = experts

    def short(fd, buffers, offset):
        return os.preadv(fd, [buffers[0][: max(1, len(buffers[0]) // 3)]], offset)

    monkeypatch.setattr(positioned, "preadv", short)
    jobs = empty(stacked(checkpoint).values())
    fill(jobs)
    assert all(torch.equal(out, each) for (_, out), each in zip(jobs, stacked(tensors).values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float32])
def test_casts_are_those_of_torch(experts, dtype):
    tensors, checkpoint = experts
    jobs = [(checkpoint["3.down"], torch.empty(H, INNER, dtype=dtype))]
    jobs += [(checkpoint["3.down"].to(torch.bfloat16), torch.empty(H, INNER, dtype=dtype))]
    fill(jobs)
    assert torch.equal(jobs[0][1], tensors["3.down"].to(dtype))
    assert torch.equal(jobs[1][1], tensors["3.down"].to(torch.bfloat16).to(dtype))


def test_what_is_in_memory_is_copied_beside_what_is_read(experts):
    tensors, checkpoint = experts
    live = torch.randn(INNER, H)
    lazy = torch.cat([LazyTensor.of(TensorSource("live", live)), checkpoint["0.up"]])
    jobs = empty([lazy])
    fill(jobs)
    assert torch.equal(jobs[0][1], torch.cat([live, tensors["0.up"]]))


def test_progress_counts_every_byte(experts):
    _, checkpoint = experts
    seen = []
    total = fill(empty(stacked(checkpoint).values()), on_progress=seen.append)
    assert sum(seen) == total


MEMORY = """
import sys
import torch
from kernelgraft.checkpoint.files import Checkpoint
from kernelgraft.checkpoint.reader import fill

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))

path, how, threads = sys.argv[1:]
with Checkpoint([path]) as checkpoint:
    weight = checkpoint["weight"]
    lazy = weight.t() if how == "transposes" else weight
    fill([(lazy[:64, :64], torch.empty(64, 64, dtype=torch.bfloat16))])
    out = torch.empty(lazy.shape, dtype=torch.bfloat16 if how == "casts" else lazy.dtype)
    before = status("VmRSS")
    fill([(lazy, out)], threads=int(threads))
    print(status("VmHWM") - before - out.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process alone is told by Linux only")
@pytest.mark.parametrize("how", ["casts", "transposes"])
def test_memory_beyond_the_tensors_is_small(how, tmp_path):
    """Not by `ru_maxrss`, in which a new process has the peak of the one that started it."""
    threads, nbytes = 2, 256 << 20
    path = write(tmp_path, {"weight": entry("F32", (8192, 8192), (0, nbytes))})
    os.truncate(path, path.stat().st_size + nbytes)  # takes no block of the disk
    command = [sys.executable, "-c", MEMORY, str(path), how, str(threads)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(run.stdout) <= threads * reader.CHUNK + (16 << 20), "of a tensor of 256 MB"


# --- failures


def threads_of_ours():
    return [thread for thread in threading.enumerate() if thread.name.startswith("kernelgraft")]


def test_a_file_that_was_cut_off_names_tensor_and_offset(experts):
    _, checkpoint = experts
    path = checkpoint.files[0].path
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=re.escape(str(path)) + r" ends at byte \d+, in the middle of \S+"):
        fill(empty(stacked(checkpoint).values()))
    assert not threads_of_ours()


def test_a_disk_that_fails_names_tensor_and_offset(experts, monkeypatch):
    _, checkpoint = experts

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(positioned, "preadv", fails)
    text = rf"{re.escape(str(checkpoint.files[0].path))}: 0.down cannot be read at byte \d+: .*Input/output error"
    with pytest.raises(CheckpointError, match=text):
        fill(empty([checkpoint["0.down"]]))
    with pytest.raises(CheckpointError, match=text):
        check_readable(empty([checkpoint["0.down"]]))
    assert not threads_of_ours()


@pytest.mark.parametrize("how", ["cut off", "broken"])
def test_of_tensors_that_are_read_together_the_one_at_the_offset_is_named(how, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_file({name: torch.randn(16, 16) for name in "abcd"}, path)
    real = positioned.preadv
    with Checkpoint([path]) as checkpoint:
        joined = torch.cat([checkpoint[name] for name in "abcd"])
        begin = path.stat().st_size - 16 * 16 * 4
        middle = begin + 300
        if how == "cut off":
            os.truncate(path, middle)
        else:

            def breaks(fd, buffers, offset):
                if offset >= middle:
                    raise OSError(errno.EIO, "Input/output error")
                whole, left = [], middle - offset
                for buffer in buffers:
                    whole.append(buffer[:left])
                    left -= len(whole[-1])
                return real(fd, [each for each in whole if len(each)], offset)

            monkeypatch.setattr(positioned, "preadv", breaks)
        said = (
            f"ends at byte {middle}, in the middle of d:" if how == "cut off" else f"d cannot be read at byte {middle}:"
        )
        with pytest.raises(CheckpointError, match=said):
            fill(empty([joined]))


def test_ctrl_c_ends_every_thread(experts, monkeypatch):
    _, checkpoint = experts
    monkeypatch.setattr(reader, "CHUNK", 100)
    seen = []

    def interrupt(nbytes):
        if not seen:
            interrupt_main_thread()
        seen.append(nbytes)

    def slow(fd, buffers, offset):
        time.sleep(0.002)
        return os.preadv(fd, buffers, offset)

    monkeypatch.setattr(positioned, "preadv", slow)

    with pytest.raises(KeyboardInterrupt):
        fill(empty(stacked(checkpoint).values()), threads=2, on_progress=interrupt)
    assert not threads_of_ours()
    assert 0 < sum(seen) < 3 * E * H * INNER * 4


def test_ctrl_c_twice_ends_every_thread_too(experts, monkeypatch):
    _, checkpoint = experts
    told, calls, stop = threading.Event(), [], Waiting.stop
    monkeypatch.setattr(reader, "CHUNK", 100)
    monkeypatch.setattr(Waiting, "stop", lambda waiting: (stop(waiting), told.set()))

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            interrupt_main_thread()
            assert told.wait(60)
            interrupt_main_thread()
            time.sleep(0.05)  # who does not wait goes on meanwhile
        return os.preadv(*args)

    monkeypatch.setattr(positioned, "preadv", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(empty(stacked(checkpoint).values()), threads=1)
    assert not threads_of_ours()
    assert len(calls) == 3


def test_the_rehearsal_reads_everything_and_writes_nothing(experts, calls):
    _, checkpoint = experts
    jobs = empty(stacked(checkpoint).values())
    check_readable(jobs)
    assert sum(got for _, got in calls) == 3 * E * H * INNER * 4
    assert all(out.isnan().all() for _, out in jobs)


def test_what_is_laid_out_anew_is_read_in_smaller_pieces(experts, calls, monkeypatch):
    """And so is what is only read to be forgotten."""
    monkeypatch.setattr(reader, "STAGED", 64)
    _, checkpoint = experts
    lazy = next(iter(checkpoint.values()))
    for how, most in ((lambda job: fill([job]), lazy.nbytes), (lambda job: check_readable([job]), 64)):
        calls.clear()
        how((lazy, torch.empty(lazy.shape)))
        assert max(got for _, got in calls) == most
    calls.clear()
    fill([(lazy, torch.empty(lazy.shape, dtype=torch.float64)), (lazy.t(), torch.empty(lazy.t().shape))])
    assert max(got for _, got in calls) <= 64


def test_threads_wait_for_reads_and_carry_them_out(experts):
    tensors, checkpoint = experts
    made = []

    def lane():
        made.append(threading.current_thread())
        return reader.CpuLane()

    reading = reader.Reading()
    reading.start([lane, lane])
    while len(made) < 2:
        time.sleep(0.001)
    assert all(thread.is_alive() for thread in made)
    jobs = empty(stacked(checkpoint).values())
    assert reading.run(reader._in_order(jobs, 1000), (), None) == 3 * E * H * INNER * 4
    assert all(torch.equal(out, each) for (_, out), each in zip(jobs, stacked(tensors).values(), strict=True))
    assert not threads_of_ours()


def test_some_are_begun_and_the_rest_comes_later(experts, monkeypatch):
    """Nobody is told of progress while only the first are there, and all of it counts in the end."""
    tensors, checkpoint = experts
    monkeypatch.setattr(reader, "goes_to_cuda", lambda _: True)
    monkeypatch.setattr(reader, "current_streams", dict.fromkeys)
    first, *others = empty(stacked(checkpoint).values())
    reading, seen = reader.Reading(), []
    reading.start([reader.CpuLane] * 2)
    reading.begin([first])
    assert reading.begun == {id(first[0]): first}
    while first[1].isnan().any():
        time.sleep(0.001)
    total = fill(others, on_progress=seen.append, ready=reading)
    assert total == sum(seen) == 3 * E * H * INNER * 4
    for (_, out), wanted in zip((first, *others), stacked(tensors).values(), strict=True):
        assert torch.equal(out, wanted)
    assert not threads_of_ours()


def test_where_all_was_begun_there_is_only_to_wait(experts, monkeypatch):
    tensors, checkpoint = experts
    monkeypatch.setattr(reader, "current_streams", dict.fromkeys)
    jobs = empty(stacked(checkpoint).values())
    reading = reader.Reading()
    reading.start([reader.CpuLane])
    reading.begin(jobs)
    assert fill([], ready=reading) == 3 * E * H * INNER * 4
    for (_, out), wanted in zip(jobs, stacked(tensors).values(), strict=True):
        assert torch.equal(out, wanted)


def test_what_was_begun_and_failed_fails_the_rest(experts, monkeypatch):
    _, checkpoint = experts
    monkeypatch.setattr(reader, "goes_to_cuda", lambda _: True)
    monkeypatch.setattr(reader, "current_streams", dict.fromkeys)
    path = checkpoint.files[0].path
    os.truncate(path, path.stat().st_size - 100)
    first, second = empty(stacked(checkpoint).values())
    reading = reader.Reading()
    reading.start([reader.CpuLane] * 2)
    reading.begin([first, second])
    for thread in threads_of_ours():
        thread.join(10)
    assert not threads_of_ours()
    with pytest.raises(CheckpointError, match=r" ends at byte \d+, in the middle of"):
        fill(empty(stacked(checkpoint).values()), ready=reading)


def test_what_was_begun_and_is_not_wanted_is_stopped(experts, monkeypatch):
    _, checkpoint = experts
    monkeypatch.setattr(reader, "current_streams", dict.fromkeys)
    reading = reader.Reading()
    reading.start([reader.CpuLane] * 2)
    reading.begin(empty(stacked(checkpoint).values()))
    reading.stop()
    assert not threads_of_ours()


def test_threads_that_are_not_needed_are_stopped():
    reading = reader.Reading()
    reading.start([reader.CpuLane] * 3)
    reading.stop()
    assert not threads_of_ours()
    assert reading.run([], (), None) == 0


def test_a_lane_that_cannot_be_made_fails_the_reading_when_it_comes_to_it(experts):
    def lane():
        raise CheckpointError("no memory can be pinned")

    reading = reader.Reading()
    reading.start([lane, reader.CpuLane])
    jobs = empty(stacked(experts[1]).values())
    with pytest.raises(CheckpointError, match="no memory can be pinned"):
        reading.run(reader._in_order(jobs, 1000), (), None)
    assert not threads_of_ours()
