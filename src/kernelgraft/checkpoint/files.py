"""Checkpoints as files: where they lie, and their tensors as lazy ones whose bytes are read where they are pulled."""

import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from kernelgraft.checkpoint.format import (
    FileIndex,
    ShardIndex,
    TensorEntry,
    check_shards,
    identity_of,
    read_index,
    read_shard_index,
)
from kernelgraft.checkpoint.memory import Mapped
from kernelgraft.conversion.lazy import LazyTensor
from kernelgraft.conversion.moves import contiguous_strides
from kernelgraft.errors import CheckpointError

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.safetensors)(?<!\.json)")

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class OpenFile:
    """A checkpoint file that stays open, with its validated index."""

    def __init__(self, path: str | Path) -> None:
        """Open a file and read its header.

        Raises:
            CheckpointError: It is missing, is no safetensors file, or changes at this moment.
        """
        self.path = Path(path)
        self.index: FileIndex = read_index(self.path)
        try:
            self.fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be opened: {error}") from error
        self._storage: Any = None
        self._shared: Mapped | None = None
        self._is_mapping = threading.Lock()
        try:
            self.check_unchanged()
        except BaseException:
            self.close()
            raise

    def check_unchanged(self) -> None:
        """Make sure that this is still the file whose header was read.

        Raises:
            CheckpointError: It was written to, or another one has its name now.
        """
        try:
            found = [identity_of(os.fstat(self.fd)), identity_of(os.stat(self.path))]
        except OSError as error:
            raise CheckpointError(f"{self.path} is gone since its header was read: {error}") from error
        if any(each != self.index.identity for each in found):
            raise CheckpointError(
                f"{self.path} was replaced or written to while it was being loaded. Load it again when its writer is "
                f"done."
            )

    def view(self, entry: TensorEntry, first: int, shape: Sequence[int]) -> torch.Tensor:
        """A run of a tensor's elements as a view of the mapped file. Written to, it becomes a copy, page by page."""
        dtype = entry.dtype
        size = torch.Size(shape)
        start = entry.start + first * dtype.itemsize
        stop = start + size.numel() * dtype.itemsize
        if start == stop:
            return torch.empty(size, dtype=dtype)
        if self._storage is None:
            # Through the open descriptor, so that what is mapped is what was validated.
            place = f"/proc/self/fd/{self.fd}" if sys.platform == "linux" else str(self.path)
            self._storage = torch.UntypedStorage.from_file(place, shared=False, nbytes=self.index.size)
        # A storage of its own for each tensor: savers look at storages.
        storage = self._storage[start:stop]
        if start % dtype.itemsize:
            raw = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (stop - start,), (1,))
            return raw.clone().view(dtype).view(size)
        return torch.empty(0, dtype=dtype).set_(storage, 0, size, contiguous_strides(size))

    @property
    def shared(self) -> Mapped:
        """The file mapped for the driver, which may pin pages of it as long as nobody can write them."""
        with self._is_mapping:  # several threads come for it at once
            if self._shared is None:
                self._shared = Mapped(self.index.size, self.fd)
            return self._shared

    def close(self) -> None:
        """Give the descriptor and our own mapping back; views that were handed out stay valid."""
        self._storage = None
        if self._shared is not None:
            self._shared.close()
            self._shared = None
        os.close(self.fd)


class FileTensor:
    """One tensor of an open file, as a source of lazy tensors.

    Attributes:
        file: The file.
        entry: Where its bytes are.
    """

    __slots__ = ("entry", "file")

    device = torch.device("cpu")

    def __init__(self, file: OpenFile, entry: TensorEntry) -> None:
        self.file = file
        self.entry = entry

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype; an error if torch does not have it."""
        return self.entry.dtype

    @property
    def name(self) -> str:
        """The tensor's name in the file."""
        return self.entry.name

    @property
    def shape(self) -> torch.Size:
        """Its shape."""
        return torch.Size(self.entry.shape)

    def read(self) -> torch.Tensor:
        """The tensor as a view of the mapped file: nothing is copied."""
        return self.run(0, self.entry.shape)

    def run(self, first: int, shape: Sequence[int]) -> torch.Tensor:
        """A run of its elements in this shape, as a view of the mapped file with a storage of its own."""
        return self.file.view(self.entry, first, shape)


