"""Checkpoint files: found, opened as lazy tensors, and closed."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file

from headers import entry
from headers import write as write_header
from kernelgraft.checkpoint import files
from kernelgraft.checkpoint.files import INDEX, Checkpoint, OpenFile, checkpoint_files
from kernelgraft.checkpoint.reader import fill
from kernelgraft.conversion.lazy import LazyTensor
from kernelgraft.errors import CheckpointError
from leftovers import mappings

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float4_e2m1fn_x2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


def write(path, **tensors):
    save_file(tensors, path)
    return path


def write_index(folder, **files):
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    weight_map = {key: f"{name}.safetensors" for name, tensors in files.items() for key in tensors}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def open_files(folder):
    """The files under a folder that this process has open (a mapped file needs no descriptor)."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if target.startswith(str(folder)):
            found.append(target)
    return found


# --- which files


def test_a_file_is_its_own_checkpoint(tmp_path):
    path = write(tmp_path / "some.safetensors", a=torch.ones(2))
    assert checkpoint_files(path) == [path]
    assert checkpoint_files(str(path)) == [path]


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
def test_a_folder_with_one_file(name, tmp_path):
    path = write(tmp_path / name, a=torch.ones(2))
    assert checkpoint_files(tmp_path) == [path]


def test_an_index_names_the_shards_and_goes_before_other_files(tmp_path):
    index = write_index(tmp_path, two={"b": torch.ones(1)}, one={"a": torch.ones(1), "c": torch.ones(1)})
    write(tmp_path / "adapter.safetensors", z=torch.ones(1))
    expected = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    assert checkpoint_files(tmp_path) == expected
    assert checkpoint_files(index) == expected


def test_a_folder_without_a_checkpoint_lists_what_it_has(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"has no safetensors checkpoint .*It has: pytorch_model\.bin"):
        checkpoint_files(tmp_path)


def test_a_folder_with_several_files_and_no_index_is_refused(tmp_path):
    write(tmp_path / "one.safetensors", a=torch.ones(1))
    write(tmp_path / "two.safetensors", b=torch.ones(1))
    with pytest.raises(CheckpointError, match=r"several files and no .*one\.safetensors, two\.safetensors"):
        checkpoint_files(tmp_path)


def test_a_place_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint_files(tmp_path / "nowhere")


def test_an_index_that_names_missing_files(tmp_path):
    index = write_index(tmp_path, one={"a": torch.ones(1)}, two={"b": torch.ones(1)})
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names files that are not there: 'two\.safetensors'"):
        checkpoint_files(index)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/tmp/elsewhere.safetensors"])
