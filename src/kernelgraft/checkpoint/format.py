"""The validated index of safetensors files: which bytes of which file are which tensor.

A file is 8 bytes (the length of the header, little-endian), the header (`header.py`), and the tensors' bytes. A
checkpoint of several files, shards, has an index beside them, `{"weight_map": {tensor name: file name}}`.
"""

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from kernelgraft.checkpoint.header import TensorEntry, read_header
from kernelgraft.checkpoint.strictjson import decoded, listed, parsed, shown, texts
from kernelgraft.errors import CheckpointError

__all__ = [
    "FileIndex",
    "ShardIndex",
    "TensorEntry",
    "check_shards",
    "given_shard_index",
    "identity_of",
    "read_index",
    "read_shard_index",
]

MAX_HEADER = 100_000_000  # bytes; the format's own limit

_BEFORE_HEADER = 8


@dataclass(frozen=True)
class FileIndex:
    """What a safetensors file holds, and where.

    Attributes:
        path: The file.
        tensors: Its tensors by name, in the order of their bytes in the file.
        metadata: The texts that stand beside them.
        size: Length of the file in bytes.
        identity: `identity_of` the file that the header was read from, so that one put in its place later is noticed.
    """

    path: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    size: int
    identity: tuple[int, int, int, int]


@dataclass(frozen=True)
class ShardIndex:
    """Which file of a sharded checkpoint has which tensor.

    Attributes:
        path: The index itself.
        files: The files that it names, each once, sorted by name.
        weight_map: Tensor name to file name, relative to the folder of the index.
    """

    path: Path
    files: tuple[Path, ...]
    weight_map: Mapping[str, str]


