"""The header of a safetensors file: JSON that says which bytes are which tensor, read and proved against the length.

For each tensor it has `"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}`, the offsets counted from
the header's end, and it may have an object `"__metadata__"` of texts. The tensors cover the rest of the file exactly,
without a hole. They need not be aligned to their dtype. After https://github.com/safetensors/safetensors#format.

What is accepted here is accepted by the safetensors library (0.8) too. Refused here alone is:

- a name that stands twice in one object, of which the library takes the last: it may hide a tensor;
- an entry with further keys, which the library skips: who wrote them may mean other bytes than we would read;
- an entry as a JSON array, or a dtype as an object, which the library's JSON reader happens to take;
- a shape of which torch cannot make a tensor: dimensions whose product, zeros left out, is past 63 bits, or an F4 shape
  whose last dimension is odd (torch holds two of these numbers in one element).
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kernelgraft.checkpoint.strictjson import decoded, listed, parsed, shown, texts
from kernelgraft.errors import CheckpointError

Held = tuple[str, tuple[int, ...], int]  # dtype, shape as torch sees it, bytes

_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")
_EXAMPLE = '{"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}'
_MAX_ELEMENTS = 2**63 - 1  # torch's sizes and strides are signed and 64 bits wide

_OPENING = re.compile(r'\{(?:"__metadata__":\{[^{}]*\},)?')
_ENTRY = re.compile(
    r'"([^"\\\x00-\x1f]*)":\{"dtype":"([A-Z0-9_]+)","shape":\[([0-9,]*)\],'
    r'"data_offsets":\[(0|[1-9][0-9]{0,18}),(0|[1-9][0-9]{0,18})\]\}(?:,|\} *\Z)|(.+)',
    re.DOTALL,
)

# What the format calls it: bits per element, and what torch calls it.
KINDS: dict[str, tuple[int, torch.dtype | None]] = {
    "BOOL": (8, torch.bool),
    "F4": (4, torch.float4_e2m1fn_x2),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "U8": (8, torch.uint8),
    "I8": (8, torch.int8),
    "F8_E5M2": (8, torch.float8_e5m2),
    "F8_E4M3": (8, torch.float8_e4m3fn),
    "F8_E8M0": (8, torch.float8_e8m0fnu),
    "F8_E4M3FNUZ": (8, torch.float8_e4m3fnuz),
    "F8_E5M2FNUZ": (8, torch.float8_e5m2fnuz),
    "I16": (16, torch.int16),
    "U16": (16, torch.uint16),
    "F16": (16, torch.float16),
    "BF16": (16, torch.bfloat16),
    "I32": (32, torch.int32),
    "U32": (32, torch.uint32),
    "F32": (32, torch.float32),
    "C64": (64, torch.complex64),
    "F64": (64, torch.float64),
    "I64": (64, torch.int64),
    "U64": (64, torch.uint64),
}


class TensorEntry(NamedTuple):  # no dataclass: a checkpoint has 100,000 of them, and a tuple is made in a third
    """One tensor of a file.

    Attributes:
        name: Its name in the file.
        kind: Its dtype as the file spells it, `"BF16"`.
        shape: Its shape as torch sees it: the last dimension of F4, which torch holds by twos, is half the file's.
        start: Where its bytes begin, counted from the start of the file.
        nbytes: How many they are.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype in torch.

        Raises:
            CheckpointError: Torch has none of this kind.
        """
        dtype = KINDS[self.kind][1]
        if dtype is None:
            raise CheckpointError(
                f"{shown(self.name)} has dtype {self.kind}, which torch does not have. Convert it to another dtype "
                f"before it is loaded."
            )
        return dtype


def read_header(data: bytes, path: Path, base: int, size: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors that a header lists, in the order of their bytes, and its metadata.

    Args:
        data: The header.
        path: The file, for messages.
        base: Where the header ends and the tensors begin.
        size: Length of the file in bytes.

    Raises:
        CheckpointError: The header is not valid or does not fit the file.
    """
    text = decoded(data, path)
    opening = _OPENING.match(text)
    tensors = _usual(text, opening.end(), base) if opening else None
    if opening and tensors is not None:
        text = text[: opening.end()].rstrip(",") + "}"  # the metadata alone
    found = parsed(text, path)
    metadata = found.pop(_METADATA, None)
    if tensors is None:
        tensors = {name: _entry(name, fields, path, base) for name, fields in found.items()}
    return _in_order(tensors, path, base, size), {} if metadata is None else texts(metadata, path, _METADATA)


def _usual(text: str, begin: int, base: int) -> dict[str, TensorEntry] | None:
    """The tensors of a header from `begin` on, if it is laid out as every writer does it and nothing is wrong with it.

    One regular expression over it all takes half the time of a JSON reader, which makes containers that the garbage
    collector then walks. Whatever is not as expected is left to that reader, and to those who know what to say of it.
    """
    if not text.rstrip(" ").endswith("}}"):  # it could end with the comma after an entry
        return None
    kinds: dict[tuple[str, str], Held] = {}  # few shapes make many tensors
    tensors: dict[str, TensorEntry] = {}
    count = 0
    for name, kind, dims, first, last, rest in _ENTRY.findall(text, begin):
        if rest:
            return None
        held = kinds.get((kind, dims))
        if held is None:
            try:
                held = kinds[kind, dims] = _held(kind, json.loads(f"[{dims}]"))
            except ValueError:
                return None
        kind, shape, nbytes = held
        start = int(first)
        if int(last) - start != nbytes:
            return None
        tensors[name] = tuple.__new__(TensorEntry, (name, kind, shape, base + start, nbytes))  # half of a call's time
        count += 1
    return tensors if len(tensors) == count and _METADATA not in tensors else None


