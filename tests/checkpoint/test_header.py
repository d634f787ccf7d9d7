"""Headers of safetensors files: what is read of good ones, and that nothing else is taken for one."""

import contextlib
import json
import math
import sys

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from headers import entry, library_reads, refused, write
from kernelgraft.checkpoint.format import read_index
from kernelgraft.errors import CheckpointError

# Bits of an element and torch's name, of every dtype that safetensors 0.8 has.
KINDS = {
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
TORCH = [dtype for _, dtype in KINDS.values() if dtype is not None]
A = '{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
OTHER = '{"dtype":"U8","shape":[4],"data_offsets":[9,13]}'

# Hypothesis runs an example in the same folder as the one before, which overwrites its file.
fuzzed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)


# --- good files


def test_an_entry_says_where_the_bytes_are(tmp_path):
    header = {"__metadata__": {"format": "pt"}, "b": entry(), "a": entry("BF16", (2, 1), (4, 8))}
    path = write(tmp_path, header, b"abcdefgh")
    index = read_index(path)
    base = path.stat().st_size - 8
    assert list(index.tensors.values()) == [("b", "U8", (4,), base, 4), ("a", "BF16", (2, 1), base + 4, 4)]
    assert index.tensors["a"].dtype == torch.bfloat16
    assert index.metadata == {"format": "pt"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_of_the_library(kind, tmp_path):
    bits, dtype = KINDS[kind]
    path = write(tmp_path, {"a": entry(kind, (3, 8), (0, 3 * bits))}, bytes(3 * bits))
    assert library_reads(path) == {"a": (kind, [3, 8])}
    found = read_index(path).tensors["a"]
    assert (found.kind, found.nbytes) == (kind, 3 * bits)
    assert found.shape == ((3, 4) if kind == "F4" else (3, 8))
    if dtype is None:
        with pytest.raises(CheckpointError, match=f"'a' has dtype {kind}"):
            _ = found.dtype
    else:
        assert found.dtype == dtype


def test_the_library_has_no_other_dtype(tmp_path):
    path = write(tmp_path, {"a": entry("?")}, bytes(4))
    with pytest.raises(Exception, match="unknown variant") as error, safe_open(path, framework="pt"):
        pass
    assert set(str(error.value).split("expected one of ")[1].split("`")[1::2]) == set(KINDS)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(TORCH))
    shape = tuple(draw(st.lists(st.integers(0, 5), min_size=int(dtype == torch.float4_e2m1fn_x2), max_size=4)))
    size = math.prod(shape) * dtype.itemsize
    data = bytes(at % 2 if dtype == torch.bool else (7 * at + size) % 256 for at in range(size))
    tensor = torch.frombuffer(bytearray(data), dtype=dtype) if size else torch.empty(0, dtype=dtype)
    return tensor.reshape(shape), data


@fuzzed
@given(
    st.dictionaries(TEXT.filter("__metadata__".__ne__), tensors(), max_size=6),
    st.none() | st.dictionaries(TEXT, TEXT, max_size=3),
)
def test_what_the_library_writes_is_read_as_it_was(tmp_path, content, metadata):
    assume(content or metadata != {})  # safetensors 0.8 writes no JSON then, and cannot read it either
    path = tmp_path / "model.safetensors"
    save_file({name: tensor for name, (tensor, _) in content.items()}, path, metadata)
    index, raw = read_index(path), path.read_bytes()
    assert index.metadata == (metadata or {})
    assert index.tensors.keys() == content.keys()
    for name, (tensor, data) in content.items():
        found = index.tensors[name]
        assert (found.name, found.dtype, found.shape) == (name, tensor.dtype, tuple(tensor.shape))
        assert raw[found.start : found.start + found.nbytes] == data
    starts = [found.start for found in index.tensors.values()]
    assert starts == sorted(starts)


