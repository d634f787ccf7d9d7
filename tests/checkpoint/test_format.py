"""Safetensors files as a whole, and the index of several."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from headers import entry, library_reads, refused, write
from kernelgraft.checkpoint.format import check_shards, identity_of, read_index, read_shard_index
from kernelgraft.errors import CheckpointError

# --- one file


def test_an_index_knows_its_file(tmp_path):
    path = write(tmp_path, {"a": entry()}, bytes(4))
    index = read_index(str(path))
    assert index.path == path
    assert index.size == path.stat().st_size
    assert index.identity == identity_of(path.stat())


def test_identity_tells_a_file_from_one_put_in_its_place(tmp_path):
    path = write(tmp_path, {"a": entry()}, bytes(4))
    before = read_index(path).identity
    assert identity_of(path.stat()) == before
    replacement = tmp_path / "new"
    replacement.write_bytes(path.read_bytes())
    os.utime(replacement, ns=(path.stat().st_mtime_ns, path.stat().st_mtime_ns))
    replacement.replace(path)
    assert identity_of(path.stat()) != before


@pytest.mark.parametrize("length", range(8))
def test_a_file_too_short_for_a_length(length, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(length))
    refused(path, f"has {length} bytes", "8")
    assert library_reads(path) is None


def test_a_file_that_cannot_be_opened(tmp_path):
    refused(tmp_path / "absent.safetensors", "cannot be opened", "No such file")
    refused(tmp_path, "is no file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is no file")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read_index("a\0b")


@pytest.mark.parametrize("length", [3, 1000, 100_000_000])
def test_a_header_that_is_longer_than_the_file(length, tmp_path):
    path = write(tmp_path, "{}", length=length)
    refused(path, f"header of {length} bytes", "2 follow")
    assert library_reads(path) is None


@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_format_allows(length, tmp_path):
    path = write(tmp_path, "{}", length=length)
    refused(path, f"header of {length} bytes", "100000000")
    with open(path, "r+b") as file:  # a hole on disk: the file is as long as it says
        file.truncate(8 + length if length < 2**40 else 2**30)
    refused(path, f"header of {length} bytes", "100000000")
    assert library_reads(path) is None


def test_every_truncation(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.int8), "empty": torch.ones(0)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path)
    path.write_bytes(whole + b"\0")
    refused(path, "1 bytes at its end", "belong to no tensor")


# --- the index of shards


def write_index(folder, weight_map, **more):
    path = folder / "model.safetensors.index.json"
    path.write_text(weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map, **more}))
    return path


def write_shards(folder, **files):
    for name, names in files.items():
        save_file({each: torch.ones(1) for each in names}, folder / f"{name}.safetensors")


def test_an_index_of_shards(tmp_path):
    write_shards(tmp_path, two="b", one="ac")
    weight_map = {"b": "two.safetensors", "a": "one.safetensors", "c": "one.safetensors"}
    path = write_index(tmp_path, weight_map, metadata={"total_size": 12})
    shards = read_shard_index(str(path))
    assert shards.path == path
    assert shards.files == (tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    assert shards.weight_map == weight_map
    check_shards(shards, [read_index(file) for file in shards.files])


def test_files_may_be_links_and_stand_in_a_folder_below(tmp_path):
    (tmp_path / "blobs").mkdir()
    write_shards(tmp_path / "blobs", one="a")
    snapshot = tmp_path / "snapshots" / "1"
    (snapshot / "sub").mkdir(parents=True)
    (snapshot / "a.safetensors").symlink_to("../../blobs/one.safetensors")
    (snapshot / "sub" / "b.safetensors").symlink_to("../../../blobs/one.safetensors")
    shards = read_shard_index(write_index(snapshot, {"a": "a.safetensors"}))
    check_shards(shards, [read_index(file) for file in shards.files])
    shards = read_shard_index(write_index(snapshot, {"a": "sub/b.safetensors"}))
    assert shards.files == (snapshot / "sub" / "b.safetensors",)
    check_shards(shards, [read_index(file) for file in shards.files])


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "../../x.safetensors", "sub/../../x.safetensors", "sub/../x.safetensors", "..", "sub/.."),
        *("/etc/passwd", "//x", "", ".", "./", "..\\x.safetensors", "C:\\x.safetensors", "sub\\x.safetensors", "x\0y"),
    ],
)
def test_a_name_that_leads_out_of_the_folder(name, tmp_path):
    folder = tmp_path / "here" / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, tmp_path / "here", folder):
        write_shards(place, x="a")
    refused(write_index(folder, {"a": name}), f"the file {name!r}", read=read_shard_index)


def test_missing_files_are_listed(tmp_path):
    write_shards(tmp_path, two="b")
    (tmp_path / "four.safetensors").symlink_to("nowhere")
    (tmp_path / "five.safetensors").mkdir()
    names = ["one", "two", "three", "four", "five", "l" * 300]
    path = write_index(tmp_path, {name: f"{name}.safetensors" for name in names})
    message = refused(
        path, *(f"'{name}.safetensors'" for name in ("one", "three", "four", "five")), read=read_shard_index
    )
    assert "two" not in message


BAD_INDEX = {
    "no JSON": ("{", "is not right"),
    "an array": ("[]", "must be an object"),
    "nested": ("[" * 100_000, "nested too deeply"),
    "no weight_map": ('{"metadata":{}}', "['metadata'] and no 'weight_map'"),
    "a weight_map of a list": ('{"weight_map":["a"]}', "weight_map must be an object of texts, not ['a']"),
    "a weight_map of null": ('{"weight_map":null}', "weight_map must be an object of texts, not None"),
    "a number for a file": ('{"weight_map":{"a":1}}', "weight_map has 1 under 'a'"),
    "a list for a file": ('{"weight_map":{"a":["one"]}}', "weight_map has ['one'] under 'a'"),
    "a tensor twice": ('{"weight_map":{"a":"one.safetensors","a":"two.safetensors"}}', "'a' stands twice"),
    "two weight_maps": ('{"weight_map":{},"weight_map":{}}', "'weight_map' stands twice"),
}


@pytest.mark.parametrize("name", BAD_INDEX)
def test_an_index_that_is_none(name, tmp_path):
    text, *said = BAD_INDEX[name]
    refused(write_index(tmp_path, text), *said, read=read_shard_index)


def test_an_index_that_is_not_utf_8_or_not_there(tmp_path):
    path = write_index(tmp_path, {})
    path.write_bytes(b'{"\xff":1}')
    refused(path, "UTF-8", read=read_shard_index)
    refused(tmp_path / "absent.json", "No such file", read=read_shard_index)
    refused(tmp_path, "is no file", read=read_shard_index)


def checked(folder, weight_map):
    shards = read_shard_index(write_index(folder, {key: f"{name}.safetensors" for key, name in weight_map.items()}))
    check_shards(shards, [read_index(file) for file in shards.files])


def test_a_tensor_in_the_wrong_shard(tmp_path):
    write_shards(tmp_path, one="ab", two="cd")
    with pytest.raises(CheckpointError) as error:
        checked(tmp_path, {"a": "one", "b": "two", "c": "two", "d": "one"})
    assert f"wrong file: 'b' ('two.safetensors', but {tmp_path / 'one.safetensors'} has it), 'd' (" in str(error.value)
    assert "'a'" not in str(error.value)


def test_a_tensor_that_no_shard_has(tmp_path):
    write_shards(tmp_path, one="a", two="b")
    with pytest.raises(CheckpointError, match=r"none of them has: 'c' \('two\.safetensors'\)\."):
        checked(tmp_path, {"a": "one", "b": "two", "c": "two"})


def test_a_tensor_in_two_shards(tmp_path):
    write_shards(tmp_path, one="ab", two="bc")
    with pytest.raises(CheckpointError, match=r"'b' stands in two .*one\.safetensors and .*two\.safetensors"):
        checked(tmp_path, {"a": "one", "b": "one", "c": "two"})


def test_a_tensor_that_the_index_does_not_list_is_let_pass(tmp_path):
    write_shards(tmp_path, one="ab", two="c")
    checked(tmp_path, {"a": "one", "c": "two"})
