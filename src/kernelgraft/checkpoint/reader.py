"""Safetensors files as lazy tensors: names and shapes are read, bytes only where they are pulled."""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from kernelgraft.conversion.lazy import LazyTensor
from kernelgraft.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.safetensors)(?<!\.json)")

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class FileTensor:
    """One tensor of an open safetensors file, as a source of lazy tensors.

    Attributes:
        name: The tensor's name in the file.
        shape: Its shape.
        dtype: Its dtype.
        device: Always the CPU.
    """

    def __init__(self, handle: Any, name: str, path: str) -> None:
        header = handle.get_slice(name)
        kind = header.get_dtype()
        if kind not in _DTYPES:
            raise CheckpointError(f"{path}: {name} has dtype {kind}, which torch does not have.")
        self.name = name
        self.shape = torch.Size(header.get_shape())
        self.dtype = _DTYPES[kind]
        self.device = torch.device("cpu")
        self._handle = handle

    def read(self) -> torch.Tensor:
        """The tensor as a view of the mapped file: nothing is copied."""
        tensor: torch.Tensor = self._handle.get_tensor(self.name)
        return tensor


class Checkpoint(Mapping[str, LazyTensor]):
    """The tensors of a checkpoint by name, lazy. Use it as a context manager: it holds its files open.

    What was read stays valid after it is closed.
    """

    def __init__(self, files: Iterable[str | Path]) -> None:
        """Open files and read their headers.

        Raises:
            CheckpointError: A file is missing or is no safetensors file, or two files have a tensor of one name.
        """
        self._stack = ExitStack()
        self._tensors: dict[str, LazyTensor] = {}
        try:
            for file in files:
                self._open(str(file))
        except BaseException:
            self._stack.close()
            raise

    def _open(self, path: str) -> None:
        from safetensors import SafetensorError, safe_open  # `import kernelgraft` needs torch alone

        try:
            handle = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be opened as a safetensors file: {error}") from error
        for name in handle.keys():  # noqa: SIM118 - not a dict
            if name in self._tensors:
                raise CheckpointError(f"{name} stands in two files of the checkpoint; one of them is {path}.")
            self._tensors[name] = LazyTensor.of(FileTensor(handle, name, path))

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def checkpoint_files(place: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint: a file, an index of shards, a folder that has either, or a Hub id.

    Raises:
        CheckpointError: There is none, there are several without an index, or an index names a file that is not there.
    """
    path = Path(place)
    if isinstance(place, str) and _HUB_ID.fullmatch(place) and not path.exists():
        return checkpoint_files(_from_hub(place))
    if path.is_dir():
        loose = sorted(path.glob("*.safetensors"))
        named = [each for each in (path / INDEX, path / SINGLE) if each.exists()]
        if not named and len(loose) != 1:
            raise CheckpointError(
                f"{path} has {'several files' if loose else 'no safetensors checkpoint'} and no {INDEX}. It has: "
                f"{', '.join(sorted(p.name for p in path.iterdir()))}. Give a folder with {SINGLE} or {INDEX}, or a "
                f".safetensors file."
            )
        return checkpoint_files((named or loose)[0])
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist. Give a .safetensors file, its index, a folder with them, or the id of a "
            f"repository on the Hub: 'owner/name'."
        )
    if path.suffix != ".json":
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        files = [path.parent / name for name in names]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is no index of a sharded checkpoint: {error!r}.") from error
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise CheckpointError(f"{path} names files that are not there: {', '.join(missing)}.")
    return files


def _from_hub(name: str) -> Path:
    """The safetensors files of a repository on the Hub, from its cache or by a download."""
    from huggingface_hub import snapshot_download  # `import kernelgraft` needs torch alone

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", INDEX]))
    except Exception as error:  # what a download may raise is anything; the cause says it
        raise CheckpointError(
            f"{name!r} is neither a file or folder here nor a repository that can be had from the Hub: {error}"
        ) from error
