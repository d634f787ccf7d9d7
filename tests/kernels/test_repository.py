"""The shipped kernels as a repository: they stand alone, `check` finds nothing, and an export loads."""

import ast
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import kernels
import pytest
import torch

import kernelgraft
import kernelgraft.kernels
from kernelgraft.authoring.check import check
from kernelgraft.authoring.export import export
from kernelgraft.kernel import load_kernel
from kernelgraft.kernels import layers
from kernelgraft.reference import KernelReference

FOLDER = Path(kernelgraft.kernels.__file__).parent


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    place = tmp_path_factory.mktemp("published") / "kernelgraft-kernels"
    shutil.copytree(FOLDER, place, ignore=shutil.ignore_patterns("__pycache__"))
    export(place)
    return place


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_nothing_of_the_package_is_imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level <= 1
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        names += [each.name for each in node.names] if isinstance(node, ast.Import) else []
        assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "torch", "triton", "transformers"}


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_nothing_is_tuned(file):
    """A kernel that is tuned measures at a user's first call, and launches what was fastest that time."""
    tuning = pytest.importorskip("triton.runtime.autotuner")
    named = {
        getattr(node, key) for node in ast.walk(ast.parse(file.read_text())) for key in ("id", "attr", "name")
        if isinstance(getattr(node, key, None), str)
    }  # fmt: skip
    assert not named & {"autotune", "Autotuner", "heuristics", "Heuristics"}
    module = importlib.import_module(f"{kernelgraft.kernels.__name__}.{file.stem}".removesuffix(".__init__"))
    assert not [name for name, value in vars(module).items() if isinstance(value, tuning.Autotuner | tuning.Heuristics)]


def test_an_import_brings_neither_transformers_nor_a_compilation():
    code = "import kernelgraft.kernels, sys; print([n for n in ('transformers', 'torch._dynamo') if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_check_finds_nothing(copy):
    assert check(copy).findings == ()


@pytest.mark.transformers
def test_the_kernels_library_loads_an_export(copy):
    assert sorted(path.name for path in (copy / "build").iterdir()) == ["torch-cpu", "torch-cuda"]
    said = json.loads((copy / "build" / "torch-cpu" / "metadata.json").read_text())
    assert set(said["digest"]["files"]) >= {"layers.py", "rms_norm.py"}
    loaded = kernels.get_local_kernel(copy)
    assert set(dir(loaded.layers)) >= set(layers.__all__)
    x, weight = torch.randn(3, 8), torch.randn(8)
    ours = kernelgraft.kernels.rms_norm.rms_norm(x, weight, 1e-6)
    assert torch.equal(sys.modules[f"{loaded.__name__}.rms_norm"].rms_norm(x, weight, 1e-6), ours)


@pytest.mark.parametrize("name", layers.__all__)
def test_each_kernel_is_found_by_its_reference(name):
    kernel = load_kernel(KernelReference.parse(f"kernelgraft.kernels:{name}"))
    assert kernel.forward_class is getattr(layers, name)
    assert kernel.layout.__name__ == f"{name}Layout"
    assert kernel.has_backward
    assert kernel.can_torch_compile
