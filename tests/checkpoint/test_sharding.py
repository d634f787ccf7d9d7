"""Distributed parameters: each rank reads its own part of a checkpoint, and no other byte."""

import os

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import kernelgraft
from kernelgraft.checkpoint import positioned
from kernelgraft.checkpoint.files import Checkpoint
from kernelgraft.checkpoint.reader import fill
from kernelgraft.checkpoint.sharding import local_part
from kernelgraft.errors import CheckpointError


@pytest.fixture
def mesh():
    """A mesh of 2 x 3 ranks, seen by one of them (torch keeps what it found for one rank): nothing needs to be sent."""
    dist.init_process_group("fake", rank=4, world_size=6, store=FakeStore())
    yield init_device_mesh("cpu", (2, 3))
    dist.destroy_process_group()


@pytest.fixture
def read(monkeypatch):
    found = []

    def counted(fd, buffers, offset):
        got = os.preadv(fd, buffers, offset)
        found.append(got)
        return got

    monkeypatch.setattr(positioned, "preadv", counted)
    return found


PLACEMENTS = {
    "rows": (Shard(0), Replicate()),
    "columns": (Replicate(), Shard(1)),
    "both": (Shard(0), Shard(1)),
    "rows twice": (Shard(0), Shard(0)),
    "whole": (Replicate(), Replicate()),
}


def sharded(value, mesh, placements, device):
    module = nn.Linear(value.shape[1], value.shape[0], bias=False)
    full = torch.zeros_like(value, device=device)
    module.weight = nn.Parameter(distribute_tensor(full, mesh, placements, src_data_rank=None))
    return module


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_rank_reads_its_part(name, device, mesh, read, tmp_path):
    value = torch.randn(10, 4096)
    save_file({"weight": value}, tmp_path / "model.safetensors")
    module = sharded(value, mesh, PLACEMENTS[name], device)
    kernelgraft.load(module, tmp_path)
    wanted = distribute_tensor(value, mesh, PLACEMENTS[name], src_data_rank=None)
    assert isinstance(module.weight, nn.Parameter)
    assert isinstance(module.weight, DTensor)
    assert module.weight.placements == wanted.placements
    assert module.weight.shape == value.shape
    assert torch.equal(module.weight.to_local(), wanted.to_local())
    # A live module's bytes are read once to see that they can be.
    assert sum(read) == wanted.to_local().nbytes * (2 if device == "cpu" else 1)


MERGED = {
    "rows after rows": torch.cat,
    "columns beside columns": lambda tensors: torch.cat(tensors, 1),
    "stack": torch.stack,
    "stack of pairs": lambda tensors: torch.stack([torch.cat(tensors[:2]), torch.cat(tensors[2:])]),
}


@pytest.mark.parametrize("merged", MERGED)
@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_rank_reads_its_part_of_what_is_merged(name, merged, mesh, read, tmp_path):
    tensors = {f"{i}.weight": torch.randn(7, 6144) for i in range(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    value = MERGED[merged](list(tensors.values()))
    wanted = distribute_tensor(value, mesh, PLACEMENTS[name], src_data_rank=None)
    target = distribute_tensor(torch.full_like(value, torch.nan), mesh, PLACEMENTS[name], src_data_rank=None)
    with Checkpoint([tmp_path / "model.safetensors"]) as checkpoint:
        local, part = local_part(target, MERGED[merged]([checkpoint[each] for each in tensors]))
        fill([(part, local)])
    assert torch.equal(target.to_local(), wanted.to_local())
    assert sum(read) == wanted.to_local().nbytes


def test_what_is_no_shard_is_refused(mesh, tmp_path):
    value = torch.randn(10, 8)
    save_file({"weight": value}, tmp_path / "model.safetensors")
    module = nn.Linear(8, 10, bias=False)
    module.weight = nn.Parameter(DTensor.from_local(value, mesh, (Partial(), Replicate()), run_check=False))
    with pytest.raises(CheckpointError, match="Shard and Replicate only"):
        kernelgraft.load(module, tmp_path)