def _entry(name: str, fields: Any, path: Path, base: int) -> TensorEntry:
    try:
        kind, dims, (start, end) = _checked(fields)
        kind, shape, nbytes = _held(kind, dims)
        if end - start != nbytes:
            raise ValueError(
                f"has {nbytes} bytes by its dtype {kind} and shape {shown(dims)}, and {shown(end - start)} by its "
                f"data_offsets {shown([start, end])}"
            )
    except ValueError as error:
        raise CheckpointError(f"{path}: {shown(name)} {error}. An entry is like {_EXAMPLE}.") from None
    return TensorEntry(name, kind, shape, base + start, nbytes)


def _checked(fields: Any) -> tuple[str, list[int], list[int]]:
    """Dtype, shape and offsets of an entry.

    Raises:
        ValueError: They are not there or not of these types. The text goes on after the tensor's name.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"is {shown(fields)}")
    missing, unknown = [key for key in _FIELDS if key not in fields], [shown(key) for key in fields.keys() - _FIELDS]
    if missing:
        raise ValueError(f"has no {listed(missing)}")
    if unknown:
        raise ValueError(f"has more than is known: {listed(sorted(unknown))}")
    kind, shape, offsets = (fields[key] for key in _FIELDS)
    if not isinstance(kind, str):
        raise ValueError(f"has dtype {shown(kind)}, which is no text")
    if not _are_whole(shape):
        raise ValueError(f"has shape {shown(shape)}, which is no list of whole numbers")
    if not _are_whole(offsets) or len(offsets) != 2:
        raise ValueError(f"has data_offsets {shown(offsets)}, which are not two whole numbers")
    return kind, shape, offsets


def _are_whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int for number in numbers)  # a bool is an int too


def _held(kind: str, dims: list[int]) -> Held:
    """Dtype, shape as torch sees it, and bytes, of whole numbers.

    Raises:
        ValueError: There is no such tensor. The text goes on after the tensor's name.
    """
    if kind not in KINDS:
        raise ValueError(f"has dtype {shown(kind)}; there are {', '.join(KINDS)}")
    bits = KINDS[kind][0]
    spread = 1  # elements as if no dimension were 0, since strides must fit as well
    for dim in dims:
        if dim < 0:
            raise ValueError(f"has shape {shown(dims)}; a dimension cannot be negative")
        spread *= dim or 1
        if spread > _MAX_ELEMENTS:
            raise ValueError(f"has shape {shown(dims)}, more elements than 63 bits count")
    total = 0 if 0 in dims else spread * bits
    if total % 8:
        raise ValueError(f"has dtype {kind} and shape {shown(dims)}: {total} bits, no whole number of bytes")
    if kind != "F4":
        return kind, tuple(dims), total // 8
    if not dims or dims[-1] % 2:
        raise ValueError(
            f"has dtype F4 and shape {shown(dims)}; the last dimension must be even, since torch holds two of these "
            f"numbers in one element"
        )
    return kind, (*dims[:-1], dims[-1] // 2), total // 8


def _in_order(tensors: dict[str, TensorEntry], path: Path, base: int, size: int) -> dict[str, TensorEntry]:
    """The tensors in the order of their bytes, which must cover the file from `base` to its end."""
    covered = base
    for entry in tensors.values():
        if entry.start != covered:
            break
        covered += entry.nbytes
    else:
        if covered == size:  # as every writer leaves it
            return tensors
    # An empty tensor goes before the one that begins where it stands.
    entries = sorted(tensors.values(), key=lambda entry: (entry.start, entry.nbytes))
    _check_cover(entries, path, base, size)
    return {entry.name: entry for entry in entries}


def _check_cover(entries: list[TensorEntry], path: Path, base: int, size: int) -> None:
    """Refuses tensors that overlap, leave a hole, or do not end where the file ends; `entries` are sorted."""
    covered, before = 0, "the header"  # counted as the header counts
    for entry in entries:
        start = entry.start - base
        end = start + entry.nbytes
        offsets = f"data_offsets {shown([start, end])}"
        if start < 0:
            raise CheckpointError(f"{path}: {shown(entry.name)} has negative {offsets}.")
        if end > size - base:
            raise CheckpointError(
                f"{path} is truncated or wrong: {shown(entry.name)} has {offsets}, and {size - base} bytes follow the "
                f"header."
            )
        if start != covered:
            how = "overlaps" if start < covered else "leaves a hole after"
            raise CheckpointError(
                f"{path}: {shown(entry.name)} with {offsets} {how} {before}, which ends at offset {covered}. Tensors "
                f"must follow each other."
            )
        covered, before = end, shown(entry.name)
    if covered != size - base:
        raise CheckpointError(
            f"{path}: {size - base - covered} bytes at its end, after {before} (offset {covered}), belong to no tensor."
        )
