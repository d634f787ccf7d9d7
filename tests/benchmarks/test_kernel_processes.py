"""Processes of the kernels' benchmarks: they are asked in turn, and one that fails or is cut off takes nothing away."""

import importlib
import json
import textwrap
from pathlib import Path

import pytest

from kernelgraft.benchmark import _clock

pytestmark = pytest.mark.transformers

ROOT = Path(__file__).parents[2]

PRETENDING = """
    import json, os, pathlib, sys, time

    def say(**what):
        print("::said " + json.dumps(what), flush=True)

    size, variant = sys.argv[2:4]
    plan = json.loads(os.environ["PLAN"]).get(variant, {})
    print("a library says this")
    say(note="begun")
    if "dies" in plan:
        sys.exit("no such luck")
    time.sleep(plan.get("sleeps", 0))
    if "refuses" in plan:
        say(**plan["refuses"])
        sys.exit()
    said = {"relative_error": 0.001, "kernels": [variant]}
    say(ready=True, weights=plan.get("weights", "w"), bytes=10**9, peak_bytes=None, says=said)
    turn = 0
    while word := sys.stdin.readline().strip():
        with pathlib.Path(os.environ["LOG"]).open("a") as log:
            print(f"{size} {variant} begins", file=log, flush=True)
            time.sleep(0.05)
            print(f"{size} {variant} ends", file=log, flush=True)
        turn += 1
        if plan.get("dies_in_turn") == turn:
            sys.exit(3)
        if word == "go":
            say(first_us=90.0, steady_us=60.0, tuned=0, compiled=0, **said)
            break
        say(ms=[plan.get("ms", 30.0) + turn, plan.get("ms", 30.0) + 10 * turn])
"""
"""In the place of a child of either script: what it does is said by a plan in its environment."""


@pytest.fixture
def decode(pretended):
    """`compiled_decode` with such children."""
    return pretended("compiled_decode")


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Makes what runs a script with such children: it gives the exit code, the rows, and what the children logged."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setitem(_clock.COPIED, "cpu", 2**16)
    monkeypatch.setitem(_clock.MATRIX_DIM, "cpu", 64)
    (tmp_path / "pretending.py").write_text(textwrap.dedent(PRETENDING))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))

    def pretended(name):
        module = importlib.import_module(f"benchmarks.kernels.{name}")
        started = []

        class Pretending(module.Process):
            def __init__(self, name, _, arguments, environment=None):
                super().__init__(name, "pretending", arguments, environment)
                started.append(self)

        monkeypatch.setattr(module, "Process", Pretending)

        def run(plan, *options):
            monkeypatch.setenv("PLAN", json.dumps(plan))
            out, log = tmp_path / "rows", tmp_path / "log"
            try:
                code = module.main(["--tiny", "--device", "cpu", "--out", str(out), *options])
            except KeyboardInterrupt:
                code = None
            rows = [json.loads(line) for file in out.glob("*.jsonl") for line in file.read_text().splitlines()]
            return code, rows, log.read_text().splitlines() if log.exists() else []

        run.started = started
        return run

    return pretended


def assert_all_ended(decode):
    assert decode.started
    assert all(process._process.poll() is not None for process in decode.started)


def test_all_get_ready_and_then_run_in_turn(decode, capsys):
    code, rows, log = decode({"ours": {"ms": 15.0}})
    assert code == 0
    turns = [f"{size} {variant}" for size in ("0.6b", "8b") for _ in range(2) for variant in ("eager", "ours")]
    assert log == [f"{turn} {what}" for turn in turns for what in ("begins", "ends")]
    assert [(row["work"][-4:].strip("-"), row["variant"]) for row in rows] == [
        (size, variant) for size in ("0.6b", "3-8b") for variant in ("eager", "ours")
    ]
    # All runs of all rounds, over the three tokens of a trial: 31, 40, 32 and 50 ms.
    assert rows[0]["median_us"] == pytest.approx(36e3 / 3)
    assert rows[0]["p20_us"] == pytest.approx((31 + 0.6) * 1e3 / 3)
    assert (rows[0]["repeats"], rows[0]["bytes"], rows[0]["kernels"]) == (4, 10**9, ["eager"])
    assert rows[0]["gb_s"] == pytest.approx(1e3 / 12)
    said = capsys.readouterr().out
    assert "8b, ours: begun" in said
    assert "0.6b, eager: round 2 of 2: 10.667, 16.667 ms per token" in said
    assert "a library" not in said
    assert_all_ended(decode)


@pytest.mark.parametrize(
    ("plan", "error"),
    [
        ({"dies": True}, "the process ended with code 1: no such luck"),
        ({"refuses": {"error": "ValueError: no"}}, "ValueError: no"),
        ({"sleeps": 60}, "the process was not ready within 2 s"),
        ({"weights": "others"}, "WrongError: the weights are not those of the other variants"),
        ({"dies_in_turn": 2}, "the process ended with code 3: "),
    ],
    ids=["dies", "refuses", "late", "other weights", "dies in turn"],
)
def test_one_that_fails_takes_no_other_away(decode, plan, error):
    # The weights are those of whoever is ready first.
    plan = {"ours": {"sleeps": 0.5, **plan}}
    code, rows, _ = decode(plan, "--sizes", "0.6b", "--limit", "2")
    assert code == 1
    by_variant = {row["variant"]: row for row in rows}
    assert by_variant["ours"]["error"] == error
    assert "median_us" not in by_variant["ours"]
    assert by_variant["eager"]["repeats"] == 4
    assert_all_ended(decode)


