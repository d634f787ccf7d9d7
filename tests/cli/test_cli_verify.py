"""`kernelgraft verify` and `bench`: what they find, write and say, and their exit codes."""

import json
import subprocess
import sys

import pytest
import torch
from commands import run
from safetensors.torch import save_file

import tiny
from kernelgraft import cli
from kernelgraft.verify import Report

pytestmark = pytest.mark.transformers

QUICK = ("--one-site-of-each-kind", "--no-gradients", "--dtypes", "float32")


@pytest.fixture
def right(tmp_path):
    tiny.guide_config().to_file(tmp_path / "right.toml")
    return tmp_path / "right.toml"


@pytest.fixture
def wrong(tmp_path):
    code = (tiny.EXAMPLE / "build" / "torch-universal" / "rms_norm.py").read_text()
    assert "mean_square + eps" in code
    (tmp_path / "wrong.py").write_text(
        code.replace("mean_square + eps", "mean_square + eps + 0.1")
        + "\n\nclass layers:\n    CustomRMSNorm = CustomRMSNorm\n"
    )
    file = tmp_path / "wrong.toml"
    file.write_text('[[kernel]]\nreplaces = "RMSNorm"\nuse = "./wrong.py:CustomRMSNorm"\n')
    return file


def test_right_kernels_pass(qwen3_folder, right, tmp_path, capfd, monkeypatch):
    saved = tmp_path / "verified.json"
    ran = run(capfd, monkeypatch, "verify", qwen3_folder, "-k", right, *QUICK, "--save", saved)
    assert ran.code == 0
    report = Report.from_json(json.loads(saved.read_text()))
    assert report.passed
    assert report.summary() in ran.out
    assert "RMSNormMLP for Qwen3RMSNorm + Qwen3MLP" in ran.out
    assert ran.err == ""  # no bar where nobody watches


def test_a_fault_is_found_bisected_and_written_out(qwen3_folder, wrong, tmp_path, capfd, monkeypatch):
    folder = tmp_path / "repro"
    arguments = ("verify", qwen3_folder, "-k", wrong, *QUICK, "--bisect", "--repro", folder, "--json")
    ran = run(capfd, monkeypatch, *arguments)
    assert ran.code == 1
    assert not ran.json["passed"]
    assert ran.json["failures"][0]["kernel"] == "CustomRMSNorm"
    assert ran.json["bisection"]["site"] == "model.layers.0.input_layernorm"
    assert ran.json["repro"]["folder"] == str(folder)
    alone = subprocess.run([sys.executable, folder / "repro.py"], capture_output=True, text=True)
    assert alone.returncode == 1, alone.stderr
    assert "CustomRMSNorm at" in alone.stdout
    assert "FAILS" in alone.stdout


def test_the_text_of_a_fault_is_short_unless_all_is_asked_for(qwen3_folder, wrong, capfd, monkeypatch):
    short = run(capfd, monkeypatch, "verify", qwen3_folder, "-k", wrong, *QUICK)
    full = run(capfd, monkeypatch, "verify", qwen3_folder, "-k", wrong, *QUICK, "--full")
    assert short.code == full.code == 1
    assert "FAILED" in short.out
    assert "or verify --full" in short.out
    assert len(short.out.splitlines()) < len(full.out.splitlines())


def test_given_inputs_are_those_that_are_run(qwen3_folder, right, tmp_path, capfd, monkeypatch):
    save_file({"input_ids": torch.arange(14).reshape(2, 7)}, tmp_path / "inputs.safetensors")
    arguments = ("verify", qwen3_folder, "-k", right, *QUICK, "-i", tmp_path / "inputs.safetensors", "--json")
    ran = run(capfd, monkeypatch, *arguments)
    assert ran.json["inputs"] == "given"
    assert any("int64[2, 7]" in check["input"] for check in ran.json["checks"])


def test_what_passed_is_timed_and_nothing_else(qwen3_folder, right, wrong, tmp_path, capfd, monkeypatch):
    saved, timed = tmp_path / "verified.json", tmp_path / "timed.json"
    options = ("--tokens", "2", "--repeats", "1", "--no-whole-model")
    run(capfd, monkeypatch, "verify", qwen3_folder, "-k", right, *QUICK, "--save", saved)
    ran = run(
        capfd, monkeypatch, "bench", qwen3_folder, "-k", right, *options, "--verified", saved, "--save", timed, "--json"
    )
    assert ran.code == 0
    assert ran.json == json.loads(timed.read_text())
    assert {row["tokens"] for row in ran.json["rows"]} == {2}
    ran = run(capfd, monkeypatch, "bench", qwen3_folder, "-k", wrong, *options, "--json")
    assert ran.code == 1
    assert not ran.json["timed"]
    assert not ran.json["verification"]["passed"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify", "MODEL", "-k", "RIGHT", "--bisect", "--no-whole-model"], "leave --no-whole-model out"),
        (["verify", "MODEL", "-k", "RIGHT", "--dtypes", "float32,int8"], "'int8', which is no floating dtype"),
        (["verify", "MODEL", "-k", "RIGHT", "--inputs", "nothing.safetensors"], "save_file"),
        (["verify", "MODEL", "-k", "RIGHT", "--save", "no/such/folder/x.json"], "there is no folder"),
        (["verify", "MODEL", "-k", "RIGHT", "--device", "nonsense"], "--device nonsense cannot be used"),
        (["verify", "./nowhere", "-k", "RIGHT"], "'./nowhere' is no model"),
        (["verify", "CONFIG", "-k", "RIGHT"], "cannot be loaded"),
        (["verify", "MODEL", "-k", "NONE"], "puts no kernel into"),
        (["bench", "MODEL", "-k", "RIGHT", "--tokens", "1,x"], "--tokens is '1,x'"),
        (["bench", "MODEL", "-k", "RIGHT", "--verified", "RIGHT"], "right.toml"),
    ],
)
def test_wrong_use_is_said_before_anything_runs(arguments, said, qwen3_folder, right, tmp_path, capfd, monkeypatch):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text((qwen3_folder / "config.json").read_text())
    (tmp_path / "none.toml").write_text('[[kernel]]\nreplaces = "RMSNorm"\nuse = ""\n')
    given = {"MODEL": qwen3_folder, "RIGHT": right, "CONFIG": tmp_path / "config", "NONE": tmp_path / "none.toml"}
    ran = run(capfd, monkeypatch, *(given.get(each, each) for each in arguments))
    assert ran.code == 2
    assert said in ran.err
    assert ran.out == ""


@pytest.mark.parametrize("command", [each.name for each in cli.app.registered_commands])
def test_help_teaches_with_examples(command, capfd, monkeypatch):
    ran = run(capfd, monkeypatch, command, "--help")
    assert ran.code == 0
    assert f"kernelgraft {command}" in ran.out
    assert "Examples" in ran.out


def test_all_commands_are_there():
    names = {each.name for each in cli.app.registered_commands}
    assert names == {"plan", "verify", "bench", "report", "new", "check", "export", "lock", "info"}
