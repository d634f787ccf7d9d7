"""One measurement in a process of its own: `load.py` starts it, lets it import, tells it to go, and reads the result.

A measurement is a generator function that takes a `Run`. It imports what it needs and yields once; from there it goes
on when it is its turn, and measures in `with run.clock():`. So the imports of many measurements may overlap, and what
is measured runs alone.
"""

import argparse
import contextlib
import cProfile
import gc
import importlib
import json
import os
import pstats
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import watch
from models import LARGE, SMALL, Model, places

Measurement = Iterator[None]


class CheckError(Exception):
    """What was measured did not do what it should: its time says nothing."""


class Run:
    """What a measurement works on, its clock, and where its result goes.

    Attributes:
        model: The checkpoint.
        folder: Where it lies.
        device: "cuda" or "cpu".
        scratch: An empty folder for what is written; removed afterwards.
        result: What the row will say.
    """

    def __init__(self, model: Model, folder: Path, device: str, *, profile: bool = False) -> None:
        self.model = model
        self.folder = folder / model.name
        self.device = device
        self.scratch = folder / f"scratch-{os.getpid()}"
        self.result: dict[str, Any] = {}
        self.num_threads = len(os.sched_getaffinity(0))
        self._profiler = cProfile.Profile() if profile else None
        self._descriptors: dict[Path, int] = {}

    @property
    def files(self) -> list[Path]:
        """The checkpoint's safetensors files."""
        return self.model.files(self.folder.parent)

    def descriptor(self, file: Path) -> int:
        """An open descriptor of one of the files, to check against."""
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY)
        return self._descriptors[file]

    @contextlib.contextmanager
    def clock(self) -> Iterator[None]:
        """Measure the block: its time until the device is idle, and the memory that it takes over what was before."""
        torch: Any = None
        if self.device == "cuda":
            torch = importlib.import_module("torch")
            torch.zeros(1, device="cuda")
            torch.cuda.synchronize()
            time.sleep(2 * watch.GPU_EVERY_S)  # so that the state before is among the samples
            gpu_before = torch.cuda.memory_allocated()
        gc.collect()
        if torch is not None:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.reset_peak_host_memory_stats()
        for counter in our_pinned():
            counter.peak_bytes = counter.bytes
        before = watch.status() | {"taken": -watch.available()}
        began, start = time.monotonic(), time.perf_counter()
        if self._profiler is not None:
            self._profiler.enable()
        yield
        if torch is not None:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if self._profiler is not None:
            self._profiler.disable()
            pstats.Stats(self._profiler, stream=sys.stderr).sort_stats("cumulative").print_stats(40)
        ended, after = time.monotonic(), watch.status()
        self.result |= {"seconds": seconds, "began": began, "ended": ended, "before": before, "after": after}
        if torch is not None:
            host = torch.cuda.host_memory_stats()
            self.result |= {
                "gpu_allocated": torch.cuda.max_memory_allocated() - gpu_before,
                "torch_pinned": host.get("allocated_bytes.peak", 0),
            }
        counters = our_pinned()
        self.result["our_pinned"] = sum(counter.peak_bytes for counter in counters) if counters else None

    def require(self, holds: bool, message: str) -> None:
        """Refuse the result unless something holds.

        Raises:
            CheckError: It does not.
        """
        if not holds:
            raise CheckError(f"{message}: the result is wrong, so its time is worth nothing")

    def check_tensors(self, tensors: Mapping[str, Any]) -> None:
        """Compare what was loaded with the file: all names and shapes, and the bytes of some of each kind."""
        import torch

        found = places(self.files)
        lacking = sorted(set(found) - set(tensors))
        self.require(not lacking, f"{len(lacking)} tensors are missing, {lacking[:3]}")
        names = list(found)
        # Each kind of tensor (its name without numbers) in its first and last instance.
        kinds = {"".join(c for c in name if not c.isdigit()): name for name in reversed(names)}
        kinds |= {f"last {''.join(c for c in name if not c.isdigit())}": name for name in names}
        for name in sorted(set(kinds.values())):
            place = found[name]
            self.require(tuple(tensors[name].shape) == place.shape, f"{name} has shape {tuple(tensors[name].shape)}")
            data = bytearray(os.pread(self.descriptor(place.file), min(place.nbytes, 1 << 20), place.offset))
            expected = torch.frombuffer(data, dtype=torch.bfloat16)
            rows = tensors[name].detach().flatten()[: expected.numel()].cpu()
            self.require(torch.equal(rows.view(torch.int16), expected.view(torch.int16)), name)


def our_pinned() -> list[Any]:
    """What counts the memory that kernelgraft has registered with the driver; nothing where it is not loaded."""
    modules = (sys.modules.get(f"kernelgraft.checkpoint.{name}") for name in ("device", "staging"))
    return [counter for module in modules if (counter := getattr(module, "pinned", None)) is not None]


def main() -> None:
    """Read the case from the command line, and talk to `load.py` in lines of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("measure", help="module:function")
    parser.add_argument("arguments", type=json.loads)
    parser.add_argument("--model", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--profile", action="store_true")
    asked = parser.parse_args()
    # What libraries print is none of the protocol.
    protocol = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    run = Run((SMALL if asked.small else LARGE)[asked.model], asked.folder, asked.device, profile=asked.profile)
    module, _, function = asked.measure.partition(":")
    try:
        measurement = getattr(importlib.import_module(module), function)(run, **asked.arguments)
        next(measurement)
        print(json.dumps({"ready": True}), file=protocol)
        if not sys.stdin.readline():
            return
        run.scratch.mkdir(parents=True)
        try:
            for _ in measurement:
                pass
        finally:
            shutil.rmtree(run.scratch, ignore_errors=True)
        answer = run.result
    except Exception as error:  # whatever a library raises is the row's result
        traceback.print_exc()
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), file=protocol)
    protocol.close()
    sys.stderr.flush()
    # What a library does when its process ends is not measured, and may take seconds.
    os._exit(0)


if __name__ == "__main__":
    # The measurements import this module by its name: it must be one and the same.
    sys.modules["worker"] = sys.modules["__main__"]
    main()
