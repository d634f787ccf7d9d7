"""The benchmarks of the kernels run in tiny sizes, and what they write down is well-formed. Times are not looked at."""

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernelgraft.benchmark import _clock

pytestmark = pytest.mark.transformers

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "my-kernel"


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    """`python -m benchmarks.kernels.<row>` is started there. What the machine can do is not looked at here."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setitem(_clock.COPIED, "cpu", 2**16)
    monkeypatch.setitem(_clock.MATRIX_DIM, "cpu", 64)


def script(name):
    return importlib.import_module(f"benchmarks.kernels.{name}")


@pytest.fixture
def ours(monkeypatch):
    """Only these kernels are there, and they are those of the example."""
    module = script("ours")

    def only(*names):
        monkeypatch.setattr(module, "is_there", lambda name: name in names)

        def reference(name):
            if name not in names:
                raise script("measure").Skipped(f"no {name}")
            return f"{EXAMPLE}:{name.replace('RMSNorm', 'CustomRMSNorm') if name == 'RMSNorm' else name}"

        monkeypatch.setattr(module, "reference", reference)

    return only


@pytest.fixture
def run(tmp_path):
    """Runs a script in tiny sizes on the CPU, and gives its exit code and its rows."""

    def run(name, *options):
        code = script(name).main(["--tiny", "--device", "cpu", "--out", str(tmp_path), *options])
        (file,) = tmp_path.glob("*-kernels.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.unlink()
        return code, rows

    return run


def by_variant(rows):
    found = {}
    for row in rows:
        found.setdefault(row["variant"], []).append(row)
    return found


def assert_measured(row):
    assert "error" not in row, row["error"]
    assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
    assert row["relative_error"] < 0.03
    assert row["repeats"] >= 1
    assert {"gpu", "cpu", "torch", "triton", "transformers", "liger-kernel", "source"} <= set(row["machine"])
    assert (row["tiny"], row["device"], row["seed"], row["dtype"]) == (True, "cpu", 0, "bfloat16")
    assert row["command"].startswith("python -m benchmarks.kernels.")
    assert re.match(r"\d{4}-\d\d-\d\dT", row["date"])


def assert_all_measured(rows, kernels=()):
    """Every variant has a time, or is skipped with a reason: a rival that is not installed, a kernel not there."""
    layers = importlib.import_module("kernelgraft.kernels.layers")
    for row in rows:
        if "skipped" not in row:
            assert_measured(row)
        elif row["variant"].startswith("ours"):
            assert "kernelgraft.kernels has no" in row["skipped"]
            assert not all(hasattr(layers, name) for name in kernels)
        else:
            assert row["skipped"].endswith(("is not installed", "needs a GPU"))


def test_rms_norm(run):
    code, rows = run("rms_norm")
    assert code == 0
    assert_all_measured(rows)
    variants = by_variant(rows)
    assert set(variants) == {"eager", "torch", "compile", "liger", "quack", "ours", "limit"}
    works = ["7x48 forward", "3x64 forward", "7x48 backward", "3x64 backward"]
    assert [row["work"] for row in variants["ours"]] == works
    for row in variants["ours"]:
        assert row["copy_share"] == pytest.approx(row["bytes"] / row["median_us"] * 1e6 / row["copy_bandwidth"])
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["median_us"] / 1e3)


def test_rms_norm_mlp(run):
    code, rows = run("rms_norm_mlp")
    assert code == 0
    assert_all_measured(rows, ["RMSNormMLP"])
    assert set(by_variant(rows)) == {"eager", "merged", "compile", "liger", "quack", "ours"}


def test_thresholds(run):
    from kernelgraft.kernels import cross_entropy, few_tokens

    before = few_tokens.MAX_TOKENS, cross_entropy.BUFFER
    code, rows = run("thresholds")
    assert code == 0
    assert_all_measured(rows)
    assert {"eager", "ours, by kernels", "ours, by the library", "ours, as it is"} <= set(by_variant(rows))
    assert before == (few_tokens.MAX_TOKENS, cross_entropy.BUFFER)


def test_a_grafted_kernel_is_measured(run, ours):
    ours("RMSNormMLP")
    code, rows = run("rms_norm_mlp", "--variants", "ours")
    assert code == 0
    assert [row["variant"] for row in rows] == ["ours", "ours"]
    for row in rows:
        assert_measured(row)


def test_decoder_layer(run):
    code, rows = run("decoder_layer")
    assert code == 0
    assert_all_measured(rows, ["DecoderLayer", "RMSNormAttention", "RMSNormMLP"])
    assert [row["work"] for row in by_variant(rows)["compile"]] == [
        "decode, Qwen3-0.6b, context 8",
        "prefill 2x6, Qwen3-8b",
    ]


@pytest.mark.parametrize("name", ["training_step", "generate", "compiled_decode"])
def test_whole_models(run, name):
    code, rows = run(name, *(["--sizes", "0.6b"] if name == "compiled_decode" else []))
    assert code == 0
    assert_all_measured(rows, ["DecoderLayer"])
    (row,) = by_variant(rows)["ours"]
    assert "RMSNorm" in row["kernels"]


def test_a_whole_model_with_a_fusion(run, ours):
    ours("RMSNorm", "RMSNormMLP")
    code, rows = run("training_step", "--variants", "ours")
    assert code == 0
    (row,) = rows
    assert_measured(row)
    assert row["kernels"] == ["RMSNormMLP", "CustomRMSNorm"]


def test_first_step(run):
    code, rows = run("first_step", "--only", "*inference*", "--variants", "ours")
    assert code == 0
    cold, warm = rows
    assert (cold["variant"], warm["variant"]) == ("ours, cache cold", "ours")
    assert_measured(warm)
    assert warm["tuned"] == 0
    assert warm["ratio"] == pytest.approx(warm["median_us"] / warm["steady_us"])


# --- what is wrong has no time


@pytest.mark.parametrize(
    "wrong", [lambda y: 1.05 * y, lambda y: y * float("nan"), lambda y: y[:-1]], ids=["scaled", "nan", "short"]
)
def test_a_wrong_variant_is_not_timed(run, monkeypatch, wrong):
    norms = importlib.import_module("kernelgraft.kernels.rms_norm")
    real = norms.rms_norm
    monkeypatch.setattr(norms, "rms_norm", lambda *args: wrong(real(*args)))
    code, rows = run("rms_norm", "--only", "7x48 forward", "--variants", "ours;torch")
    assert code == 1
    variants = by_variant(rows)
    assert variants["ours"][0]["error"].startswith("WrongError: the ")
    assert "median_us" not in variants["ours"][0]
    assert_measured(variants["torch"][0])


def test_a_rival_that_fails_takes_no_other_away(run, monkeypatch):
    module = script("rms_norm")
    real = module._norms

    def failing(weight):
        raise ValueError("no such luck")

    monkeypatch.setattr(module, "_norms", lambda asked: {**real(asked), "torch": failing})
    code, rows = run("rms_norm", "--only", "7x48 forward", "--variants", "ours;torch")
    assert code == 0
    variants = by_variant(rows)
    assert variants["torch"][0]["error"] == "ValueError: no such luck"
    assert_measured(variants["ours"][0])


def test_what_only_moves_the_bytes_is_no_rival():
    table = script("table")
    times = {"eager": 9.0, "torch": 5.0, "ours": 4.0, "limit": 3.0}
    rows = [
        {"row": "rms_norm", "work": "32x4096 forward", "variant": variant, "median_us": us}
        for variant, us in times.items()
    ]
    (judged,) = table.judge(rows)
    assert judged.work == "32x4096 forward: time over the best rival's, torch"
    assert judged.holds


def test_a_graft_whose_kernel_does_not_run_is_not_timed(run, ours, monkeypatch):
    import kernelgraft

    ours("RMSNormMLP")
    real = kernelgraft.graft

    def removed(*args):
        graft = real(*args)
        graft.remove()
        return graft

    monkeypatch.setattr(kernelgraft, "graft", removed)
    code, rows = run("rms_norm_mlp", "--variants", "ours")
    assert code == 1
    assert all("not the kernels ran" in row["error"] for row in rows)


def test_a_profile_is_printed_and_no_row_kept(tmp_path, capsys):
    options = ["--tiny", "--device", "cpu", "--out", str(tmp_path), "--only", "3x64 forward", "--variants", "ours"]
    assert script("rms_norm").main([*options, "--profile"]) == 0
    said = capsys.readouterr().out
    assert "3x64 forward, ours:" in said
    assert "aten::mul" in said
    assert not list(tmp_path.iterdir())


def test_a_pattern_that_matches_no_work_lists_them(run):
    with pytest.raises(SystemExit, match=r"No work matches 'x'\. There are: 7x48 forward; 3x64 forward"):
        run("rms_norm", "--only", "x")


def test_real_sizes_ask_for_a_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit):
        script("rms_norm").main(["--device", "cpu", "--out", str(tmp_path)])
    assert "are for a GPU" in capsys.readouterr().err


# --- the table, all scripts, and the sweep


def row(work, variant, median, **said):
    machine = {"gpu": "G", "torch": "2", "source": "abc"}
    return {
        "row": "rms_norm",
        "run": "now",
        "work": work,
        "variant": variant,
        "median_us": median,
        "p20_us": median,
        "p80_us": median,
        "peak_bytes": None,
        "command": "python -m it",
        "tiny": False,
        "machine": machine,
        **said,
    }


def test_the_table_judges_what_issue_7_asks_for():
    table = script("table")
    rows = [
        row("8192x4096 forward", "ours", 30.0, copy_share=0.91),
        row("8192x4096 backward", "ours", 60.0, copy_share=0.89),
        row("32x4096 forward", "ours", 7.0),
        row("32x4096 forward", "compile", 7.5),
        row("32x4096 forward", "eager", 30.0),
        row("8192x1024 forward", "compile", 13.5),
    ]
    judged = table.judge(rows)
    assert [each.holds for each in judged] == [True, False, True, None]
    assert "compile" in judged[2].work
    said = table.render(rows)
    assert "python -m it" in said
    assert "MISSED" in said
    assert "| 8192x4096 forward | ours | 30.00 |" in table.render(rows, markdown=True)


def test_a_training_step_is_judged_with_the_host_and_without():
    times = {"eager": (170e3, 100e3), "compile": (110e3, 80e3), "ours": (90e3, 76e3)}
    rows = [
        row("step", variant, us, row="training_step", device_us=device_us, peak_bytes=9e9, model_bytes=2e9)
        for variant, (us, device_us) in times.items()
    ]
    judged = script("table").judge(rows)
    assert [(each.reached, each.holds) for each in judged] == [("0.529", True), ("0.76", False), ("11", True)]


def test_every_script_has_a_judge_and_an_estimate():
    names = {command[0] for command, _ in script("all").ROWS.values()}
    assert names == set(script("table")._JUDGES)


def test_all_runs_scripts_and_leaves_out_what_does_not_fit(monkeypatch, capsys):
    module, started = script("all"), []

    def run(command, **options):
        started.append((command[1:], options["cwd"]))
        return SimpleNamespace(returncode=int("rms_norm" in command[2]))

    monkeypatch.setattr(module.subprocess, "run", run)
    code = module.main(["--rows", "rms_norm", "generate", "compiled_decode", "--budget", "99", "--tiny"])
    said = capsys.readouterr().out
    assert code == 1
    assert started == [(["-m", f"benchmarks.kernels.{name}", "--tiny"], ROOT) for name in ("rms_norm", "generate")]
    assert "rms_norm: ended with code 1" in said
    assert "generate: done" in said
    assert "compiled_decode: left out, since it takes about" in said


def test_rows_are_printed_again(run, tmp_path, capsys):
    _, rows = run("rms_norm", "--only", "3x64 forward", "--variants", "ours")
    first = capsys.readouterr().out
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert script("table").main([str(tmp_path / "rows.jsonl")]) == 0
    assert capsys.readouterr().out.strip() in first


def test_the_sweep_tries_settings(tmp_path, monkeypatch, capsys):
    pytest.importorskip("triton")
    device = importlib.import_module("kernelgraft.kernels.device")
    monkeypatch.setattr(device, "in_triton", lambda x: True)
    norms = "rms_norm_kernels" if importlib.util.find_spec("kernelgraft.kernels.rms_norm_kernels") else "rms_norm"
    on = "cuda" if torch.cuda.is_available() else "cpu"
    options = ["--tiny", "--device", on, "--out", str(tmp_path), "--only", "3x64 forward", "--repeats", "1"]
    sweep = ["rms_norm", "--module", norms, "--set", "rows=1,2"]
    code = script("sweep").main([*sweep, *options])
    assert code == 0
    (file,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["changes"] for row in rows] == [{}, {"rows": 1}, {"rows": 2}, {}]
    for row in rows:
        assert row["median_us"] > 0
    assert "rows=2" in rows[2]["settings"][0]
    assert "as it is" in capsys.readouterr().out

    assert script("sweep").main([*sweep, "--set", "no=3", *options]) == 0
    assert "unexpected keyword argument 'no'" in capsys.readouterr().out
    assert script("sweep").main([*sweep, "--where", "num_rows=5", *options]) == 1
    assert "settings was not asked" in capsys.readouterr().out
