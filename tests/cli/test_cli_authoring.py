"""`kernelgraft new`, `check`, `export` and `lock`: the way from nothing to a published kernel, and exit codes."""

import json
from pathlib import Path

import kernels
import pytest
from commands import run
from kernels._rust import Digest, DigestAlgorithm, Metadata

import kernelgraft
import tiny
from kernel_repositories import write_repository

pytestmark = pytest.mark.transformers


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_new_to_a_kernel_that_the_kernels_library_loads(qwen3_folder, folder, capfd, monkeypatch):
    ran = run(capfd, monkeypatch, "new", "norm-mlp", "--fuses", "RMSNorm,MLP", "--model", qwen3_folder)
    assert ran.code == 0
    assert "model.layers.*.post_attention_layernorm" in ran.out
    assert f"kernelgraft check norm-mlp --model {qwen3_folder}" in ran.out

    ran = run(capfd, monkeypatch, "check", "norm-mlp", "--model", qwen3_folder)
    assert (ran.code, ran.out.strip()) == (0, "norm-mlp (NormMlp): no errors, no warnings")

    model = tiny.model("qwen3")
    with kernelgraft.graft(model, kernelgraft.KernelConfig.from_file("norm-mlp/kernels.toml")) as graft:
        report = graft.verify()
        assert report.passed, str(report)

    code = folder / "norm-mlp/torch-ext/norm_mlp/kernel.py"
    code.write_text(code.read_text().replace("# Right", "# Still right"))
    ran = run(capfd, monkeypatch, "check", "norm-mlp")
    assert ran.code == 0
    assert ran.out.count("run `kernelgraft export norm-mlp`") == 2
    ran = run(capfd, monkeypatch, "export", "norm-mlp")
    assert ran.code == 0
    assert "norm-mlp/build/torch-cpu: 4 files" in ran.out
    assert "no warnings" in run(capfd, monkeypatch, "check", "norm-mlp").out

    build = folder / "norm-mlp/build/torch-cpu"
    metadata = Metadata.read_from_file(build / "metadata.json")
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, build))
    loaded = kernels.get_local_kernel(folder / "norm-mlp", backend="cpu")
    assert loaded.__name__ == metadata.id
    fusion = (("RMSNorm", "model.layers.*.post_attention_layernorm"), ("MLP", "model.layers.*.mlp"))
    expected = tiny.logits(model)
    kernelgraft.graft(model, kernelgraft.KernelConfig({fusion: f"{folder / 'norm-mlp'}:NormMlp"}))
    assert (tiny.logits(model) - expected).abs().max() < 1e-4


def test_faults_are_exit_code_1(folder, capfd, monkeypatch):
    assert run(capfd, monkeypatch, "new", "faulty-norm", "--replaces", "RMSNorm").code == 0
    code = folder / "faulty-norm/torch-ext/faulty_norm/kernel.py"
    code.write_text(code.read_text().replace("import torch\n", "import torch\nimport numpy\n", 1))
    ran = run(capfd, monkeypatch, "check", "faulty-norm")
    assert ran.code == 1
    assert f"error: {code.relative_to(folder)}:7: imports 'numpy'" in ran.out
    assert "fix: do without it" in ran.out
    ran = run(capfd, monkeypatch, "check", "faulty-norm", "--json")
    assert (ran.code, ran.json["passed"]) == (1, False)
    assert {"rule", "what", "where", "fix", "severity"} == set(ran.json["findings"][0])


def test_new_and_export_as_json(folder, capfd, monkeypatch):
    made = run(
        capfd, monkeypatch, "new", "JsonNorm", "--replaces", "RMSNorm", "--triton", "--into", "kernels", "--json"
    )
    assert made.json["kernel"] == "JsonNorm"
    assert all((Path(made.json["folder"]) / file).is_file() for file in made.json["files"])
    done = run(capfd, monkeypatch, "export", made.json["folder"], "--json")
    assert done.json["variants"] == ["build/torch-cpu", "build/torch-cuda"]


def test_lock(folder, capfd, monkeypatch):
    cache = folder / "hub" / "kernels--owner--cli-norm"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "v1").write_text("d" * 40)
    write_repository(cache / "snapshots" / ("d" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("kernels.toml").write_text('[[kernel]]\nreplaces = "RMSNorm"\nuse = "owner/cli-norm:FastNorm"\n')
    ran = run(capfd, monkeypatch, "lock")
    assert ran.code == 0
    assert "owner/cli-norm at v1: commit dddddddddddd, 4 files" in ran.out
    assert "kernels.toml.lock" in ran.out
    assert run(capfd, monkeypatch, "lock", "kernels.toml", "--json").json == json.loads(
        Path("kernels.toml.lock").read_text()
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["new"],
        ["new", "x-norm"],
        ["new", "x-norm", "--replaces", "Attention"],
        ["check", "nowhere"],
        ["export", "nowhere"],
        ["lock", "nowhere.toml"],
    ],
)
def test_what_cannot_be_meant_is_wrong_use(arguments, folder, capfd, monkeypatch):
    ran = run(capfd, monkeypatch, *arguments)
    assert ran.code == 2
    assert ran.out == ""


@pytest.mark.parametrize("command", ["new", "check", "export", "lock"])
def test_help_teaches_with_examples(command, capfd, monkeypatch):
    ran = run(capfd, monkeypatch, command, "--help")
    assert ran.code == 0
    assert f"kernelgraft {command}" in ran.out
    assert "Examples" in ran.out
