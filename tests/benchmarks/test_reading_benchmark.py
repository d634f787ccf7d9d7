"""The benchmark of the constants of reading runs, and what it writes down is well-formed. Times are not looked at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kernelgraft.checkpoint.files import Checkpoint

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.usefixtures("benchmarks")


def run(*arguments):
    command = [sys.executable, str(BENCHMARKS / "reading.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reading")
    return run("--small", "--repeats", 2, "--folder", folder / "files", "--results", folder / "results"), folder


def test_each_variant_of_each_constant_is_measured(done):
    found, folder = done
    assert found.returncode == 0, found.stderr
    (file,) = (folder / "results").iterdir()
    assert file.name.endswith("-reading.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    constants = {"CHUNK", "STAGED", "MOST_THREADS", "_SHORTEST_RUN", "_SMALL_GAP"}
    assert {row["work"].split(",")[0] for row in rows} == constants
    for row in rows:
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) <= row["median_s"] <= max(row["seconds"])
        assert row["bytes"] > 0
        assert row["small"]
        assert {"cpu", "cores", "torch", "source"} <= set(row["machine"])
        assert f"{row['variant']}{' (now)' * row['now']} " in found.stdout
    for name in {row["work"] for row in rows if not row["work"].startswith("MOST_THREADS")}:
        assert [row["now"] for row in rows if row["work"] == name].count(True) == 1
    assert list((folder / "files").iterdir()) == []


def test_a_work_that_there_is_not(tmp_path):
    found = run("--small", "--only", "speed", "--results", tmp_path)
    assert found.returncode == 1
    assert "No work matches 'speed'. There are: CHUNK, joined; " in found.stderr


def test_a_variant_that_reads_something_else_is_not_timed(tmp_path, monkeypatch):
    import reading

    from kernelgraft.checkpoint import reader

    def fill(jobs, **_):
        for _, out in jobs:
            out.zero_()

    monkeypatch.setattr(reader, "fill", fill)
    with pytest.raises(SystemExit, match="CHUNK, joined, 1 MB: what was filled differs from the file"):
        reading.main(["--small", "--folder", str(tmp_path), "--results", str(tmp_path / "results")])
    assert list((tmp_path / "results").iterdir()) == []


@pytest.mark.parametrize("constant", ["_SHORTEST_RUN", "_SMALL_GAP"])
def test_the_two_variants_of_a_threshold_are_two_ways(constant, tmp_path):
    """The one asks the file for more runs than the other."""
    import reading

    from kernelgraft.checkpoint.requests import reads_of

    for work in (each for each in reading.works(small=True) if each.name.startswith(constant)):
        save_file(dict(work.tensors()), tmp_path / "model.safetensors")
        counts = []
        with Checkpoint([tmp_path / "model.safetensors"]) as checkpoint:
            for way in work.ways.values():
                with reading.constants(way):
                    reads = [
                        read
                        for lazy in work.made(checkpoint)
                        for read in reads_of(lazy, torch.empty(lazy.shape, dtype=work.dtype), reading.MB)
                    ]
                counts.append(sum(len(read.runs) for read in reads))
        assert counts[0] > 2 >= counts[1]