def identity_of(status: os.stat_result) -> tuple[int, int, int, int]:
    """What tells one file, and one state of it, from another: device, inode, size, time of change in nanoseconds."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_index(path: str | Path) -> FileIndex:
    """Reads the header of a safetensors file and checks it against the file's length. No tensor is read.

    Raises:
        CheckpointError: The file cannot be opened, or is no valid safetensors file.
    """
    path = Path(path)
    with _opened(path) as file:
        status = os.fstat(file.fileno())
        header = _header(file, path, status.st_size)
    tensors, metadata = read_header(header, path, _BEFORE_HEADER + len(header), status.st_size)
    return FileIndex(path, tensors, metadata, status.st_size, identity_of(status))


def read_shard_index(path: str | Path) -> ShardIndex:
    """Reads the index of a sharded checkpoint. The files that it names are looked for, but not opened.

    A name is judged as it is written and must lead to no place outside the folder; the file of that name may be a link
    to anywhere, as in the Hub's cache.

    Raises:
        CheckpointError: It is no such index, or names a file that is not there or not below its folder.
    """
    path = Path(path)
    with _opened(path) as file:
        data = _read(file, MAX_HEADER + 1, path)
    if len(data) > MAX_HEADER:
        raise CheckpointError(f"{path} has more than {MAX_HEADER} bytes; no index of a checkpoint is as long.")
    found = parsed(decoded(data, path), path)
    if "weight_map" not in found:
        raise CheckpointError(
            f"{path} is no index of a sharded checkpoint: it has {shown(list(found))} and no 'weight_map' of tensor "
            f"names to file names."
        )
    weight_map, names = _names_inside(found["weight_map"], path)
    files = tuple(dict.fromkeys(path.parent / name for name in names))
    missing = [shown(name) for name in names if not os.path.isfile(path.parent / name)]
    if missing:
        raise CheckpointError(
            f"{path} names files that are not there: {listed(missing)}. Copy them too, or complete the download."
        )
    return ShardIndex(path, files, weight_map)


def given_shard_index(weight_map: object, files: Sequence[str | Path], path: Path) -> ShardIndex:
    """An index that somebody else has read, and the files that its names led to.

    Args:
        weight_map: What stands in it.
        files: The files, in the order of their names.
        path: The index, as far as it is known: for messages.

    Raises:
        CheckpointError: A name leads out of the folder, or a file is not where its name says.
    """
    found, names = _names_inside(weight_map, path)
    tails = [PurePosixPath(name).parts for name in names]
    paths = [Path(file) for file in files]
    led = [path.parts[-len(tail) :] for path, tail in zip(paths, tails, strict=False)]
    if len(paths) != len(tails) or led != tails:
        raise CheckpointError(
            f"{path} names the files {listed(list(map(shown, names)))}, and these were found: "
            f"{listed(list(map(str, files)))}."
        )
    folders = {path.parents[len(tail) - 1] for path, tail in zip(paths, tails, strict=True)}
    if len(folders) != 1:
        raise CheckpointError(
            f"The files that {path} names lie in several folders: {', '.join(sorted(map(str, folders)))}. An index may "
            f"name files of its own folder only."
        )
    return ShardIndex(folders.pop() / path.name, tuple(paths), found)


def _names_inside(weight_map: object, path: Path) -> tuple[Mapping[str, str], list[str]]:
    """An index by tensor, and the names in it, each once and sorted."""
    found = texts(weight_map, path, "weight_map")
    names = sorted(set(found.values()))
    for name in names:
        _check_inside(name, path)
    return found, names


def check_shards(shards: ShardIndex, files: Sequence[FileIndex]) -> None:
    """Checks that the files of a sharded checkpoint hold what its index says.

    A tensor that no line of the index names is let pass, unless it stands in two files.

    Args:
        shards: The index.
        files: What its files hold, one for each of `shards.files`.

    Raises:
        CheckpointError: A tensor stands in two files, in another file than the index says, or in none.
    """
    homes: dict[str, Path] = {}
    for file in files:
        for name in homes.keys() & file.tensors.keys():
            raise CheckpointError(
                f"{shards.path}: {shown(name)} stands in two of its files: {homes[name]} and {file.path}."
            )
        homes |= dict.fromkeys(file.tensors, file.path)
    # The files themselves, so that a hundred thousand names compare no paths.
    by_path = {file.path: file.path for file in files}
    paths = {name: by_path.get(shards.path.parent / name) for name in set(shards.weight_map.values())}
    missing, moved = [], []
    for name, file_name in shards.weight_map.items():
        home = homes.get(name)
        if home is None:
            missing.append(f"{shown(name)} ({shown(file_name)})")
        elif home is not paths[file_name]:
            moved.append(f"{shown(name)} ({shown(file_name)}, but {home} has it)")
    if missing or moved:
        raise CheckpointError(
            f"{shards.path} does not fit its files."
            + (f" It lists tensors that none of them has: {listed(missing)}." if missing else "")
            + (f" It lists tensors in the wrong file: {listed(moved)}." if moved else "")
        )


def _opened(path: Path) -> BinaryIO:
    try:
        regular = stat.S_ISREG(path.stat().st_mode)  # asked first: to open a pipe waits until somebody writes to it
        if regular:
            return open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise CheckpointError(f"{path} cannot be opened: {error}") from error
    raise CheckpointError(f"{path} is no file. Give a .safetensors file, or the index of several.")


def _read(file: BinaryIO, length: int, path: Path) -> bytes:
    try:
        return file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read at byte {file.tell()}: {error}") from error


def _header(file: BinaryIO, path: Path, size: int) -> bytes:
    if size < _BEFORE_HEADER:
        raise CheckpointError(f"{path} has {size} bytes, fewer than the 8 that a safetensors file begins with.")
    length = int.from_bytes(_read(file, _BEFORE_HEADER, path), "little")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path} is no safetensors file: its first 8 bytes give a header of {length} bytes, and the format allows "
            f"{MAX_HEADER}."
        )
    if length > size - _BEFORE_HEADER:
        raise CheckpointError(
            f"{path} is truncated or no safetensors file: its first 8 bytes give a header of {length} bytes, and "
            f"{size - _BEFORE_HEADER} follow."
        )
    header = _read(file, length, path)
    if len(header) != length:
        raise CheckpointError(f"{path} became shorter while it was read: {len(header)} of {length} bytes of header.")
    return header


def _check_inside(name: str, path: Path) -> None:
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or name.startswith("/") or "\\" in name or "\0" in name:
        raise CheckpointError(
            f"{path} names the file {shown(name)}. A name must lead to a file in the folder of the index, "
            f"'model-00001-of-00002.safetensors', or in a folder below it."
        )
