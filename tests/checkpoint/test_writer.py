"""Safetensors files as we write them: the same bytes as the library's, from any memory, in small pieces."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_files import DTYPES

from forked import forked
from kernelgraft.checkpoint import writer as writing
from kernelgraft.checkpoint.format import read_index
from kernelgraft.checkpoint.writer import FileWriter
from kernelgraft.conversion.lazy import LazyTensor, TensorSource
from kernelgraft.errors import CheckpointError
from leftovers import assert_nothing_left

PAGE = 4096

ODD_NAMES = ['a"b\\c/d', "tab\tnew\nline\x01\x7f", "é \u2028 \U0001f600", "weight", "Weight", "weight.0", "weight.00"]


def values(dtype, *shape, seed=0):
    """Random bits, as what they are does not matter."""
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), generator=torch.Generator().manual_seed(seed))
    bits = bits % 2 if dtype == torch.bool else bits
    return bits.to(torch.uint8).view(dtype).reshape(shape)


def written(path, tensors, metadata=None, **options):
    with FileWriter(**options) as writer:
        writer.write(path, tensors, metadata)
    return path.read_bytes()


def expected(path, tensors, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path.read_bytes()


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_a_file_is_the_library_s_byte_for_byte(metadata, tmp_path):
    tensors = {f"{i}": values(dtype, 3, 5, seed=i) for i, dtype in enumerate([*DTYPES, torch.float4_e2m1fn_x2])}
    tensors |= {f"fnuz.{dtype}": values(dtype, 2) for dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)}
    tensors |= {name: values(torch.bfloat16, 4, seed=i) for i, name in enumerate(ODD_NAMES)}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 3), "one": torch.ones(1, 1, 1)}
    assert written(tmp_path / "ours", tensors, metadata) == expected(tmp_path / "theirs", tensors, metadata)
    read_index(tmp_path / "ours")


@pytest.mark.parametrize("tensors", [{}, {"empty": torch.empty(2, 0)}, {"scalar": torch.tensor(True)}])
def test_a_file_of_nearly_nothing(tensors, tmp_path):
    assert written(tmp_path / "ours", tensors) == expected(tmp_path / "theirs", tensors)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("direct", [True, False])
def test_chunks_end_anywhere_in_tensors(threads, direct, tmp_path, monkeypatch):
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT")
    tensors = {f"{i}": values(dtype, 37 * i + 1, 41, seed=i) for i, dtype in enumerate(DTYPES)}
    tensors |= {f"{i}.norm": values(torch.float32, 7, seed=i) for i in range(300)}
    found = written(tmp_path / "ours", tensors, threads=threads, chunk=PAGE)
    assert found == expected(tmp_path / "theirs", tensors)


def test_a_file_system_that_takes_no_direct_writes(tmp_path, monkeypatch):
    write = os.pwrite
    refused = []

    def pwrite(fd, data, offset):
        if len(data) % PAGE == 0 and not refused.append(offset) and len(refused) % 2:
            raise OSError(errno.EINVAL, "no direct writes here")
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    tensors = {"w": values(torch.float32, 123, 45)}
    assert written(tmp_path / "ours", tensors, chunk=PAGE) == expected(tmp_path / "theirs", tensors)
    assert refused


def test_a_write_that_writes_less_than_it_was_given(tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[: max(1, len(data) // 2)], offset))
    monkeypatch.delattr(os, "O_DIRECT")
    tensors = {"w": values(torch.float32, 123, 45)}
    assert written(tmp_path / "ours", tensors, chunk=PAGE) == expected(tmp_path / "theirs", tensors)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    step=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.complex64]),
    lie=st.sampled_from(["t", "rows", "columns", "middle", "flip", "expand", "conj"]),
)
def test_tensors_of_any_strides(rows, columns, step, dtype, lie, tmp_path_factory):
    folder = tmp_path_factory.mktemp("strides")
    base = values(dtype, rows * step + 1, columns * step + 2)
    tensor = {
        "t": lambda: base.t(),
        "rows": lambda: base[::step],
        "columns": lambda: base[:, ::step],
        "middle": lambda: base[1:, 1:-1],
        "flip": lambda: base.t()[::step].t(),
        "expand": lambda: base[0].expand(3, -1),
        "conj": lambda: base.conj(),
    }[lie]()
    tensors = {"a": tensor, "b": values(torch.uint8, 11)}
    # The library would write the bytes under a conjugate.
    assert written(folder / "ours", tensors, chunk=PAGE) == expected(
        folder / "theirs", {name: each.resolve_conj() for name, each in tensors.items()}
    )


def test_lazy_tensors_are_laid_out_piece_by_piece(tmp_path):
    parts = [values(torch.bfloat16, 60, 70, seed=i) for i in range(4)]
    lazy = [LazyTensor.of(TensorSource(f"{i}", part)) for i, part in enumerate(parts)]

    def laid_out(each):
        return {
            "stack": torch.stack([part.t() for part in each]),
            "cat": torch.cat(list(each), 1),
            "interleaved": torch.stack(list(each), 1).flatten(0, 1),
            "cut": each[2][7:33, 5:],
            "cast": each[0].float(),
            "turned": each[1].view(6, 10, 70).permute(2, 0, 1),
            "whole": each[3],
        }

    found = written(tmp_path / "ours", laid_out(lazy), {"format": "pt"}, chunk=PAGE)
    assert found == expected(tmp_path / "theirs", laid_out(parts), {"format": "pt"})


def test_several_files_by_one_writer(tmp_path):
    done = []
    files = [{"w": values(torch.float32, 1000 * i + 1, seed=i)} for i in range(5)]
    with FileWriter(chunk=PAGE) as writer:
        for i, tensors in enumerate(files):
            writer.write(tmp_path / f"{i}", tensors, None, done.append)
    for i, tensors in enumerate(files):
        assert (tmp_path / f"{i}").read_bytes() == expected(tmp_path / "theirs", tensors)
    assert sum(done) == sum(tensors["w"].nbytes for tensors in files)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "found"),
    [
        ("w", torch.empty(2, device="meta"), "on meta"),
        ("w", torch.eye(2).to_sparse(), "torch.sparse_coo"),
        ("w", torch.ones(2, dtype=torch.complex128), "complex128"),
        ("__metadata__", torch.ones(2), "__metadata__"),
    ],
)
def test_what_cannot_stand_in_a_file(name, tensor, found, tmp_path):
    with pytest.raises(CheckpointError, match=found), FileWriter() as writer:
        writer.write(tmp_path / "ours", {name: tensor})
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    (tmp_path / "there").write_text("precious")
    with pytest.raises(FileExistsError), FileWriter() as writer:
        writer.write(tmp_path / "there", {"w": torch.ones(2)})
    assert (tmp_path / "there").read_text() == "precious"


def test_the_next_file_is_written_while_one_is_brought_to_the_disk(tmp_path, monkeypatch):
    fsync, synced, began_second = os.fsync, [], threading.Event()

    def wait(fd):
        if not synced:
            synced.append("first")
            assert began_second.wait(60)
        fsync(fd)

    def pwrite(fd, data, offset, real=os.pwrite):
        if synced:
            began_second.set()
        return real(fd, data, offset)

    monkeypatch.setattr(os, "fsync", wait)
    monkeypatch.setattr(os, "pwrite", pwrite)
    tensors = {"w": values(torch.float32, 200, 100)}
    with FileWriter(threads=2, chunk=PAGE) as writer:
        for name in ("first", "second"):
            writer.write(tmp_path / name, tensors)
    for name in ("first", "second"):
        assert (tmp_path / name).read_bytes() == expected(tmp_path / "theirs", tensors)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_what_cannot_be_brought_to_the_disk_is_an_error_in_the_end(failing, tmp_path, monkeypatch):
    fsync, asked = os.fsync, []

    def fails(fd):
        asked.append(fd)
        if len(asked) == failing + 1:
            raise OSError(errno.EIO, "Input/output error")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fails)

    def write():
        with FileWriter(threads=2, chunk=PAGE) as writer:
            for i in range(3):
                writer.write(tmp_path / f"{i}", {"w": values(torch.float32, 200, 100)})

    with pytest.raises(OSError, match="Input/output error"):
        write()
    assert_nothing_left(tmp_path)


def test_after_a_failure_nothing_more_is_written(tmp_path, monkeypatch):
    def fails(fd, data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fails)
    seen = []

    def write():
        with FileWriter(threads=2, chunk=PAGE) as writer:
            for name in ("first", "second"):
                try:
                    writer.write(tmp_path / name, {"w": values(torch.float32, 200, 100)})
                except OSError as error:
                    seen.append(error)

    with pytest.raises(OSError, match="No space left") as raised:
        write()
    assert seen == [raised.value] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("at", [1, 3, 11])
def test_a_disk_that_fills_up(at, tmp_path, monkeypatch):
    write, calls = os.pwrite, []

    def pwrite(fd, data, offset):
        calls.append(offset)
        if len(calls) >= at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space left"), FileWriter(threads=3, chunk=PAGE) as writer:
        writer.write(tmp_path / "w", {"w": values(torch.float32, 200, 100)})
    assert_nothing_left(tmp_path)
    # The others stop after what they have in hand.
    assert len(calls) <= at + 3


def test_a_disk_with_too_little_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    def allocate(fd, nbytes):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "allocate", allocate)
    monkeypatch.setattr(os, "pwrite", lambda *_: pytest.fail("something was written"))
    with pytest.raises(OSError, match="No space left"), FileWriter() as writer:
        writer.write(tmp_path / "w", {"w": torch.ones(100)})
    assert_nothing_left(tmp_path)


def test_ctrl_c_stops_the_threads(tmp_path, monkeypatch):
    write, calls = os.pwrite, []

    def pwrite(fd, data, offset):
        calls.append(offset)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        elif len(calls) > 5:  # or all may be written before the main thread has its turn
            time.sleep(0.002)
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(KeyboardInterrupt), FileWriter(threads=2, chunk=PAGE) as writer:
        writer.write(tmp_path / "w", {"w": values(torch.uint8, 4000 * PAGE)})
    assert len(calls) < 4000
    assert_nothing_left(tmp_path)


MEMORY = """
import sys, torch
from kernelgraft.checkpoint.writer import FileWriter

def status(name):  # ru_maxrss begins with what the process that started this one had
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))

tensor = torch.ones(4096, 4096)
with FileWriter(threads=2, chunk=1 << 20) as writer:  # what torch takes once, in each thread
    writer.write(sys.argv[1] + "/warm", {"w": torch.ones(1024).expand(2048, 1024).t()})
before = status("VmRSS")
with FileWriter(threads=2, chunk=1 << 20) as writer:
    writer.write(sys.argv[1] + "/whole", {"w": tensor})
    writer.write(sys.argv[1] + "/rows", {"w": tensor.view(4, 1024, 4096).transpose(0, 1)})
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak")
def test_memory_is_bounded_by_the_buffers(tmp_path):
    run = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 16 << 20, "of a tensor of 64 MB"
    assert torch.equal(load_file(tmp_path / "rows")["w"], torch.ones(1024, 4, 4096))


def test_a_limit_on_the_size_of_files(tmp_path):
    tensor = torch.ones(1 << 19)

    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        with FileWriter() as writer:
            writer.write(tmp_path / "w", {"w": tensor})

    assert forked(save) == "OSError: [Errno 27] File too large"
