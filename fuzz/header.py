"""Throws broken safetensors files at `read_index`.

Whatever the bytes are, `read_index` must give an index or raise `CheckpointError`, and nothing else. An index must
cover the file exactly, without overlap, and say what the safetensors library says of the same file. A file that the
library reads and we do not must be refused for one of the reasons that `checkpoint/header.py` gives.

    PYTHONPATH=src python fuzz/header.py --minutes 10

With atheris installed its coverage guides the search; without it the same mutations are drawn at random. The input that
breaks a rule is left in the working directory as `crash-*`.

Run on 2026-11-29 (commit ba549a6) with atheris 3.0.0, Python 3.11, safetensors 0.8.0:
`python fuzz/header.py --minutes 10 --seed 3`, 1,065,013 executions, no findings.
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

try:
    import atheris
except ImportError:
    atheris = None

from safetensors import SafetensorError, safe_open

with atheris.instrument_imports(include=["kernelgraft.checkpoint"]) if atheris else nullcontext():
    from kernelgraft.checkpoint.format import FileIndex, read_index
    from kernelgraft.errors import CheckpointError

MAX_BYTES = 4096
BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F16": 16, "BF16": 16, "C64": 64}
KINDS = [
    *("BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    *("I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"),
]
# Where we refuse what the library takes, our message says one of these.
STRICTER = re.compile(
    r"stands twice|has more than is known|' is \[|which is no text|more elements than 63 bits|must be even"
)
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|[a-zA-Z]+|\s+|.', re.DOTALL)
SPELLINGS = {"0": ["-0", "0.0", "false", "null", "00"], "1": ["true", "1.0", "01", "1e0"], "4": ["4.0", "04", '"4"']}
TOKENS = [
    *("{", "}", "[", "]", ",", ":", " ", "\n", "null", "true", "false", "NaN", "Infinity", "-Infinity", "\ufeff", "\0"),
    *(
        "0",
        "-0",
        "1",
        "-1",
        "01",
        "2",
        "3",
        "4",
        "8",
        "16",
        "1.0",
        "1e0",
        "1e400",
        "-1e-9",
        "0.5",
        "1" * 40,
        "9" * 5000,
    ),
    *(str(2**bits + more) for bits in (31, 32, 53, 61, 62, 63, 64) for more in (-1, 0, 1)),
    *('""', '"a"', '"\\u0061"', '"\\ud800"', '"\\ud83d\\ude00"', '"__metadata__"', '"dtype"', '"shape"', '"x":1,'),
    *(
        '"data_offsets"',
        "[0,0]",
        "[0,4]",
        "[]",
        "{}",
        "[[[[",
        "[" * 2000,
        '{"a":' * 300,
        '{"U8":null}',
        '["U8",[4],[0,4]]',
    ),
    *(f'"{kind}"' for kind in KINDS),
]


def file_of(header: str, data: bytes) -> bytes:
    """A safetensors file."""
    raw = header.encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + data


def bits_of(kind: str) -> int:
    """Bits of one element."""
    return BITS.get(kind) or int(re.findall(r"\d+", kind)[0])


def valid(tensors: Iterable[tuple[str, str, list[int]]], metadata: Any = None, **dumps: Any) -> bytes:
    """A valid file of tensors (name, dtype, shape) that follow each other."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, kind, shape in tensors:
        bits = math.prod(shape, start=bits_of(kind))
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + bits // 8]}
        end += bits // 8
    return file_of(json.dumps(header, **{"separators": (",", ":"), **dumps}), bytes(end))


SEEDS = [
    valid([]),
    valid([("a", "U8", [4])]),
    valid([("a", "BF16", [2, 3]), ("b.weight", "F32", []), ("c", "I64", [0, 3]), ("d", "U8", [1])], {"format": "pt"}),
    valid([(kind, kind, [2, 4]) for kind in KINDS]),
    valid([("x", "F4", [3, 2]), ("\u00e9\U0001f600", "F8_E8M0", [5])], {"a": "{}", "b": '"'}, separators=None),
    valid([("a", "U8", [4]), ("b", "I16", [2])], {}, sort_keys=True),
    file_of(
        '{"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
        bytes(4),
    ),
]


