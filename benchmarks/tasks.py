"""What comes before and after a load: planning, starting, updating in place, saving.

Each function is a measurement, as `worker.py` describes it.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import loaders
from worker import Measurement, Run


def update(run: Run, *, times: int) -> Measurement:
    """New weights from the same device into a grafted model, against a loop of `copy_` over the same tensors.

    A mapping of them, an iterator and the loop take turns. The new weights are the old ones with another sign, so that
    a captured graph of a layer's MLP must give another result.
    """
    import torch
    from torch.nn import functional as F

    loader = loaders.import_model_code(run)
    import kernelgraft.auto

    yield
    config = loaders.kernel_config(merged=True)
    model = kernelgraft.auto.from_pretrained(loader, run.folder, kernel_config=config, **loaders.placing(run))
    graft = kernelgraft.graft_of(model)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    # In a tied model one tensor stands under two names.
    same = {(tensor.data_ptr(), tensor.shape): name for name, tensor in reversed(state.items())}
    news = {name: -state[name] for name in same.values()}
    mlp = model.model.layers[0].mlp
    x = torch.randn(4, run.model.config["hidden_size"], device=run.device, dtype=torch.bfloat16)
    with torch.no_grad():
        replay, out = _captured(torch, run, mlp, x)
        old = out.clone()
        pointers = [parameter.data_ptr() for parameter in model.parameters()]
        left = graft.update(news)
        extra = _extra_bytes(torch, run, lambda: graft.update(news))
        replay()
        gate, up, down = (news[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        expected = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    run.require(not [name for name in left if name in news], f"the update left {left[:3]}")
    run.require([parameter.data_ptr() for parameter in model.parameters()] == pointers, "a data_ptr changed")
    run.require(not torch.equal(out, old), "the captured graph did not see the new weights")
    error = float((out - expected).float().norm() / expected.float().norm())
    run.require(error < 2e-2, f"the captured graph is off by {error}")
    for name, tensor in news.items():
        run.require(torch.equal(state[name], tensor), name)

    def copies() -> None:
        for name, tensor in news.items():
            state[name].copy_(tensor)

    ways = {
        "update": lambda: graft.update(news),
        "stream": lambda: graft.update(iter(news.items())),
        "copy": copies,
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    with run.clock(), torch.no_grad():
        for _ in range(times):
            for name, work in ways.items():
                taken[name].append(_timed(torch, run, work))
    run.result |= {
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in news.values()),
        "update_s": taken["update"],
        "stream_s": taken["stream"],
        "copy_s": taken["copy"],
        "extra_bytes": extra,
        "graph": run.device == "cuda",
    }


def _captured(torch: Any, run: Run, module: Any, x: Any) -> tuple[Callable[[], None], Any]:
    """A module's forward as a captured graph, and the tensor that each replay fills; without a GPU, the forward."""
    if run.device != "cuda":
        out = module(x)
        return lambda: out.copy_(module(x)), out
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        module(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(x)
    graph.replay()
    return graph.replay, out


def _timed(torch: Any, run: Run, work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    if run.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _extra_bytes(torch: Any, run: Run, work: Callable[[], Any]) -> int | None:
    if run.device != "cuda":
        work()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = int(torch.cuda.memory_allocated())
    work()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before


SHARD = "5GB"


def save(run: Run, *, who: str) -> Measurement:
    """The model to disk under its original names, until every file is synced."""
    loader = loaders.import_model_code(run)
    import kernelgraft.auto

    yield
    target = run.scratch / "saved"
    if who == "ours":
        config = loaders.kernel_config(merged=True)
        model = kernelgraft.auto.from_pretrained(loader, run.folder, kernel_config=config, **loaders.placing(run))
    else:
        model = loader.from_pretrained(run.folder, **loaders.placing(run))
    os.sync()
    with run.clock():
        if who == "ours":
            kernelgraft.save_pretrained(model, target, max_shard_size=SHARD)
        else:
            model.save_pretrained(target, max_shard_size=SHARD)
        for file in (*target.iterdir(), target):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    check_saved(run, target)


def check_saved(run: Run, target: Any) -> None:
    """The bytes of every tensor that was saved are those of the checkpoint, tensor by tensor, in samples."""
    from models import places

    expected, found = places(run.files), places(sorted(target.glob("*.safetensors")))
    run.require(set(expected) == set(found), f"other names were saved: {sorted(set(expected) ^ set(found))[:3]}")
    for name, place in expected.items():
        saved = found[name]
        run.require(saved.shape == place.shape, f"{name} has shape {saved.shape}")
        for at in {0, place.nbytes // 2, max(0, place.nbytes - 4096)}:
            size = min(4096, place.nbytes - at)
            pair = [os.pread(run.descriptor(each.file), size, each.offset + at) for each in (saved, place)]
            run.require(pair[0] == pair[1], f"{name} at {at}")
    run.result["bytes"] = sum(place.nbytes for place in expected.values())


class Planned(Exception):
    """Everything is known, and nothing was read."""


def planning(run: Run) -> Measurement:
    """From opening the checkpoint until every parameter of the model is known as a lazy tensor, with nothing read.

    That is validating the headers and leading each name through Transformers' rules. The load is stopped by an
    exception when that is done.
    """
    loader = loaders.import_model_code(run)
    import kernelgraft.auto

    yield
    opened = 0.0
    original, load_lazily = kernelgraft.auto.Checkpoint, kernelgraft.auto.load_lazily

    def opens(*arguments: Any) -> Any:
        nonlocal opened
        opened = time.perf_counter()
        return original(*arguments)

    def stops(*arguments: Any) -> None:
        load_lazily(*arguments)
        run.result["planning_s"] = time.perf_counter() - opened
        raise Planned

    config = loaders.kernel_config(merged=False)
    with run.clock(), replaced(kernelgraft.auto, "Checkpoint", opens), replaced(kernelgraft.auto, "load_lazily", stops):
        try:
            kernelgraft.auto.from_pretrained(loader, run.folder, kernel_config=config)
        except Planned:
            pass
        else:
            run.require(False, "the load never came to where it reads")
    run.result |= {"tensors": len(run.model.tensors), "whole_s": run.result["seconds"]}
    run.result["seconds"] = run.result.pop("planning_s")


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """A module has another object under a name while the block runs: this process ends after it."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def start(run: Run, *, who: str) -> Measurement:
    """A fresh interpreter up to a tiny model that is loaded, imports and all."""
    yield
    with run.clock():
        if who == "ours":
            import kernelgraft

            config = loaders.kernel_config(merged=True)
            model = kernelgraft.AutoModelForCausalLM.from_pretrained(run.folder, kernel_config=config)
        else:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(run.folder)
    loaders.check_model(run, model)