def test_an_index_that_names_a_file_elsewhere(name, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write(tmp_path / "elsewhere.safetensors", a=torch.ones(1))
    index = write_index(folder, one={"b": torch.ones(1)})
    index.write_text(json.dumps({"weight_map": {"a": name, "b": "one.safetensors"}}))
    with pytest.raises(CheckpointError, match="names the file"):
        checkpoint_files(folder)
    with pytest.raises(CheckpointError, match="lie in several folders"):
        Checkpoint([folder / "one.safetensors", folder / ".." / "elsewhere.safetensors"])


def test_a_tensor_in_another_shard_than_the_index_says(tmp_path):
    index = write_index(tmp_path, one={"a": torch.ones(1)}, two={"b": torch.ones(1)})
    index.write_text(json.dumps({"weight_map": {"a": "two.safetensors", "b": "one.safetensors"}}))
    with pytest.raises(CheckpointError, match="lists tensors in the wrong file"):
        Checkpoint(checkpoint_files(tmp_path))
    assert open_files(tmp_path) == []


@pytest.mark.parametrize("folders", ["one file", "below", "both"])
def test_an_index_is_held_against_its_files_wherever_they_are(folders, tmp_path):
    names = {"one file": ["x", "x"], "below": ["s/x", "s/y"], "both": ["x", "s/y"]}[folders]
    (tmp_path / "s").mkdir()
    files = [f"{name}.safetensors" for name in names]
    if folders == "one file":
        write(tmp_path / files[0], a=torch.ones(1), b=torch.zeros(1))
    else:
        write(tmp_path / files[0], a=torch.ones(1))
        write(tmp_path / files[1], b=torch.zeros(1))
    index = tmp_path / INDEX
    index.write_text(json.dumps({"weight_map": dict(zip("ab", files, strict=True))}))
    with Checkpoint.at(tmp_path) as checkpoint:
        assert sorted(checkpoint) == ["a", "b"]
    wrong = {"a": files[0], "b": files[1], "c": files[1]} if folders == "one file" else {"a": files[1], "b": files[0]}
    index.write_text(json.dumps({"weight_map": wrong}))
    with pytest.raises(CheckpointError, match="does not fit its files"):
        Checkpoint.at(tmp_path)
    assert open_files(tmp_path) == []


def test_links_load_as_in_the_cache_of_the_hub(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write_index(blobs, one={"a": torch.ones(1)}, two={"b": torch.zeros(1)})
    for number, file in enumerate(sorted(blobs.iterdir())):
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
        file.rename(blobs / str(number))
    with Checkpoint(checkpoint_files(snapshot)) as checkpoint:
        assert {name: checkpoint[name].materialize().item() for name in checkpoint} == {"a": 1, "b": 0}


# --- opened


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_a_tensor_of_each_dtype_is_read_bit_for_bit(dtype, tmp_path):
    size = torch.empty(0, dtype=dtype).element_size()
    plain = torch.randint(0, 2, (6 * size,), dtype=torch.uint8).view(dtype).reshape(2, 3)
    path = write(tmp_path / "a.safetensors", a=plain)
    with Checkpoint([path]) as checkpoint:
        lazy = checkpoint["a"]
        assert (lazy.shape, lazy.dtype, lazy.device) == ((2, 3), dtype, torch.device("cpu"))
        assert isinstance(lazy, LazyTensor)
        read = lazy.materialize()
    assert torch.equal(read.contiguous().view(torch.uint8), plain.contiguous().view(torch.uint8))


@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_tensor_that_is_not_aligned(at, tmp_path):
    plain = torch.randn(6, 4, dtype=torch.float64)
    header = {"z": entry(shape=(at,), offsets=(0, at)), "a": entry("F64", (6, 4), (at, at + plain.nbytes))}
    path = write_header(tmp_path, header, bytes(at) + plain.numpy().tobytes())
    with Checkpoint([path]) as checkpoint:
        a = checkpoint["a"]
        jobs = [(each, torch.empty(each.shape, dtype=each.dtype)) for each in (a, a[2:5, 1:], torch.cat([a, a]), a.t())]
        fill(jobs)
        found = [a.materialize(), a.to(torch.float32).materialize(), *[out for _, out in jobs]]
    wanted = [plain, plain.float(), plain, plain[2:5, 1:], torch.cat([plain, plain]), plain.t()]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_names_of_all_files_are_there_and_nothing_else(tmp_path):
    index = write_index(tmp_path, one={"a": torch.ones(2)}, two={"b": torch.zeros(3), "c": torch.ones(())})
    with Checkpoint(checkpoint_files(index)) as checkpoint:
        assert sorted(checkpoint) == ["a", "b", "c"]
        assert len(checkpoint) == 3
        assert "d" not in checkpoint
        assert checkpoint["c"].shape == ()
        with pytest.raises(KeyError):
            checkpoint["d"]


def test_what_was_read_stays_after_the_file_is_closed_and_gone(tmp_path):
    plain = torch.randn(64, 64)
    path = write(tmp_path / "a.safetensors", a=plain)
    with Checkpoint([path]) as checkpoint:
        read = checkpoint["a"].materialize()
    path.unlink()
    assert torch.equal(read, plain)


def test_a_whole_tensor_is_a_view_of_the_mapped_file(tmp_path):
    path = write(tmp_path / "a.safetensors", a=torch.randn(1024), b=torch.randn(1024))
    with Checkpoint([path]) as checkpoint:
        a, b = (checkpoint[name].materialize() for name in "ab")
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(path.name)]
    for tensor in (a, b):
        assert any(int(low, 16) <= tensor.data_ptr() < int(high, 16) for low, high in ranges)


def test_threads_that_come_at_once_share_one_mapping(tmp_path, monkeypatch):
    file = OpenFile(write(tmp_path / "x.safetensors", w=torch.ones(5)))
    both, made, real = threading.Barrier(2), [], files.Mapped

    def mapped(*arguments):
        with suppress(threading.BrokenBarrierError):
            both.wait(0.2)  # for the other one, if it comes here too
        made.append(real(*arguments))
        return made[-1]

    monkeypatch.setattr(files, "Mapped", mapped)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda _: file.shared, range(2)))
    assert found == made * 2
    file.close()
    assert mappings(tmp_path) == []


