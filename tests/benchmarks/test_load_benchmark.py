"""The benchmark of issue 5 runs, and what it writes down is well-formed. Times are not looked at."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.transformers

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROWS = ("merged-ours", "merged-copy-read", "planning")


def run(*arguments):
    command = [sys.executable, str(BENCHMARKS / "load.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    options = ("--small", "--repeats", 1, "--folder", folder / "models", "--results", folder / "results")
    return run("cpu", "--rows", ",".join(ROWS), *options), folder


@pytest.fixture
def rows(done):
    (file,) = (done[1] / "results").iterdir()
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_row_is_measured_and_written_down(done, rows):
    assert done[0].returncode == 0, done[0].stderr
    assert [row["case"] for row in rows] == list(ROWS)
    for row in rows:
        assert "error" not in row
        assert row["seconds"] > 0
        assert row["cached"] == 1.0
        # How much of it was reading is known of ours, by our log.
        assert (0 < row["reading_s"] < row["seconds"]) if row["case"] == "merged-ours" else "reading_s" not in row
        assert {"RssAnon", "VmRSS"} <= set(row["peaks"])
        assert {"gpu", "cpu", "cores", "torch", "transformers", "source"} <= set(row["machine"])
        assert (row["group"], row["round"], row["small"], row["device"]) == ("cpu", 0, True, "cpu")
        assert re.match(r"\d{4}-\d\d-\d\dT", row["date"])
    assert rows[0]["bytes"] > rows[1]["bytes"] > 0


def test_the_file_is_named_after_date_and_machine(done):
    (file,) = (done[1] / "results").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-[a-z0-9-]+-load\.jsonl", file.name)


def test_the_table_comes_at_the_end_and_again_from_the_rows(done):
    assert "planning, 100,000 tensors: seconds" in done[0].stdout
    assert "not measured" in done[0].stdout
    again = run("cpu", "--table", *(done[1] / "results").iterdir())
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip() in done[0].stdout


def test_one_command_makes_the_table_of_all_groups(done, tmp_path):
    """Of rows that were measured before, each group with its own lines."""
    found = run("all", "--table", *(done[1] / "results").iterdir())
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() in done[0].stdout  # there are none of "gpu"
    small = run("all", "--rows", "planning,limit-pread-8x16", "--small", "--device", "cpu", "--repeats", 1,
                "--folder", tmp_path / "models", "--results", tmp_path / "all")  # fmt: skip
    assert small.returncode == 0, small.stderr
    (file,) = (tmp_path / "all").iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["group"], row["case"]) for row in rows] == [("gpu", "limit-pread-8x16"), ("cpu", "planning")]


def test_nothing_stays_in_the_folder_but_the_models(done):
    assert {path.name for path in (done[1] / "models").iterdir()} == {"small-dense", "small-many"}


def test_a_row_that_there_is_not(tmp_path):
    found = run("cpu", "--rows", "fastest", "--folder", tmp_path)
    assert found.returncode == 1
    assert "No row of 'cpu' matches 'fastest'. There are: dense-ours" in found.stderr


def test_a_row_that_cannot_run_says_why(tmp_path):
    found = run("gpu", "--rows", "bus", "--device", "cpu", "--small", "--folder", tmp_path, "--results", tmp_path)
    assert found.returncode == 0, found.stderr
    assert "bus: needs a GPU" in found.stdout
