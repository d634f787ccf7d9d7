"""The first step of a fresh process after its imports, over its steady step: nothing is compiled or tuned there.

    PYTHONPATH=src python -m benchmarks.kernels.first_step

Each measurement is a process of its own. Their Triton cache is a new folder: the first process of each step fills it
and is a row of its own ("ours, cache cold"), the others find it warm. What CUDA and its libraries do at their first
call is in eager's first step too; "ours, after eager" has had one in the same process, so what is left is of the
kernels.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.kernels import measure, ours, qwen3, script
from benchmarks.kernels.measure import Skipped, Work
from benchmarks.kernels.script import Bench

STEPS = {"training": (4, 2048), "inference": (1, 16)}
TINY = {"training": (2, 8), "inference": (1, 5)}
COLD = "ours, cache cold"
VARIANTS = (COLD, "eager", "ours", "ours, after eager")
TIMES = 3
STEADY = 7
LIMIT_S = 200
READY = "ready"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    made = script.parser(__doc__)
    made.add_argument("--child", nargs=2, metavar=("STEP", "VARIANT"), help=argparse.SUPPRESS)
    asked = script.completed(made, "first_step", arguments)
    if asked.child:
        _child(asked, *asked.child)
        return 0
    bench = Bench("first_step", asked)
    with tempfile.TemporaryDirectory() as cache:
        for step, (batch, length) in (TINY if asked.tiny else STEPS).items():
            work = Work(
                name=f"first {step} step {batch}x{length}, Qwen3-0.6B",
                shape={"batch": batch, "length": length},
                variants={},
                reference=lambda: None,
                with_host=True,
                gradients=step == "training",
            )
            wanted = [variant for variant in VARIANTS if bench.wants(work.name, variant)]
            warm = [variant for variant in wanted if variant != COLD]
            # Whatever is asked for of ours, the first process of ours fills the cache.
            cold = [COLD] if any(variant.startswith("ours") for variant in wanted) else []
            for variants in (cold, warm * (1 if asked.tiny else TIMES)):
                answers = _answers(asked, step, variants, Path(cache))
                for variant, found in answers.items():
                    bench.keep(work, variant, _said(found))
    return script.finish(bench)


def _said(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
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


def _answers(
    asked: argparse.Namespace, step: str, variants: Sequence[str], cache: Path
) -> dict[str, list[dict[str, Any]]]:
    """What each process says: they import side by side, and step alone, in turn."""
    processes = [Process(asked, step, variant, cache) for variant in variants]
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        for process in processes:
            process.wait_until_ready()
        for variant, process in zip(variants, processes, strict=True):
            found.setdefault(variant, []).append(process.answer())
    finally:
        for process in processes:
            process.close()
    return found


class Process:
    """A process that makes its model and then waits for its turn."""

    def __init__(self, asked: argparse.Namespace, step: str, variant: str, cache: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.kernels.first_step", "--child", step, variant]
        command += ["--device", asked.device, "--seed", str(asked.seed)] + (["--tiny"] if asked.tiny else [])
        path = os.pathsep.join(filter(None, [str(machine.ROOT / "src"), os.environ.get("PYTHONPATH")]))
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            command,
            cwd=machine.ROOT,
            env={**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._timer = threading.Timer(LIMIT_S, self._process.kill)
        self._timer.start()

    def wait_until_ready(self) -> None:
        """Until it has imported all and made its model, or has ended."""
        assert self._process.stdout is not None
        while (line := self._process.stdout.readline()) and line.strip() != READY:
            pass

    def answer(self) -> dict[str, Any]:
        """Let it step, and what it says."""
        try:
            out, _ = self._process.communicate("go\n")
        except BrokenPipeError:
            out = ""
        if self._process.wait() or not out.strip():
            self._log.seek(0)
            print(self._log.read()[-4000:], file=sys.stderr)
            return {"error": f"the process ended with code {self._process.returncode}"}
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found

    def close(self) -> None:
        """End it if it has not ended."""
        self._timer.cancel()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None and not stream.closed:
                stream.close()


# --- in the process that is measured


def _child(asked: argparse.Namespace, step: str, variant: str) -> None:
    tuned, compiled = _watched()
    batch, length = (TINY if asked.tiny else STEPS)[step]
    import kernelgraft

    made = qwen3.model("0.6b", asked)
    ids = qwen3.token_ids(made, batch, length, asked)
    model = made.train(step == "training")
    print(READY, flush=True)
    sys.stdin.readline()
    if variant.endswith("after eager"):
        _milliseconds(_step(model, ids, step), asked)
    kernels: list[str] = []
    if variant != measure.YARDSTICK:
        try:
            mapping = ours.mapping(head=step == "training")
        except Skipped as reason:
            print(json.dumps({"skipped": str(reason)}))
            return
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
        "relative_error": _error(model, ids[:1, :64], asked),
    }
    if not said["relative_error"] <= measure.FAR:
        said = {"error": f"the relative error of the logits is {said['relative_error']:.2g}"}
    print(json.dumps(said))


def _error(model: Any, ids: torch.Tensor, asked: argparse.Namespace) -> float:
    """How far the logits are off from those in float32 of the same weights, drawn again."""
    with torch.no_grad():
        exact = qwen3.in_float32(qwen3.model("0.6b", asked))(ids).logits  # type: ignore[operator]
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