def test_one_name_in_two_files_is_refused(tmp_path):
    files = [write(tmp_path / f"{name}.safetensors", a=torch.ones(1)) for name in ("one", "two")]
    with pytest.raises(
        CheckpointError, match=r"a stands in two files of the checkpoint: .*one\.safetensors and .*two\.safetensors"
    ):
        Checkpoint(files)
    assert open_files(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"not a safetensors file at all", b"\xff" * 64])
def test_a_file_that_is_none_is_refused(content, tmp_path):
    good = write(tmp_path / "good.safetensors", a=torch.ones(1))
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors "):
        Checkpoint([good, bad])
    assert open_files(tmp_path) == []


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be opened"):
        Checkpoint([tmp_path / "nowhere.safetensors"])


def test_it_is_closed_at_the_end_of_the_block_and_by_an_error(tmp_path):
    path = write(tmp_path / "a.safetensors", a=torch.randn(64))
    with Checkpoint([path]) as checkpoint:
        checkpoint["a"].materialize()
    assert open_files(tmp_path) == []
    with pytest.raises(ZeroDivisionError), Checkpoint([path]):
        raise ZeroDivisionError
    assert open_files(tmp_path) == []


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A Hub cache without a Hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_hub_id_gives_the_files_of_the_repository(cache):
    snapshot = cache / "models--owner--name" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (cache / "models--owner--name" / "refs").mkdir()
    (cache / "models--owner--name" / "refs" / "main").write_text("a" * 40)
    write(snapshot / "model.safetensors", a=torch.ones(1))
    assert checkpoint_files("owner/name") == [snapshot / "model.safetensors"]


def test_a_hub_id_that_cannot_be_had_is_refused(cache):
    with pytest.raises(CheckpointError, match="'owner/nowhere' is neither a file or folder here nor a repository"):
        checkpoint_files("owner/nowhere")


# --- changed


def test_a_file_that_was_replaced_or_written_to_is_noticed(tmp_path):
    path = write(tmp_path / "a.safetensors", a=torch.zeros(4))
    with Checkpoint([path]) as checkpoint:
        checkpoint.check_unchanged()
        other = write(tmp_path / "b.safetensors", a=torch.ones(4))
        other.rename(path)
        with pytest.raises(CheckpointError, match=r"a\.safetensors was replaced or written to"):
            checkpoint.check_unchanged()
        # What is open is still the file that was validated.
        assert torch.equal(checkpoint["a"].materialize(), torch.zeros(4))
    with Checkpoint([path]) as checkpoint:
        os.utime(path, ns=(0, 0))
        with pytest.raises(CheckpointError, match="replaced or written to"):
            checkpoint.check_unchanged()
        path.unlink()
        with pytest.raises(CheckpointError, match="is gone"):
            checkpoint.check_unchanged()


def test_a_view_has_a_storage_of_its_own_and_never_writes_into_the_file(tmp_path):
    path = write(tmp_path / "a.safetensors", a=torch.zeros(4), b=torch.ones(4))
    with Checkpoint([path]) as checkpoint:
        read = {name: checkpoint[name].materialize() for name in "ab"}
        assert {tensor.untyped_storage().nbytes() for tensor in read.values()} == {16}
        read["a"].fill_(5)
        assert torch.equal(checkpoint["b"][1:3].materialize(), torch.ones(2))
    with Checkpoint([path]) as checkpoint:
        assert torch.equal(checkpoint["a"].materialize(), torch.zeros(4))
