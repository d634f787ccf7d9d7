"""`kernelgraft plan` and `info`: what they print is what the API gives, and their exit codes."""

import pytest
from commands import run

import kernelgraft
import tiny
from kernelgraft import Plan
from kernelgraft.cli._model import skeleton_of
from kernelgraft.environment import environment

pytestmark = pytest.mark.transformers


@pytest.fixture
def kernels(tmp_path):
    tiny.guide_config().to_file(tmp_path / "kernels.toml")
    return tmp_path / "kernels.toml"


def test_the_plan_is_that_of_the_api(qwen3_folder, kernels, capfd, monkeypatch):
    ran = run(capfd, monkeypatch, "plan", qwen3_folder, "--kernels", kernels)
    expected = kernelgraft.plan(skeleton_of(str(qwen3_folder)), tiny.guide_config())
    assert (ran.code, ran.out.strip()) == (0, str(expected).strip())
    assert len(expected.sites) == 9


def test_the_plan_as_json_can_be_read_again(qwen3_folder, kernels, capfd, monkeypatch):
    ran = run(capfd, monkeypatch, "plan", qwen3_folder, "-k", kernels, "--json")
    assert str(Plan.from_json(ran.json)) == str(kernelgraft.plan(skeleton_of(str(qwen3_folder)), tiny.guide_config()))


def test_a_refused_plan_is_wrong_use(qwen3_folder, tmp_path, capfd, monkeypatch):
    file = tmp_path / "kernels.toml"
    file.write_text(f'[[kernel]]\nreplaces = "NoSuchClass"\nuse = "{tiny.EXAMPLE}:CustomRMSNorm"\n')
    ran = run(capfd, monkeypatch, "plan", qwen3_folder, "-k", file)
    assert ran.code == 2
    assert "error:" in ran.err
    assert "NoSuchClass" in ran.err
    assert ran.out == ""


@pytest.mark.parametrize("arguments", [["plan"], ["nonsense"], ["plan", "somewhere", "--no-such-option"]])
def test_what_cannot_be_meant_is_wrong_use(arguments, capfd, monkeypatch):
    assert run(capfd, monkeypatch, *arguments).code == 2


def test_info_is_what_the_api_gives(capfd, monkeypatch):
    assert run(capfd, monkeypatch, "info", "--json").json == environment()
    shown = run(capfd, monkeypatch, "info").out
    assert environment()["torch"] in shown
