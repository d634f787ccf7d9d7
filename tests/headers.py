"""Safetensors files put together by hand, and what the safetensors library says of them."""

import json

import pytest
from safetensors import SafetensorError, safe_open

from kernelgraft.checkpoint.format import read_index
from kernelgraft.errors import CheckpointError


def entry(kind="U8", shape=(4,), offsets=(0, 4), **more):
    return {"dtype": kind, "shape": list(shape), "data_offsets": list(offsets), **more}


def write(folder, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    path = folder / "model.safetensors"
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def refused(path, *said, read=read_index):
    """The message of the error, which names the file and says all of `said`."""
    with pytest.raises(CheckpointError) as error:
        read(path)
    for text in (str(path), *said):
        assert text in str(error.value)
    return str(error.value)


def library_reads(path):
    """Dtype and shape by name as the safetensors library reads them, or None if it refuses the file."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return {name: (each.get_dtype(), each.get_shape()) for name, each in slices.items()}
    except SafetensorError:
        return None