def mutated(data: bytes, draw: random.Random) -> bytes:
    """The file with a few things changed: tokens of its JSON, bytes, the length in front, the data behind."""
    length = int.from_bytes(data[:8], "little")
    header, tail = data[8 : 8 + length], data[8 + length :]
    for _ in range(draw.choice((1, 1, 1, 2, 3, 5))):
        match draw.randrange(8):
            case 0:
                header = _flipped(header, draw)
            case 1:
                tail = tail[: draw.randrange(len(tail) + 1)] if draw.random() < 0.5 else tail + bytes(draw.randrange(9))
            case 2:
                header = nearly_valid(draw).encode()
            case _:
                text = _retokened(header.decode("utf-8", "surrogateescape"), draw)
                header = text.encode("utf-8", "surrogatepass")
    if draw.random() < 0.5:  # as long as the header says, so that it is no more than the header that is wrong
        ends = [int(end) for end in re.findall(rb"([0-9]{1,4})\s*\]\s*}", header)]
        tail = bytes(max(ends, default=0))
    length = len(header)
    if draw.random() < 0.05:
        length = draw.choice((0, 1, length - 1, length + 1, length + len(tail), 10**8, 10**8 + 1, 2**63, 2**64 - 1))
    whole = max(length, 0).to_bytes(8, "little") + header + tail
    return whole[: draw.randrange(len(whole))] if draw.random() < 0.02 else whole


def nearly_valid(draw: random.Random) -> str:
    """A header whose bytes fit its shapes, but whose tensors may be out of place or spelt as they should not be."""
    entries, end = [], 0
    for name in draw.sample("abcdef", draw.randrange(1, 5)):
        kind, shape = draw.choice(KINDS), draw.choices((0, 1, 2, 3, 4, 8), k=draw.randrange(4))
        bits = math.prod(shape, start=bits_of(kind))
        start = end + (draw.choice((-2, -1, 1, 2)) if draw.random() < 0.1 else 0)
        numbers = [str(number) for number in (*shape, start, start + draw.choice((bits, bits + 7)) // 8)]
        if draw.random() < 0.3:
            at = draw.randrange(len(numbers))
            numbers[at] = draw.choice(SPELLINGS.get(numbers[at], ["{}"])).format(numbers[at])
        *dims, first, last = numbers
        fields = f'{{"dtype":"{kind}","shape":[{",".join(dims)}],"data_offsets":[{first},{last}]}}'
        entries.append(f'"{name}":{fields}')
        end = start + bits // 8
    if draw.random() < 0.3:
        draw.shuffle(entries)
    return "{" + ",".join(entries) + "}"


def _flipped(header: bytes, draw: random.Random) -> bytes:
    changed = bytearray(header)
    for _ in range(draw.choice((1, 1, 2, 4)) if header else 0):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def _retokened(text: str, draw: random.Random) -> str:
    tokens = TOKEN.findall(text)
    if not tokens:
        return draw.choice(TOKENS)
    at = draw.randrange(len(tokens))
    till = min(len(tokens), at + draw.choice((1, 1, 1, 2, 3, 5, 16)))
    match draw.randrange(5):
        case 0:
            tokens[at] = draw.choice(TOKENS)
        case 1:
            tokens.insert(at, draw.choice(TOKENS))
        case 2:
            del tokens[at:till]
        case 3:
            tokens[at:at] = tokens[at:till]
        case _:
            tokens[at] = draw.choice(
                [token for token in tokens if token[0] == tokens[at][0] or token.isdigit()] or ["0"]
            )
    return "".join(tokens)


class Target:
    """The rules above, for one input after the other.

    Attributes:
        runs: How many inputs there were.
        accepted: How many of them were valid files.
    """

    def __init__(self, folder: Path) -> None:
        self.runs = self.accepted = 0
        self._path = folder / "x.safetensors"

    def check(self, data: bytes) -> None:
        """Raises `AssertionError` where a rule is broken, and whatever `read_index` should not raise."""
        self.runs += 1
        self._path.write_bytes(data)
        theirs = self._library()
        try:
            index = read_index(self._path)
        except CheckpointError as error:
            if theirs is not None and not STRICTER.search(str(error)):
                raise AssertionError(f"the library reads {theirs}, and we refuse it: {error}") from error
            return
        self.accepted += 1
        check_cover(index, data)
        ours = {name: (entry.kind, entry.shape) for name, entry in index.tensors.items()}
        if theirs is None or ours != theirs[0] or dict(index.metadata) != theirs[1]:
            raise AssertionError(f"we read {ours} {index.metadata}, the library {theirs}")

    def _library(self) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]] | None:
        try:
            with safe_open(self._path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                found = {name: (each.get_dtype(), each.get_shape()) for name, each in slices.items()}
                return {
                    name: (kind, _held(kind, shape)) for name, (kind, shape) in found.items()
                }, file.metadata() or {}
        except SafetensorError:
            return None


def _held(kind: str, shape: list[int]) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] // 2) if kind == "F4" and shape else tuple(shape)