@pytest.mark.parametrize("spaces", ["", " ", "        "])
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"a": '{"b"}, "', "c": "}"}, {"a": "\u00e9\n"}])
def test_the_layout_of_the_json_does_not_matter(spaces, separators, metadata, tmp_path):
    header = {"__metadata__": metadata, "a\n\u00e9": entry(), "b": entry("F32", (1,), (4, 8))}
    path = write(tmp_path, json.dumps(header, separators=separators) + spaces, bytes(8))
    index = read_index(path)
    assert {name: found.kind for name, found in index.tensors.items()} == {"a\n\u00e9": "U8", "b": "F32"}
    assert index.metadata == (metadata or {})
    backwards = write(tmp_path, json.dumps(dict(reversed(header.items())), separators=separators) + spaces, bytes(8))
    assert read_index(backwards).tensors == index.tensors
    assert list(read_index(backwards).tensors) == list(index.tensors)


def test_fields_may_stand_in_any_order(tmp_path):
    path = write(tmp_path, '{"a":{"data_offsets":[0,4],"shape":[4],"dtype":"U8"}}', bytes(4))
    assert read_index(path).tensors["a"].shape == (4,)


GOOD = {
    "no tensors": ({}, 0),
    "a scalar": ({"a": entry(shape=(), offsets=(0, 1))}, 1),
    "nothing in it": ({"a": entry(shape=(2, 0), offsets=(0, 0))}, 0),
    "nothing in it, before and after": (
        {"z": entry(shape=(0,), offsets=(4, 4)), "a": entry(), "y": entry(shape=(0,), offsets=(0, 0))},
        4,
    ),
    "no name": ({"": entry()}, 4),
    "not aligned": ({"a": entry(shape=(1,), offsets=(0, 1)), "b": entry("F64", (1,), (1, 9))}, 9),
    "many dimensions": ({"a": entry(shape=[1] * 500 + [4])}, 4),
    "a huge dimension of nothing": ({"a": entry("F64", (2**62, 0), (0, 0))}, 0),
    "metadata of null": ({"__metadata__": None, "a": entry()}, 4),
}


@pytest.mark.parametrize("name", GOOD)
def test_unusual_files_that_are_valid(name, tmp_path):
    header, length = GOOD[name]
    path = write(tmp_path, header, bytes(length))
    theirs = library_reads(path)
    assert theirs is not None
    assert {name: (found.kind, list(found.shape)) for name, found in read_index(path).tensors.items()} == theirs


# --- bad files: JSON

