"""The first step of a fresh process after its imports, over its steady step: nothing is compiled or tuned there.

    PYTHONPATH=src python -m benchmarks.kernels.first_step

Each measurement is a process of its own. All of them import and make their models side by side, and once all are ready
they step in turn, one alone. Their Triton cache is a new folder, in which the first process of each step leaves what it
compiles and is a row of its own ("ours, cache cold"); the others find it warm. What CUDA and its libraries do at their
first call is in eager's first step too; "ours, after eager" has had one in the same process, so what is left is of the
kernels.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import measure, ours, processes, qwen3, script
from benchmarks.kernels.measure import Work
from benchmarks.kernels.processes import Process, Said
from benchmarks.kernels.script import Bench

# A training step needs most memory, and comes when those of the other have given theirs back.
STEPS = {"inference": (1, 16), "training": (4, 2048)}
TINY = {"inference": (1, 5), "training": (2, 8)}
COLD = "ours, cache cold"
VARIANTS = (COLD, "eager", "ours", "ours, after eager")
TIMES = 3
STEADY = 7
CHECKED = 64
"""Tokens whose logits are compared, at most."""

READY_S, STEP_S, END_S = 180, 200, 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    made = script.parser(__doc__)
    made.add_argument(processes.CHILD, nargs=3, metavar=("STEP", "VARIANT", "FOLDER"), help=argparse.SUPPRESS)
    asked = script.completed(made, "first_step", arguments)
    if asked.child:
        processes.serve(lambda: _child(asked, *asked.child))
    bench = Bench("first_step", asked)
    with tempfile.TemporaryDirectory() as folder:
        _measure(bench, Path(folder))
    return script.finish(bench)


def _measure(bench: Bench, folder: Path) -> None:
    """Start all processes, let them step in turn, and keep the row of a variant once its last process has."""
    asked = bench.asked
    works = {step: _work(step, *sizes) for step, sizes in (TINY if asked.tiny else STEPS).items()}
    turns = [(step, variant) for step, work in works.items() for variant in _turns(bench, work)]
    options = ["--device", asked.device, "--seed", str(asked.seed)] + (["--tiny"] if asked.tiny else [])
    cache = {"TRITON_CACHE_DIR": str(folder / "triton")}
    started = [
        Process(f"{step}, {variant}", "benchmarks.kernels.first_step", [step, variant, str(folder), *options], cache)
        for step, variant in turns
    ]
    with processes.closing(started):
        failed = {each: said for each, said in processes.when_ready(started, READY_S) if "ready" not in said}
        processes.note(f"{len(started) - len(failed)} of {len(started)} processes are ready")
        answers: dict[tuple[str, str], list[Said]] = {}
        for turn, process in zip(turns, started, strict=True):
            said = failed.get(process) or process.ask("go", STEP_S)
            process.finish(END_S)
            if "first_us" in said:
                first, steady = said["first_us"] / 1e3, said["steady_us"] / 1e3
                processes.note(f"{process.name}: {first:.1f} ms, and {steady:.2f} ms later")
            answers.setdefault(turn, []).append(said)
            if len(answers[turn]) == turns.count(turn):
                bench.keep(works[turn[0]], turn[1], _said(answers[turn]))


def _work(step: str, batch: int, length: int) -> Work:
    return Work(
        name=f"first {step} step {batch}x{length}, Qwen3-0.6B",
        shape={"batch": batch, "length": length},
        variants={},
        reference=lambda: None,
        with_host=True,
        gradients=step == "training",
    )


def _turns(bench: Bench, work: Work) -> list[str]:
    """Variants in the order in which their processes step."""
    wanted = [variant for variant in VARIANTS if bench.wants(work.name, variant)]
    # Whatever is asked for of ours, the first process of ours fills the cache.
    cold = [COLD] if any(variant.startswith("ours") for variant in wanted) else []
    return cold + [variant for variant in wanted if variant != COLD] * (1 if bench.asked.tiny else TIMES)


def _said(answers: Sequence[Said]) -> Said:
    """The row of the processes of one variant."""
    for answer in answers:
        if "error" in answer or "skipped" in answer:
            return answer
    first = sorted(answer["first_us"] for answer in answers)
    steady = statistics.median(answer["steady_us"] for answer in answers)
    tuned = sum(answer["tuned"] for answer in answers)
    found = {
        "median_us": statistics.median(first),
        "p20_us": first[0],
        "p80_us": first[-1],
        "repeats": len(answers),
        "steady_us": steady,
        "ratio": statistics.median(answer["first_us"] / answer["steady_us"] for answer in answers),
        "tuned": tuned,
        "compiled": [answer["compiled"] for answer in answers],
        "kernels": answers[0]["kernels"],
        "relative_error": max(answer["relative_error"] for answer in answers),
    }
    return found | ({"error": f"{tuned} kernels were tuned"} if tuned else {})


# --- in the process that is measured


def _child(asked: argparse.Namespace, step: str, variant: str, folder: str) -> None:
    tuned, compiled = _watched()
    batch, length = (TINY if asked.tiny else STEPS)[step]
    import kernelgraft

    made = qwen3.model("0.6b", asked)
    ids = qwen3.token_ids(made, batch, length, asked)
    model = made.train(step == "training")
    processes.say(ready=True)
    if not processes.told():
        return
    if variant.endswith("after eager"):
        _milliseconds(_step(model, ids, step), asked)
    kernels: list[str] = []
    if variant != measure.YARDSTICK:
        mapping = ours.mapping(head=step == "training")
        kernels = ours.names(mapping)
        kernelgraft.graft(model, mapping)
    call = _step(model, ids, step)
    first, *others = (_milliseconds(call, asked) for _ in range(1 + STEADY))
    said = {
        "first_us": 1e3 * first,
        "steady_us": 1e3 * statistics.median(others[2:]),
        "tuned": len(tuned),
        "compiled": len(compiled),
        "kernels": kernels,
        "relative_error": _error(model, ids[:1, :CHECKED], asked, Path(folder) / f"{step}.pt"),
    }
    if not said["relative_error"] <= measure.FAR:
        said = {"error": f"the relative error of the logits is {said['relative_error']:.2g}"}
    processes.say(**said)


def _error(model: Any, ids: torch.Tensor, asked: argparse.Namespace, file: Path) -> float:
    """How far the logits are off from those in float32 of the same weights.

    The first process draws the weights again for those, and leaves them to the others: were their weights other ones,
    they would be far off.
    """
    with torch.no_grad():
        if not file.exists():
            drawn = qwen3.model("0.6b", asked)
            with qwen3.computing_in_float32(drawn):
                torch.save(drawn(ids, use_cache=False).logits, file)
        exact = torch.load(file, map_location=asked.device)
        return measure.distance(model.eval()(ids).logits, exact)


def _watched() -> tuple[list[Any], list[Any]]:
    """What Triton tunes and compiles from now on."""
    tuned: list[Any] = []
    compiled: list[Any] = []
    try:
        import triton
        from triton.runtime.autotuner import Autotuner
    except ImportError:
        return tuned, compiled
    real: Callable[..., Any] = Autotuner._bench

    def bench(self: Any, *args: Any, **kwargs: Any) -> Any:
        tuned.append(self)
        return real(self, *args, **kwargs)

    Autotuner._bench = bench  # this process is for this measurement alone

    def listener(**told: Any) -> None:
        if not told.get("cache_hit"):
            compiled.append(told.get("src"))

    triton.knobs.compilation.listener = listener
    return tuned, compiled


def _step(model: Any, ids: torch.Tensor, step: str) -> Callable[[], None]:
    def training() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def inference() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=True)

    return training if step == "training" else inference


def _milliseconds(call: Callable[[], None], asked: argparse.Namespace) -> float:
    synchronize = torch.cuda.synchronize if asked.device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
