"""A whole Qwen3 that decodes one token at a time, compiled with CUDA graphs: with the graft over without it.

    PYTHONPATH=src python -m benchmarks.kernels.compiled_decode
    PYTHONPATH=src python -m benchmarks.kernels.compiled_decode --sizes 8b --variants 'eager;ours*'

`torch.compile(mode="reduce-overhead")` and a static cache, batch 1, greedy. The time is that of the host around a run
of tokens, over their number.

To compile takes minutes, so each variant of each size is a process of its own. They make their models, compile and
warm up side by side; once all are ready they are timed in turn, a few runs at a time, one alone. What is not ready
within `--limit` seconds is an error, and the others are timed.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.kernels import measure, ours, processes, qwen3, script
from benchmarks.kernels.measure import WARMUP, YARDSTICK, Ready, Work, compiled
from benchmarks.kernels.processes import Process, Said
from benchmarks.kernels.script import Bench
from kernelgraft.benchmark import _clock

PROMPT, TOKENS, ROOM = 128, 64, 512
TINY = (5, 3, 12)
VARIANTS = (YARDSTICK, "ours", "ours, two kernels")
DEFAULT = "eager;ours"
ROUNDS, RUNS = 5, 2
"""How often each process has its turn, and how many runs it times then."""

READY_S, TURN_S = 440, 60
RUN, PROFILE = "run", "profile"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    made = script.parser(__doc__)
    made.set_defaults(variants=DEFAULT)
    made.add_argument("--sizes", nargs="+", choices=("0.6b", "8b"), default=["0.6b", "8b"])
    made.add_argument("--limit", type=float, default=READY_S, help="seconds in which all have to be ready")
    made.add_argument(processes.CHILD, nargs=2, metavar=("SIZE", "VARIANT"), help=argparse.SUPPRESS)
    asked = script.completed(made, "compiled_decode", arguments)
    if asked.child:
        processes.serve(lambda: _child(asked, *asked.child))
    bench = Bench("compiled_decode", asked)
    _measure(bench)
    return script.finish(bench)


@dataclass
class Measured:
    """A process, and what came of it so far."""

    work: Work
    variant: str
    process: Process
    ready: Said
    milliseconds: list[float]


def _measure(bench: Bench) -> None:
    asked = bench.asked
    works = {size: _work(asked, size) for size in asked.sizes}
    wanted = [(size, variant) for size in works for variant in VARIANTS if bench.wants(works[size].name, variant)]
    if not wanted:
        names = "; ".join(work.name for work in works.values())
        sys.exit(f"Nothing matches {asked.only!r} and {asked.variants!r}. There are: {names}; {', '.join(VARIANTS)}.")
    with measure.clock_on(bench.device) as clock:  # before anything else is on the GPU
        bench.look_at_machine(clock)
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, len(os.sched_getaffinity(0)) // len(wanted)))}
    options = ["--device", asked.device, "--seed", str(asked.seed)] + (["--tiny"] if asked.tiny else [])
    all_measured = [
        Measured(
            works[size],
            variant,
            Process(f"{size}, {variant}", "benchmarks.kernels.compiled_decode", [size, variant, *options], threads),
            {},
            [],
        )
        for size, variant in wanted
    ]
    with processes.closing([each.process for each in all_measured]):
        alive = list(_ready(bench, all_measured))
        for work in dict.fromkeys(each.work.name for each in alive):
            _in_turn(bench, [each for each in alive if each.work.name == work])


def _ready(bench: Bench, started: Sequence[Measured]) -> Iterator[Measured]:
    """The processes that are ready, once all are or have failed; these have rows then."""
    of = {each.process: each for each in started}
    weights: dict[str, str] = {}
    for process, said in processes.when_ready(list(of), bench.asked.limit):
        each = of[process]
        if "weights" in said and weights.setdefault(each.work.name, said["weights"]) != said["weights"]:
            said = {"error": "WrongError: the weights are not those of the other variants"}
        if "bytes" not in said:
            bench.keep(each.work, each.variant, said)
            continue
        each.ready = said
        each.work = replace(each.work, bytes=said["bytes"])
    yield from (each for each in started if each.ready)


def _in_turn(bench: Bench, alive: list[Measured]) -> None:
    """Time the variants of one size, round by round, and keep their rows."""
    rounds = 1 if bench.asked.profile else 2 if bench.asked.tiny else ROUNDS
    for turn in range(rounds):
        for each in list(alive):
            said = each.process.ask(PROFILE if bench.asked.profile else RUN, TURN_S)
            if "profile" in said:
                print(f"{each.work.name}, {each.variant}:\n{said['profile']}", flush=True)
            elif "ms" in said:
                each.milliseconds += said["ms"]
                per_token = ", ".join(f"{ms / each.work.units:.3f}" for ms in said["ms"])
                processes.note(f"{each.process.name}: round {turn + 1} of {rounds}: {per_token} ms per token")
            else:
                alive.remove(each)
                bench.keep(each.work, each.variant, said)
    for each in alive:
        if each.milliseconds:
            work = replace(each.work, repeats=len(each.milliseconds))
            timing = _clock.timing(each.milliseconds, each.ready["peak_bytes"])
            bench.keep(work, each.variant, bench.figures(work, each.ready["says"], timing))


def _work(asked: argparse.Namespace, size: str) -> Work:
    prompt, tokens, room = TINY if asked.tiny else (PROMPT, TOKENS, ROOM)
    return Work(
        name=f"compiled decode, Qwen3-{size}",
        shape={"prompt": prompt, "tokens": tokens, "room": room},
        variants={},
        reference=lambda: None,
        units=tokens,
        with_host=True,
    )


# --- in the process of one variant


def _child(asked: argparse.Namespace, size: str, variant: str) -> None:
    began = time.monotonic()
    device = torch.device(asked.device)

    def note(done: str) -> None:
        processes.say(note=f"{done}, after {time.monotonic() - began:.0f} s")

    with measure.compiling(), torch.no_grad(), measure.clock_on(device) as clock:
        model = qwen3.model(size, asked)
        prompt, tokens, room = TINY if asked.tiny else (PROMPT, TOKENS, ROOM)
        ids = qwen3.token_ids(model, 1, prompt, asked)
        exact, yardstick = _exact(model, ids)
        said = {"weights": qwen3.digest(model), "bytes": _bytes(model)}
        note("model made")
        ready = _variant(asked, variant, model, ids, tokens, room)
        error = measure.checked(ready, exact, measure.allowed(variant, yardstick))
        note("compiled and right")
        for _ in range(WARMUP):
            ready.before()
            ready.call()
        ready.before()
        peak = clock.peak(ready.call)
        compiler = _compiler()
        note(f"ready ({compiler['graphs']} graph, {compiler['cudagraph_skips']} times kept out of a CUDA graph)")
        says = {**ready.says, **compiler, "relative_error": error, "ready_s": time.monotonic() - began}
        processes.say(**said, peak_bytes=peak, says=says)
        while word := processes.told():
            if word == PROFILE:
                processes.say(profile=measure.profiled(ready, device))
                continue
            ready.before()
            ready.call()  # the clocks of a GPU go down while it waits, and its cache is another's
            milliseconds = []
            for _ in range(1 if asked.tiny else RUNS):
                ready.before()
                milliseconds.append(clock.milliseconds(ready.call, 0))
            processes.say(ms=milliseconds)


def _variant(asked: argparse.Namespace, variant: str, model: Any, ids: torch.Tensor, tokens: int, room: int) -> Ready:
    graft, says = None, {}
    if variant != YARDSTICK:
        import kernelgraft

        mapping = ours.mapping(layers=variant == "ours")
        if variant != "ours" and mapping == ours.mapping():
            raise measure.Skipped("kernelgraft.kernels has no DecoderLayer here, so this is the same as ours")
        graft, says = kernelgraft.graft(model, mapping), {"kernels": ours.names(mapping)}
    decoding = qwen3.StaticDecoding(model, ids, room)
    # Tensors of their own: one token cut from the prompt has the prompt's strides, and is compiled for once more.
    first, last = decoding.logits.argmax(-1), ids[0, -1:].clone()[None]

    def one(token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = decoding.run(token).logits[:, -1:]
        return logits.argmax(-1), logits

    step = compiled(one, asked, mode="reduce-overhead")
    begin = torch.compiler.cudagraph_mark_step_begin if asked.device == "cuda" else lambda: None

    def call() -> torch.Tensor:
        token = first
        for _ in range(tokens):
            begin()
            token, logits = step(token)
            # The next step writes over what this one gave; `generate` copies it too, into what it has so far.
            token = token.clone()
        return logits.clone()

    def outputs() -> list[torch.Tensor]:
        begin()
        logits = step(last)[1].clone()
        return [decoding.logits, logits]

    return Ready(call, outputs, decoding.rewind, graft, says)


def _compiler() -> dict[str, int]:
    """What the compiler made of it: one graph if all is well, and nothing that keeps it out of a CUDA graph."""
    from torch._dynamo.utils import counters

    return {
        "graphs": counters["stats"]["unique_graphs"],
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
    }


def _exact(model: Any, ids: torch.Tensor) -> tuple[list[torch.Tensor], float]:
    """The logits after the prompt, and those after its last token once more; how far the model is off as it is."""

    def logits() -> list[torch.Tensor]:
        found = model(torch.cat([ids, ids[:, -1:]], dim=1), use_cache=False).logits[:, -2:].clone()
        return [found[:, :1], found[:, 1:]]

    with qwen3.computing_in_float32(model):
        exact = logits()
    return exact, measure.distance(logits(), exact)


def _bytes(model: Any) -> int:
    """Every weight is read once for a token; of embeddings that the head does not share, one row is."""
    found = qwen3.num_bytes(list(model.parameters()))
    shared = model.lm_head.weight is model.model.embed_tokens.weight
    return found if shared else found - int(model.model.embed_tokens.weight.nbytes)


if __name__ == "__main__":
    sys.exit(main())