def test_a_variant_that_is_skipped_says_why(decode):
    plan = {"ours, two kernels": {"refuses": {"skipped": "the same as ours"}}}
    code, rows, _ = decode(plan, "--sizes", "0.6b", "--variants", "eager;ours, *")
    assert code == 0
    assert {row["variant"]: row.get("skipped") for row in rows} == {
        "eager": None,
        "ours, two kernels": "the same as ours",
    }


def test_a_run_that_is_cut_off_leaves_the_rows_it_had(decode, monkeypatch):
    processes = importlib.import_module("benchmarks.kernels.processes")

    def cut_off(line):
        if line.startswith("8b, eager: round 1"):
            raise KeyboardInterrupt

    monkeypatch.setattr(processes, "note", cut_off)
    code, rows, _ = decode({})
    assert code is None
    assert [(row["work"], row["variant"]) for row in rows] == [
        ("compiled decode, Qwen3-0.6b", "eager"),
        ("compiled decode, Qwen3-0.6b", "ours"),
    ]
    assert_all_ended(decode)


def test_what_matches_nothing_is_listed(decode):
    with pytest.raises(SystemExit, match=r"Nothing matches '\*' and 'theirs'\. There are: compiled decode"):
        decode({}, "--variants", "theirs")


def test_first_steps_are_taken_in_turn(pretended, monkeypatch):
    module = importlib.import_module("benchmarks.kernels.first_step")
    monkeypatch.setattr(module, "_turns", lambda *_: [module.COLD, "eager", "ours", "eager", "ours"])
    first_step = pretended("first_step")
    code, rows, log = first_step({"eager": {"dies": True}})
    assert code == 1  # eager failed, each time, and the others stepped
    turns = [f"{step} {variant}" for step in module.STEPS for variant in (module.COLD, "ours", "ours")]
    assert log == [f"{turn} {what}" for turn in turns for what in ("begins", "ends")]
    assert [row["variant"] for row in rows] == [module.COLD, "eager", "ours"] * 2
    assert [row.get("repeats") for row in rows] == [1, None, 2] * 2
    assert rows[2]["ratio"] == pytest.approx(1.5)
    assert rows[1]["error"] == "the process ended with code 1: no such luck"
    assert_all_ended(first_step)


def test_both_ends(tmp_path, monkeypatch, capsys):
    """A process hears and says, and its error is what it is taken to say."""
    monkeypatch.syspath_prepend(str(ROOT))
    processes = importlib.import_module("benchmarks.kernels.processes")
    (tmp_path / "echoing.py").write_text(
        textwrap.dedent("""
            import time

            from benchmarks.kernels import processes

            def work():
                processes.say(ready=True)
                print("and so", end="")
                while word := processes.told():
                    if word == "sleep":
                        time.sleep(60)
                    processes.say(answer=float(word))

            processes.serve(work)
        """)
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    every = [processes.Process(name, "echoing", []) for name in ("one", "other", "third")]
    one, other, third = every
    with processes.closing(every):
        assert [said for _, said in processes.when_ready(every, 120)] == [{"ready": True}] * 3
        assert one.ask("2", 60) == {"answer": 2.0}
        assert one.ask("two", 60) == {"error": "ValueError: could not convert string to float: 'two'"}
        assert "in work" in capsys.readouterr().err
        assert third.ask("sleep", 0.5) == {"error": "the process said nothing for 0 s"}
        assert "in work" in capsys.readouterr().err
        other.finish(60)
        assert other._process.returncode == 0


# --- the float32 of one layer at a time


def test_one_layer_at_a_time_computes_what_a_copy_in_float32_does(monkeypatch):
    import argparse

    import torch

    monkeypatch.syspath_prepend(str(ROOT))
    qwen3 = importlib.import_module("benchmarks.kernels.qwen3")
    asked = argparse.Namespace(tiny=True, device="cpu", seed=0)
    for changes in ({}, {"tie_word_embeddings": False}):
        model = qwen3.model("0.6b", asked, **changes)
        ids = qwen3.token_ids(model, 2, 7, asked)
        before = {name: (each.data_ptr(), each.clone()) for name, each in model.named_parameters()}
        with torch.no_grad():
            copied = qwen3.in_float32(model)(ids).logits
            with qwen3.computing_in_float32(model):
                here = model(ids).logits
        assert here.dtype == torch.float32
        assert torch.equal(here, copied)
        for name, each in model.named_parameters():
            assert each.data_ptr() == before[name][0]
            assert torch.equal(each, before[name][1])
        again, other = (qwen3.model("0.6b", argparse.Namespace(tiny=True, device="cpu", seed=seed)) for seed in (0, 1))
        if not changes:
            assert qwen3.digest(model) == qwen3.digest(again) != qwen3.digest(other)