BAD_JSON = {
    "nothing": ("", "Expecting value"),
    "no JSON": ("{a", "line 1 column 2"),
    "cut off": ('{"a":' + A, "delimiter"),
    "a comma too many": ('{"a":' + A + ",}", "line 1"),
    "something after": ('{"a":' + A + "}\0", "Extra data"),
    "not UTF-8": (b'{"\xff":' + A.encode() + b"}", "UTF-8", "position 2"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "BOM"),
    "a control character": ('{"a\x01":' + A + "}", "control character"),
    "half a character": ('{"\\ud800":' + A + "}", "half a character", r"'\ud800'"),
    "half a character in metadata": ('{"__metadata__":{"a":"\\udc00"},"a":' + A + "}", "half a character"),
    "nested lists": ('{"a":' + "[" * 100_000, "nested too deeply"),
    "nested objects": ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    "nested, in an entry": (
        '{"a":{"dtype":"U8","shape":' + "[" * 50_000 + "]" * 50_000 + ',"data_offsets":[0,4]}}',
        "deeply",
    ),
    "an array": ("[]", "must be an object", "[]"),
    "a text": ('"a"', "must be an object", "'a'"),
    "null": ("null", "must be an object", "None"),
    "NaN": ("NaN", "must be an object"),
    "an entry alone": (A, "'dtype' is 'U8'"),
    "a number of 5000 digits": ('{"a":' + A.replace("[4]", f"[{'9' * 5000}]") + "}", "digits"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_header_that_is_not_right_as_json(name, tmp_path):
    header, *said = BAD_JSON[name]
    path = write(tmp_path, header, bytes(4))
    refused(path, *said)
    assert library_reads(path) is None


def test_the_stack_of_the_caller_is_not_what_is_nested(tmp_path):
    path = write(tmp_path, {"a": entry()}, bytes(4))

    def deep(left):
        return deep(left - 1) if left else read_index(path)

    depth = sys.getrecursionlimit()
    for left in range(depth - 200, depth, 5):
        with contextlib.suppress(CheckpointError, RecursionError):  # the file's error or the caller's own, and no other
            assert "a" in deep(left).tensors


# --- bad files: what the JSON says

BAD = {
    "metadata with a number": ({"__metadata__": {"a": 1}, "a": entry()}, "__metadata__ has 1 under 'a'"),
    "metadata with null": ({"__metadata__": {"a": None}, "a": entry()}, "__metadata__ has None under 'a'"),
    "metadata with an object": ({"__metadata__": {"a": {}}, "a": entry()}, "__metadata__ has {} under 'a'"),
    "metadata as a list": ({"__metadata__": [], "a": entry()}, "__metadata__ must be an object"),
    "metadata as a tensor": (
        {"a": entry(), "__metadata__": entry(offsets=(4, 8))},
        "__metadata__ has [4] under 'shape'",
    ),
    "an entry of null": ({"a": None}, "'a' is None"),
    "an entry of a number": ({"a": 4}, "'a' is 4"),
    "an entry of a text": ({"a": "U8"}, "'a' is 'U8'"),
    "no dtype": ({"a": {"shape": [4], "data_offsets": [0, 4]}}, "'a' has no dtype"),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, "'a' has no shape"),
    "no offsets": ({"a": {"dtype": "U8", "shape": [4]}}, "'a' has no data_offsets"),
    "nothing": ({"a": {}}, "'a' has no dtype, shape, data_offsets"),
    "an unknown dtype": ({"a": entry("C128")}, "'a' has dtype 'C128'", "BF16, I32"),
    "a dtype in small letters": ({"a": entry("u8")}, "'a' has dtype 'u8'"),
    "a dtype that is a number": ({"a": entry(8)}, "'a' has dtype 8"),
    "a dtype that is a list": ({"a": entry(["U8"])}, "'a' has dtype ['U8']"),
    "a negative dimension": ({"a": entry(shape=(-4,))}, "'a' has shape [-4]", "negative"),
    "two negative dimensions": ({"a": entry(shape=(-2, -2))}, "'a' has shape [-2, -2]", "negative"),
    "a dimension with a fraction": ({"a": entry(shape=(4.0,))}, "'a' has shape [4.0]", "whole"),
    "a dimension without end": ({"a": entry(shape=(math.inf,))}, "'a' has shape [inf]", "whole"),
    "a dimension that is no number": ({"a": entry(shape=(math.nan,))}, "'a' has shape [nan]", "whole"),
    "a dimension of true": ({"a": entry(shape=(4, True))}, "'a' has shape [4, True]", "whole"),
    "a dimension of text": ({"a": entry(shape=("4",))}, "'a' has shape ['4']", "whole"),
    "a dimension of null": ({"a": entry(shape=(None,))}, "'a' has shape [None]", "whole"),
    "a nested shape": ({"a": entry(shape=([4],))}, "'a' has shape [[4]]", "whole"),
    "a shape that is a number": ({"a": {**entry(), "shape": 4}}, "'a' has shape 4", "whole"),
    "a huge dimension": ({"a": entry(shape=(2**64,))}, "'a' has shape [18446744073709551616]", "63 bits"),
    "a huge product": ({"a": entry(shape=(2**32, 2**32))}, "'a' has shape [4294967296, 4294967296]", "63 bits"),
    "a product of 2**64 bytes": ({"a": entry("F64", (2**61,), (0, 0))}, "'a' has 18446744073709551616 bytes"),
    "one offset": ({"a": entry(offsets=(4,))}, "'a' has data_offsets [4]", "two whole"),
    "three offsets": ({"a": entry(offsets=(0, 2, 4))}, "'a' has data_offsets [0, 2, 4]", "two whole"),
    "offsets with a fraction": ({"a": entry(offsets=(0, 4.0))}, "'a' has data_offsets [0, 4.0]", "two whole"),
    "offsets of false": ({"a": entry(offsets=(False, 4))}, "'a' has data_offsets [False, 4]", "two whole"),
    "offsets of text": ({"a": {**entry(), "data_offsets": "04"}}, "'a' has data_offsets '04'", "two whole"),
    "negative offsets": ({"a": entry(offsets=(-4, 0))}, "'a' has negative data_offsets [-4, 0]"),
    "negative offsets beside a tensor": (
        {"a": entry(), "b": entry(offsets=(-4, 0))},
        "'b' has negative data_offsets [-4, 0]",
    ),
    "reversed offsets": ({"a": entry(offsets=(4, 0))}, "'a' has 4 bytes", "-4 by its data_offsets [4, 0]"),
    "offsets past the end": (
        {"a": entry(shape=(5,), offsets=(0, 5))},
        "'a' has data_offsets [0, 5], and 4 bytes follow",
    ),
    "offsets far past the end": (
        {"a": entry(offsets=(2**70, 2**70 + 4))},
        "'a' has data_offsets",
        "and 4 bytes follow",
    ),
    "more shape than bytes": ({"a": entry(shape=(5,))}, "'a' has 5 bytes", "shape [5]", "4 by its data_offsets [0, 4]"),
    "less shape than bytes": ({"a": entry("BF16", (1,))}, "'a' has 2 bytes", "dtype BF16"),
    "half a byte": ({"a": entry("F4", (7,))}, "'a' has dtype F4 and shape [7]: 28 bits"),
    "half a byte, a scalar": ({"a": entry("F4", (), (0, 1))}, "'a' has dtype F4 and shape []: 4 bits"),
    "a part of a byte": ({"a": entry("F6_E2M3", (2, 1), (0, 2))}, "'a' has dtype F6_E2M3 and shape [2, 1]: 12 bits"),
    "an overlap": (
        {"a": entry(shape=(3,), offsets=(0, 3)), "b": entry(shape=(2,), offsets=(2, 4))},
        "'b' with data_offsets [2, 4] overlaps 'a', which ends at offset 3",
    ),
    "the same bytes twice": ({"a": entry(), "b": entry()}, "'b' with data_offsets [0, 4] overlaps 'a'"),
    "one inside another": (
        {"a": entry(), "b": entry(shape=(1,), offsets=(1, 2))},
        "'b' with data_offsets [1, 2] overlaps 'a'",
    ),
    "nothing inside another": (
        {"a": entry(), "b": entry(shape=(0,), offsets=(1, 1))},
        "'b' with data_offsets [1, 1] overlaps 'a'",
    ),
    "a hole before": (
        {"a": entry(shape=(3,), offsets=(1, 4))},
        "'a' with data_offsets [1, 4] leaves a hole after the header",
    ),
    "a hole between": (
        {"a": entry(shape=(1,), offsets=(0, 1)), "b": entry(shape=(2,), offsets=(2, 4))},
        "'b' with data_offsets [2, 4] leaves a hole after 'a', which ends at offset 1",
    ),
    "a hole behind": ({"a": entry(shape=(3,), offsets=(0, 3))}, "1 bytes at its end, after 'a' (offset 3)"),
    "data and no tensor": ({}, "4 bytes at its end, after the header"),
    "data and metadata alone": ({"__metadata__": {"a": "b"}}, "4 bytes at its end, after the header"),
}


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize("name", BAD)
def test_a_header_that_says_what_cannot_be(name, separators, tmp_path):
    header, *said = BAD[name]
    path = write(tmp_path, json.dumps(header, separators=separators), bytes(4))
    message = refused(path, *said)
    assert len(message) < 1000
    assert library_reads(path) is None


@pytest.mark.parametrize(
    ("number", "shape"),
    [("-0", "[-0]"), ("00", None), ("1e0", None), ("1e400", None), ("1" * 100, None), ("-1", None), ("\u0664", None)],
)
def test_numbers_that_are_spelt_as_no_whole_number(number, shape, tmp_path):
    for header in (A.replace("[4]", f"[{number}]").replace("[0,4]", "[0,0]"), A.replace("[0,4]", f"[{number},4]")):
        path = write(tmp_path, '{"a":' + header + "}", b"" if number == "-0" and "-0,4" not in header else bytes(4))
        refused(path)
        assert library_reads(path) is None


STRICTER = {
    "a name twice": (f'{{"a":{A},"a":{A}}}', "'a' stands twice"),
    "a name twice, with other bytes": (f'{{"a":{OTHER},"a":{A}}}', "'a' stands twice"),
    "a name twice, spelt otherwise": (f'{{"a":{A},"\\u0061":{A}}}', "'a' stands twice"),
    "a name twice in metadata": (f'{{"__metadata__":{{"b":"1","b":"2"}},"a":{A}}}', "'b' stands twice"),
    "an unknown field": (json.dumps({"a": entry(strides=[1])}), "'a' has more than is known: 'strides'"),
    "an entry as a list": ('{"a":["U8",[4],[0,4]]}', "'a' is ['U8', [4], [0, 4]]"),
    "a dtype as an object": (json.dumps({"a": entry({"U8": None})}), "'a' has dtype {'U8': None}"),
    "no strides": (json.dumps({"a": entry(), "z": entry(shape=(0, 2**32, 2**32), offsets=(0, 0))}), "'z' has shape"),
    "F4 that torch cannot halve": (json.dumps({"a": entry("F4", (8, 1))}), "'a' has dtype F4 and shape [8, 1]", "even"),
}


@pytest.mark.parametrize("name", STRICTER)
def test_what_the_library_takes_and_we_do_not(name, tmp_path):
    header, *said = STRICTER[name]
    path = write(tmp_path, header, bytes(4))
    refused(path, *said)
    assert library_reads(path) is not None


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_a_field_twice(field, tmp_path):
    again = {"dtype": '"U8"', "shape": "[4]", "data_offsets": "[0,4]"}[field]
    path = write(tmp_path, '{"a":' + A[:-1] + f',"{field}":{again}}}}}', bytes(4))
    refused(path, f"'{field}' stands twice")


def test_metadata_twice(tmp_path):
    path = write(tmp_path, '{"__metadata__":{},"__metadata__":{},"a":' + A + "}", bytes(4))
    refused(path, "'__metadata__' stands twice")


def test_a_message_is_short_whatever_the_file_holds(tmp_path):
    path = write(tmp_path, {"n" * 100_000: entry(shape=["x" * 10_000] * 100)}, bytes(4))
    assert len(refused(path, "nnn")) < 5000


# --- fuzz

SEEDS = [
    {},
    {"a": entry()},
    {"__metadata__": {"format": "pt"}, "a": entry("BF16", (2, 3), (0, 12)), "b": entry("I64", (), (12, 20))},
    {"a": entry("F4", (2, 4), (0, 4)), "b": entry("F6_E3M2", (4,), (4, 7)), "c": entry(shape=(0,), offsets=(7, 7))},
]
LEAVES = (
    st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.sampled_from([*KINDS])
    | st.integers(-2, 20) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 10**40])
)  # fmt: skip
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner))


