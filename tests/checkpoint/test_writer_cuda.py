"""What only a GPU shows of writing: files from its memory. On a machine with CUDA these run as well."""

import errno
import os
import threading

import pytest
import torch
from safetensors.torch import save_file

from interrupting import interrupt_main_thread
from kernelgraft.checkpoint import staging
from kernelgraft.checkpoint.memory import RegistrationError
from kernelgraft.checkpoint.writer import FileWriter
from kernelgraft.conversion.lazy import LazyTensor, TensorSource
from leftovers import assert_nothing_left

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PAGE = 4096


def tensors(device):
    generator = torch.Generator().manual_seed(0)
    made = {f"{i}": torch.randn(61, 40 * i + 1, generator=generator) for i in range(9)}
    made |= {f"{i}.half": tensor.bfloat16() for i, tensor in made.items()}
    made |= {f"{i}.norm": torch.randn(5, generator=generator) for i in range(200)}
    return {name: tensor.to(device) for name, tensor in made.items()}


def laid_out(each):
    """Tensors in every way that others lie in memory."""
    return {
        **each,
        "t": each["3"].t(),
        "columns": each["4"][:, 3:77],
        "stack": torch.stack([each["5"].t(), each["5"].t()]),
        "turned": each["6.half"].flatten()[: 61 * 240].view(61, 12, 20).permute(2, 0, 1),
        "cast": each["7.half"].float(),
    }


def lazily(each):
    return {name: LazyTensor.of(TensorSource(name, tensor)) for name, tensor in each.items()}


def expected(path):
    save_file({name: tensor.contiguous() for name, tensor in laid_out(tensors("cpu")).items()}, path)
    return path.read_bytes()


@pytest.mark.parametrize("chunk", [PAGE, 1 << 20])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_file_from_the_gpu(lazy, chunk, tmp_path):
    each = tensors("cuda")
    with FileWriter(threads=3, chunk=chunk) as writer:
        writer.write(tmp_path / "ours", laid_out(lazily(each) if lazy else each))
        assert staging.pinned.bytes == min(3, -(-(tmp_path / "ours").stat().st_size // chunk)) * chunk
    assert (tmp_path / "ours").read_bytes() == expected(tmp_path / "theirs")
    assert staging.pinned.bytes == 0
    assert_nothing_left(tmp_path)


def test_a_driver_that_takes_no_pages(tmp_path, monkeypatch):
    def registered(*_, **__):
        raise RegistrationError("none")

    monkeypatch.setattr(staging, "registered", registered)
    with FileWriter(threads=3, chunk=PAGE) as writer:
        writer.write(tmp_path / "ours", laid_out(lazily(tensors("cuda"))))
    assert (tmp_path / "ours").read_bytes() == expected(tmp_path / "theirs")


def test_a_file_from_both(tmp_path):
    mixed = tensors("cpu")
    mixed |= {name: tensor.cuda() for name, tensor in mixed.items() if "half" in name}
    with FileWriter(threads=3, chunk=PAGE) as writer:
        writer.write(tmp_path / "ours", laid_out(mixed))
    assert (tmp_path / "ours").read_bytes() == expected(tmp_path / "theirs")


def test_what_the_gpu_has_still_to_do_is_waited_for(tmp_path):
    with torch.cuda.stream(torch.cuda.Stream()), FileWriter() as writer:
        for i in range(5):
            value = torch.zeros(1 << 20, device="cuda")
            torch.cuda._sleep(200_000_000)
            value += i + 1
            writer.write(tmp_path / f"{i}", {"w": value, "t": value.view(1 << 10, -1).t()})
    for i in range(5):
        whole = torch.full((1 << 20,), i + 1.0)
        save_file({"w": whole, "t": whole.clone().view(1 << 10, -1)}, tmp_path / "theirs")
        assert (tmp_path / f"{i}").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_memory_of_the_gpu_is_bounded_by_the_buffers(tmp_path):
    tensor = torch.ones(8192, 8192, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with FileWriter(threads=4, chunk=1 << 20) as writer:
        writer.write(tmp_path / "ours", {"w": tensor, "t": tensor.t()})
    assert torch.cuda.max_memory_allocated() - before <= 8 << 20
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("how", ["error", "ctrl-c"])
def test_an_error_or_ctrl_c_leaves_nothing_pinned(how, tmp_path, monkeypatch):
    """In the middle of a file, of which some lies in pieces and is laid out on the device."""
    each = laid_out(lazily(tensors("cuda")))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    stopped, calls, held = threading.Event(), [], []
    real_stop, real_write = FileWriter._stop, os.pwrite

    def stop(writer, **options):
        real_stop(writer, **options)
        stopped.set()

    def write(fd, data, offset):
        calls.append(offset)
        if len(calls) == 5:
            held.append(staging.pinned.bytes)
            if how == "error":
                raise OSError(errno.ENOSPC, "No space left on device")
            interrupt_main_thread()
            assert stopped.wait(60)
        return real_write(fd, data, offset)

    monkeypatch.setattr(FileWriter, "_stop", stop)
    monkeypatch.setattr(os, "pwrite", write)
    error = pytest.raises(OSError, match="No space left") if how == "error" else pytest.raises(KeyboardInterrupt)
    with error, FileWriter(threads=2, chunk=PAGE) as writer:
        writer.write(tmp_path / "ours", each)
    assert held[0] >= PAGE  # it was there to be given back
    assert len(calls) < (tmp_path / "ours").stat().st_size // PAGE
    assert staging.pinned.bytes == 0
    assert torch.cuda.memory_allocated() == before
    assert_nothing_left(tmp_path)
