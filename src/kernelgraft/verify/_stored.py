"""Modules and arguments in files: tensors as safetensors, under names that a person knows, and the rest as a pickle.

The pickle holds the classes' names and plain values. As any pickle it can run code when it is read, so it is no more to
be trusted than a script.
"""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernelgraft.errors import GraftError
from kernelgraft.verify._values import laid_out

STRUCTURE = "structure.pkl"

_Key = tuple[str, str, str, tuple[int, ...], int]
"""File, name, device, strides and offset of a tensor that stands outside the pickle."""


class Store:
    """Puts values into a folder.

    Args:
        names: For the tensors that have names, by identity: the file (without its ending), and the name in it. The
            caller keeps the tensors alive.
    """

    def __init__(self, names: Mapping[int, tuple[str, str]]) -> None:
        self._names = dict(names)
        self._kept: list[torch.Tensor] = []
        self.files: dict[str, dict[str, torch.Tensor]] = {file: {} for file, _ in names.values()}

    def key(self, tensor: torch.Tensor) -> _Key:
        """Where a tensor is to be found; it is put there."""
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_meta or tensor.layout != torch.strided:
            raise GraftError(
                f"A {type(tensor).__name__} ({tensor.layout}, on {tensor.device}) cannot be written as safetensors."
            )
        if id(tensor) not in self._names:
            self._kept.append(tensor)
            self._names[id(tensor)] = ("inputs", f"other.{len(self._kept)}")
        file, name = self._names[id(tensor)]
        held = tensor.detach()
        self.files.setdefault(file, {})[name] = held.cpu().contiguous().clone()
        return file, name, str(tensor.device), tuple(held.stride()), int(held.storage_offset()) % 64

    def pickled(self, value: Any) -> bytes:
        """The value without its tensors.

        Raises:
            GraftError: It holds something that no other process could read.
        """
        into = io.BytesIO()
        try:
            _Pickler(into, self).dump(value)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise GraftError(f"It cannot be written for another process: {error}.") from error
        return into.getvalue()

    def write(self, folder: Path, structure: bytes) -> None:
        """Write all files."""
        from safetensors.torch import save_file

        for file, tensors in self.files.items():
            save_file(tensors, folder / f"{file}.safetensors")
        (folder / STRUCTURE).write_bytes(structure)


def stored(folder: Path, device: str | None = None) -> Any:
    """What was stored in a folder.

    Args:
        folder: The folder.
        device: Where all tensors go; by default where each was.
    """
    from safetensors.torch import load_file

    files = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    reader = _Unpickler(io.BytesIO((folder / STRUCTURE).read_bytes()), files, device)
    return reader.load()


class _Pickler(pickle.Pickler):
    def __init__(self, into: io.BytesIO, store: Store) -> None:
        super().__init__(into)
        self._store = store

    def persistent_id(self, obj: Any) -> _Key | None:
        if isinstance(obj, type) and obj.__module__ == "__main__":
            raise pickle.PicklingError(
                f"{obj.__qualname__} is defined in the script that runs; move it into a module that can be imported"
            )
        return self._store.key(obj) if isinstance(obj, torch.Tensor) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, source: io.BytesIO, files: Mapping[str, Mapping[str, torch.Tensor]], device: str | None) -> None:
        super().__init__(source)
        self._files, self._device = files, device
        self._done: dict[tuple[str, str], torch.Tensor] = {}

    def persistent_load(self, key: _Key) -> torch.Tensor:
        file, name, device, strides, offset = key
        if (file, name) not in self._done:
            tensor = self._files[file][name].to(self._device or device)
            self._done[file, name] = laid_out(tensor, strides, offset)
        return self._done[file, name]
