"""`kernelgraft report`: what it runs, what it takes from files, what it writes, and its exit codes."""

import json

import pytest
from commands import run

import tiny
from kernelgraft import report
from kernelgraft.cli._model import skeleton_of

pytestmark = pytest.mark.transformers


@pytest.fixture
def kernels(tmp_path):
    tiny.guide_config().to_file(tmp_path / "kernels.toml")
    return tmp_path / "kernels.toml"


@pytest.fixture(scope="module")
def measured():
    import kernelgraft

    graft = kernelgraft.graft(tiny.model("qwen3"), tiny.guide_config())
    verification = graft.verify(every_site=False)
    return graft.plan, verification, graft.benchmark(tokens=(2,), repeats=1, verified=verification)


def test_reports_from_files_give_the_page_of_the_api(qwen3_folder, kernels, measured, tmp_path, capfd, monkeypatch):
    plan, verification, benchmark = measured
    (tmp_path / "v.json").write_text(json.dumps(verification.to_json()))
    (tmp_path / "b.json").write_text(json.dumps(benchmark.to_json()))
    files = ("--verification", tmp_path / "v.json", "--benchmark", tmp_path / "b.json")
    ran = run(capfd, monkeypatch, "report", qwen3_folder, "-k", kernels, "-o", tmp_path / "r.html", *files)
    assert (ran.code, "verification passed" in ran.out) == (0, True)
    expected = report.page(plan, skeleton_of(str(qwen3_folder)), verification=verification, benchmark=benchmark)
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == expected


def test_a_plan_alone_runs_nothing(qwen3_folder, kernels, tmp_path, capfd, monkeypatch):
    output = tmp_path / "r.html"
    ran = run(capfd, monkeypatch, "report", qwen3_folder, "-k", kernels, "-o", output, "--no-verify", "--json")
    assert ran.code == 0
    assert ran.json["report"] == str(output)
    assert (ran.json["passed"], ran.json["timed"]) == (None, False)
    assert "not verified" in output.read_text(encoding="utf-8")


def test_a_fault_is_found_written_and_told(qwen3_folder, tmp_path, capfd, monkeypatch):
    (tmp_path / "wrong.py").write_text(
        "from torch import nn\n"
        "class Norm(nn.Module):\n"
        "    def forward(self, hidden_states):\n"
        "        return self.weight * hidden_states\n"
        "class layers:\n"
        "    Norm = Norm\n"
    )
    (tmp_path / "wrong.toml").write_text(f'[[kernel]]\nreplaces = "RMSNorm"\nuse = "{tmp_path}/wrong.py:Norm"\n')
    output = tmp_path / "r.html"
    ran = run(capfd, monkeypatch, "report", qwen3_folder, "-k", tmp_path / "wrong.toml", "-o", output, "--bench")
    assert ran.code == 1, ran.err
    assert "verification FAILED" in ran.out
    assert "What is wrong" in (page := output.read_text(encoding="utf-8"))
    assert "is not timed" in page


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--verification", "missing.json"], "missing.json cannot be read"),
        (["--bench", "--no-verify"], "--bench times only what verification has passed"),
    ],
)
def test_what_cannot_be_meant_is_wrong_use(qwen3_folder, kernels, options, said, capfd, monkeypatch):
    ran = run(capfd, monkeypatch, "report", qwen3_folder, "-k", kernels, *options)
    assert ran.code == 2
    assert said in ran.err


def test_help_teaches_with_examples_of_reports(capfd, monkeypatch):
    ran = run(capfd, monkeypatch, "report", "--help")
    assert (ran.code, "kernelgraft report" in ran.out, "Examples" in ran.out) == (0, True, True)