def check(path):
    """An index is inside its file, covers it once and is the library's; anything else is a `CheckpointError`."""
    try:
        index = read_index(path)
    except CheckpointError:
        return
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    for found in index.tensors.values():
        assert found.start == end
        assert found.nbytes >= 0
        end += found.nbytes
    assert end == index.size == len(raw)
    assert library_reads(path).keys() == index.tensors.keys()


def places(value, at=()):
    yield at
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*at, key))


def replaced(value, at, new):
    if not at:
        return new
    changed = value.copy()
    changed[at[0]] = replaced(value[at[0]], at[1:], new)
    return changed


@fuzzed
@given(st.data())
def test_fuzz_of_json_values(tmp_path, data):
    header = data.draw(st.sampled_from(SEEDS))
    for _ in range(data.draw(st.integers(1, 3))):
        header = replaced(header, data.draw(st.sampled_from([*places(header)])), data.draw(VALUES))
    separators = data.draw(st.sampled_from([(",", ":"), None]))
    check(write(tmp_path, json.dumps(header, separators=separators), bytes(data.draw(st.integers(0, 24)))))


BYTES = st.integers(0, 255) | st.sampled_from(b'0123456789"{}[],:-')


@fuzzed
@given(st.data())
def test_fuzz_of_bytes(tmp_path, data):
    header = data.draw(st.sampled_from(SEEDS))
    end = max((value["data_offsets"][1] for key, value in header.items() if key[0] != "_"), default=0)
    path = write(tmp_path, json.dumps(header, separators=(",", ":")), bytes(end))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(BYTES)
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))])
    check(path)


@fuzzed
@given(st.integers(0, 2**64 - 1) | st.integers(0, 300), st.sampled_from(SEEDS), st.integers(0, 30))
def test_fuzz_of_lengths(tmp_path, length, header, behind):
    check(write(tmp_path, json.dumps(header), bytes(behind), length))