def check_cover(index: FileIndex, data: bytes) -> None:
    """The tensors follow each other from the header's end to the end of the file."""
    end = 8 + int.from_bytes(data[:8], "little")
    for name, entry in index.tensors.items():
        if name != entry.name or entry.start != end or entry.nbytes < 0:
            raise AssertionError(f"{entry} begins elsewhere than at {end}")
        end += entry.nbytes
    if end != len(data) or index.size != len(data):
        raise AssertionError(f"{end} bytes of {len(data)} are covered")


def search(target: Target, seconds: float, seed: int) -> None:
    """Random mutations of the seeds, and of what they led to where that was still valid."""
    draw, pool, until = random.Random(seed), list(SEEDS), time.monotonic() + seconds
    while time.monotonic() < until:
        before = target.accepted
        data = mutated(draw.choice(pool), draw)
        try:
            target.check(data)
        except BaseException:
            name = f"crash-{hashlib.sha1(data).hexdigest()}"
            Path(name).write_bytes(data)
            print(f"{target.runs} executions, 1 finding: {name}", file=sys.stderr)
            raise
        if target.accepted > before and len(data) <= MAX_BYTES:
            pool.append(data) if len(pool) < 500 else pool.__setitem__(draw.randrange(len(SEEDS), 500), data)


def search_guided(target: Target, seconds: float, seed: int, folder: Path) -> int:
    """The same mutations and those of libFuzzer, kept where they reach new code. Gives the exit code."""

    def mutate(data: bytes, max_size: int, number: int) -> bytes:
        draw = random.Random(number)
        return mutated(data, draw)[:max_size] if draw.random() < 0.8 else atheris.Mutate(data, max_size)

    corpus = folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(SEEDS):
        (corpus / f"seed-{number}").write_bytes(data)
    options = [f"-max_total_time={int(seconds)}", f"-seed={seed}", f"-max_len={MAX_BYTES}", "-print_final_stats=1"]
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    atheris.Setup([sys.argv[0], *options, str(corpus)], target.check, custom_mutator=mutate)
    atheris.Fuzz()  # ends the process, and leaves no `with`
    raise AssertionError("atheris came back")


def main() -> None:
    """Fuzzes for a while."""
    arguments = argparse.ArgumentParser(description="Fuzzes the reader of safetensors headers.")
    arguments.add_argument("--minutes", type=float, default=10)
    arguments.add_argument("--seed", type=int, default=1)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        target = Target(Path(name))
        for data in SEEDS:
            target.check(data)
        if target.accepted != len(SEEDS):
            raise AssertionError("a seed is no valid file")
        if atheris:
            sys.exit(search_guided(target, given.minutes * 60, given.seed, Path(name)))
        search(target, given.minutes * 60, given.seed)
        print(f"{target.runs} executions, {target.accepted} of valid files, no findings")


if __name__ == "__main__":
    main()
