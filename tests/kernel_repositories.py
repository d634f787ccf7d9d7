"""Writes kernel repositories for tests, in each of the local forms, and loads from them."""

import itertools
import json
import textwrap

import pytest

from kernelgraft.errors import KernelError
from kernelgraft.kernel import load_kernel
from kernelgraft.reference import KernelReference

KERNEL = """
    import torch
    from torch import nn

    class FastNormLayout(nn.Module):
        def __init__(self, hidden_size):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(hidden_size))

    class FastNorm(nn.Module):
        can_torch_compile = True
        weight: torch.Tensor

        def forward(self, x):
            return x * {factor}

    class Bare(nn.Module):
        has_backward = False

        @staticmethod
        def supports(x):
            return x.dtype == torch.float32 or "float32 only"

        def forward(self, x):
            return x

    def rotary(q, k):
        return k, q
"""
LAYERS = """
    class layers:
        FastNorm = FastNorm
        alias = FastNorm
        Bare = Bare
        rotary = rotary
"""
ids = itertools.count()


def source(factor=2, layers=LAYERS):
    return textwrap.dedent(KERNEL.format(factor=factor)) + textwrap.dedent(layers)


def write_file(folder, **kwargs):
    path = folder / "fast.py"
    path.write_text(source(**kwargs))
    return path


def write_package(folder, **kwargs):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text("from . import layers\n")
    (folder / "layers.py").write_text("from .fast import Bare, FastNorm, rotary\nalias = FastNorm\n")
    (folder / "fast.py").write_text(source(layers="", **kwargs))
    return folder


def write_repository(folder, *, module_id=None, variant="torch-universal", **kwargs):
    build = write_package(folder / "build" / variant, **kwargs)
    metadata = {
        "name": "fast-norm",
        "id": module_id or f"_fast_norm_test_{next(ids)}",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (build / "metadata.json").write_text(json.dumps(metadata))
    return folder


def load(place, name="FastNorm", **kwargs):
    return load_kernel(KernelReference.parse(f"{place}:{name}", metadata=kwargs))


def refused(place, name="FastNorm", **kwargs):
    with pytest.raises(KernelError) as error:
        load(place, name, **kwargs)
    assert name in str(error.value)
    return str(error.value)


def hub_cache(cache, monkeypatch, name, commits):
    """A cache of the Hub that holds a repository at several branches, each with a factor of its own, and no network."""
    repository = cache / f"kernels--{name.replace('/', '--')}"
    for number, (branch, commit) in enumerate(commits.items(), 1):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
        write_repository(repository / "snapshots" / commit, factor=number)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    return repository