class Checkpoint(Mapping[str, LazyTensor]):
    """The tensors of a checkpoint by name, lazy. Use it as a context manager: it holds its files open.

    What was read stays valid after it is closed.
    """

    def __init__(self, files: Iterable[str | Path], shards: ShardIndex | None = None) -> None:
        """Open files and read their headers.

        Args:
            files: The files.
            shards: The index that named them; without one an index beside several is looked for. It is held against
                what they have.

        Raises:
            CheckpointError: A file is missing or is no safetensors file, two files have a tensor of one name, or an
                index does not tell the truth.
        """
        self.files: list[OpenFile] = []
        self._tensors: dict[str, FileTensor] = {}
        try:
            for file in files:
                self._open(file)
            if shards is None:
                _check_index(self.files)
            else:
                check_shards(shards, [file.index for file in self.files])
        except BaseException:
            self.close()
            raise

    @classmethod
    def at(cls, place: str | Path) -> "Checkpoint":
        """The checkpoint at a place: see `checkpoint_files`.

        Raises:
            CheckpointError: There is none, or it is no valid one.
        """
        found = _found(place)
        return cls(found.files, found) if isinstance(found, ShardIndex) else cls([found])

    def _open(self, path: str | Path) -> None:
        file = OpenFile(path)
        self.files.append(file)
        for name in self._tensors.keys() & file.index.tensors.keys():
            raise CheckpointError(
                f"{name} stands in two files of the checkpoint: {self._tensors[name].file.path} and {path}."
            )
        self._tensors |= {name: FileTensor(file, entry) for name, entry in file.index.tensors.items()}

    def check_unchanged(self) -> None:
        """Make sure that every file is still the one that was opened.

        Raises:
            CheckpointError: One was replaced or written to.
        """
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        """Close the files."""
        while self.files:
            self.files.pop().close()

    def __getitem__(self, name: str) -> LazyTensor:
        return LazyTensor.of(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_index(files: Sequence[OpenFile]) -> None:
    """Hold shards against the index beside them, however their names were found."""
    folders = {file.path.parent for file in files}
    if len(files) < 2:
        return
    if len(folders) > 1:
        raise CheckpointError(
            f"The shards of one checkpoint lie in several folders: {', '.join(sorted(map(str, folders)))}. An index "
            f"may name files of its own folder only."
        )
    names = {file.path.name for file in files}
    for path in sorted(folders.pop().glob("*.safetensors*.index.json")) or ():
        shards = read_shard_index(path)
        if {file.name for file in shards.files} == names:
            check_shards(shards, [file.index for file in files])


def checkpoint_files(place: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint: a file, an index of shards, a folder that has either, or a Hub id.

    Raises:
        CheckpointError: There is none, there are several without an index, or an index names a file that is not there
            or lies elsewhere.
    """
    found = _found(place)
    return list(found.files) if isinstance(found, ShardIndex) else [found]


def _found(place: str | Path) -> Path | ShardIndex:
    path = Path(place)
    if isinstance(place, str) and _HUB_ID.fullmatch(place) and not path.exists():
        return _found(_from_hub(place))
    if path.is_dir():
        loose = sorted(path.glob("*.safetensors"))
        # As in Transformers, a single file goes before an index.
        named = [each for each in (path / SINGLE, path / INDEX) if each.exists()]
        if not named and len(loose) != 1:
            raise CheckpointError(
                f"{path} has {'several files' if loose else 'no safetensors checkpoint'} and no {INDEX}. It has: "
                f"{', '.join(sorted(p.name for p in path.iterdir()))}. Give a folder with {SINGLE} or {INDEX}, or a "
                f".safetensors file."
            )
        return _found((named or loose)[0])
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist. Give a .safetensors file, its index, a folder with them, or the id of a "
            f"repository on the Hub: 'owner/name'."
        )
    return path if path.suffix != ".json" else read_shard_index(path)


def _from_hub(name: str) -> Path:
    """The safetensors files of a repository on the Hub, from its cache or by a download."""
    from huggingface_hub import snapshot_download  # `import kernelgraft` needs torch alone

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", INDEX]))
    except Exception as error:  # what a download may raise is anything; the cause says it
        raise CheckpointError(
            f"{name!r} is neither a file or folder here nor a repository that can be had from the Hub: {error}"
        ) from error
