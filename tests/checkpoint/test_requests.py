"""For any re-layout of tensors of a file, the reads fill the target with what the eager operations give."""

import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from kernelgraft.checkpoint import requests
from kernelgraft.checkpoint.files import Checkpoint
from kernelgraft.checkpoint.reader import CpuLane
from kernelgraft.checkpoint.requests import Staged, Straight, reads_of
from relayouts import layout, sources


@st.composite
def cases(draw):
    tensors, _ = sources(draw)
    return tensors, layout(draw, list(tensors.values()))


def empty(shape, dtype, odd):
    """A tensor of NaN, or of the largest value; an odd one lies between others' elements."""
    if not odd:
        return torch.full(shape, torch.nan, dtype=dtype)
    wide = torch.full((*shape[::-1], 2), torch.nan, dtype=dtype)
    return wide[..., 1].permute(*reversed(range(len(shape))))


def carry_out(reads):
    lane = CpuLane()
    for read in reads:
        lane.run([read])
    lane.close()


@settings(max_examples=150, deadline=None)
@given(
    case=cases(),
    most=st.sampled_from([4, 8, 20, 64, 1 << 20]),
    shortest=st.sampled_from([1, 8, 2048]),
    gap=st.sampled_from([1, 9, 4096]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    odd=st.booleans(),
)
def test_reads_fill_what_the_operations_give(case, most, shortest, gap, dtype, odd):
    tensors, run = case
    eager = run(list(tensors.values()))
    with tempfile.TemporaryDirectory() as folder, Checkpoint([_saved(Path(folder), tensors)]) as checkpoint:
        lazies = run([checkpoint[name] for name in tensors])
        for lazy, wanted in zip(lazies, eager, strict=True):
            out = empty(tuple(wanted.shape), dtype, odd and wanted.ndim)
            with mock.patch.multiple(requests, _SHORTEST_RUN=shortest, _SMALL_GAP=gap):
                reads = list(reads_of(lazy, out, most))
            # One element is the least that can be read, and small gaps are read along.
            assert all(read.nbytes <= most for read in reads)
            if gap == 1:
                assert sum(read.nbytes for read in reads) == wanted.numel() * 4
            carry_out(reads)
            assert torch.equal(out, wanted.to(dtype))


def _saved(folder, tensors):
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture
def weights(tmp_path):
    tensors = {"a": torch.randn(64, 2048), "b": torch.randn(64, 2048), "c": torch.randn(32, 2048)}
    with Checkpoint([_saved(tmp_path, tensors)]) as checkpoint:
        yield tensors, checkpoint


def reads(lazy, most=1 << 24):
    return list(reads_of(lazy, torch.empty(lazy.shape, dtype=lazy.dtype), most))


def test_a_merge_goes_straight_to_its_place(weights):
    _, checkpoint = weights
    found = reads(torch.cat([checkpoint["a"], checkpoint["b"], checkpoint["c"]]))
    assert [(type(read), read.nbytes) for read in found] == [(Straight, 64 * 2048 * 4)] * 2 + [
        (Straight, 32 * 2048 * 4)
    ]


@pytest.mark.parametrize(("columns", "kinds"), [(16384, [Straight] * 8), (16383, [Staged] * 2)])
def test_a_stack_in_rows_goes_straight_too_where_rows_are_long(columns, kinds, tmp_path):
    with Checkpoint([_saved(tmp_path, {name: torch.randn(4, columns) for name in "ab"})]) as checkpoint:
        found = reads(torch.stack([checkpoint["a"], checkpoint["b"]], 1))
    assert [type(read) for read in found] == kinds


def test_a_transpose_is_staged_in_blocks(weights):
    _, checkpoint = weights
    found = reads(checkpoint["a"].t(), most=1 << 16)
    assert [type(read) for read in found] == [Staged] * 8
    assert all(read.nbytes == 1 << 16 for read in found)


def test_a_slice_reads_its_bytes_alone(weights):
    tensors, checkpoint = weights
    merged = torch.cat([checkpoint["a"], checkpoint["b"]])
    for lazy, wanted in (
        (merged[32:96], torch.cat([tensors["a"], tensors["b"]])[32:96]),
        (merged[:, 1024:], torch.cat([tensors["a"], tensors["b"]])[:, 1024:]),
        (torch.stack([checkpoint["a"], checkpoint["b"]])[1, :, :1024].t(), tensors["b"][:, :1024].t()),
    ):
        found = reads(lazy)
        assert sum(read.nbytes for read in found) == wanted.numel() * 4
        out = torch.empty(wanted.shape)
        carry_out(list(reads_of(lazy, out, 1 << 15)))
        assert torch.equal(out, wanted)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e8m0fnu,
        torch.float4_e2m1fn_x2,
        torch.bool,
        torch.uint16,
        torch.uint64,
        torch.complex64,
    ],
)
def test_bits_of_any_dtype_are_laid_out_anew(dtype, tmp_path):
    itemsize = dtype.itemsize
    raw = torch.randint(0, 2, (6, 4 * itemsize), dtype=torch.uint8)
    save_file({"a": raw.view(dtype)}, tmp_path / "a.safetensors")
    with Checkpoint([tmp_path / "a.safetensors"]) as checkpoint:
        out = torch.empty(4, 6, dtype=dtype)
        carry_out(list(reads_of(checkpoint["a"].t(), out, 1 << 20)))
    found = out.view(torch.uint8).view(4, 6, itemsize).transpose(0, 1)
    assert torch.equal(found, raw.view(6, 4, itemsize))
