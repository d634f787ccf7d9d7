"""The benchmark's modules lie beside its program, not in a package."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """Makes `import models` and the like find them, for one test."""
    names = {file.stem for file in BENCHMARKS.glob("*.py")}
    for name in names & set(sys.modules):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in names & set(sys.modules):
        del sys.modules[name]
