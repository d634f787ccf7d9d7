"""Loads of a whole checkpoint: ours, Transformers', and the fast loaders that there are for safetensors files.

Each function is a measurement, as `worker.py` describes it. What Transformers and kernelgraft import only when a model
is loaded is imported before the clock starts, for both alike.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from worker import Measurement, Run

MERGED = Path(__file__).parent / "merged.py"


def kernel_config(*, merged: bool) -> Any:
    """q, k and v merged, and gate and up; or nothing at all put in."""
    import kernelgraft

    mapping = {"Attention": f"{MERGED}:MergedAttention", "MLP": f"{MERGED}:MergedMLP"} if merged else {}
    return kernelgraft.KernelConfig(mapping, inherit_mapping=False)


def import_model_code(run: Run) -> Any:
    """Import all that a load of this model needs, and give the class that loads it."""
    import accelerate  # noqa: F401 - Transformers does so when there is a device map
    import transformers.core_model_loading  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    # Looking a class up imports its module.
    assert MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(run.folder))]
    return AutoModelForCausalLM


def placing(run: Run) -> dict[str, Any]:
    """The arguments that bring a model to the device."""
    return {} if run.device == "cpu" else {"device_map": run.device}


def ours(run: Run, *, merged: bool) -> Measurement:
    """Our from_pretrained, with or without kernels that merge parameters."""
    loader = import_model_code(run)
    import kernelgraft.auto
    import kernelgraft.conversion.relayout  # at the first tensor that is laid out anew

    yield
    config = kernel_config(merged=merged)
    with noted_reading(run), run.clock():
        model = kernelgraft.auto.from_pretrained(loader, run.folder, kernel_config=config, **placing(run))
    sites = len(kernelgraft.graft_of(model).plan.sites)
    expected = 2 * run.model.config["num_hidden_layers"] if merged else 0
    run.require(sites == expected, f"{sites} sites where {expected} were asked for")
    check_model(run, model)


class _Noting(logging.Handler):
    """Notes what our log says: when reading began, and how much was read and what time was left when all was known."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.begun = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "begin to read":
            self.begun = time.monotonic()
        if record.msg.startswith("read ") and isinstance(record.args, tuple):
            self.run.result["early_gb"], self.run.result["reading_s"] = record.args[1:3]


@contextmanager
def noted_reading(run: Run) -> Iterator[None]:
    """Inside the block, what our log says of reading goes into the row."""
    logger, handler = logging.getLogger("kernelgraft"), _Noting(run)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    if handler.begun:
        run.result["begun_s"] = handler.begun - run.result["began"]


def transformers(run: Run) -> Measurement:
    """Transformers' from_pretrained."""
    loader = import_model_code(run)
    yield
    with run.clock():
        model = loader.from_pretrained(run.folder, **placing(run))
    check_model(run, model)


def check_model(run: Run, model: Any) -> None:
    """Compare a model's weights with the file, under the names of the checkpoint, and note how many bytes it has."""
    parameters = {id(each): each for each in (*model.parameters(), *model.buffers())}.values()
    run.result["bytes"] = sum(each.numel() * each.element_size() for each in parameters)
    state = dict(model.state_dict())
    if "num_experts" in run.model.config:
        state = unstacked(state)
    run.check_tensors(state)


def unstacked(state: dict[str, Any]) -> dict[str, Any]:
    """Stacked experts by the names that each has in the checkpoint."""
    found = {}
    for name, tensor in state.items():
        path, _, kind = name.rpartition(".")
        if not path.endswith(".experts"):
            found[name] = tensor
            continue
        for expert, each in enumerate(tensor):
            if kind == "gate_up_proj":
                gate, up = each.chunk(2)
                found |= {f"{path}.{expert}.gate_proj.weight": gate, f"{path}.{expert}.up_proj.weight": up}
            else:
                found[f"{path}.{expert}.{kind}.weight"] = each
    return found


def safetensors(run: Run) -> Measurement:
    """`load_file` of each shard."""
    from safetensors.torch import load_file

    yield
    tensors: dict[str, Any] = {}
    with run.clock():
        for file in run.files:
            tensors |= load_file(file, device=_device(run))
    _check(run, tensors)


def runai(run: Run) -> Measurement:
    """runai-model-streamer, all shards at once."""
    from runai_model_streamer import SafetensorsStreamer

    yield
    tensors = {}
    with run.clock(), SafetensorsStreamer() as streamer:
        streamer.stream_files([str(file) for file in run.files], device=_device(run))
        for name, tensor in streamer.get_tensors():
            tensors[name] = tensor
    _check(run, tensors)


def fastsafetensors(run: Run) -> Measurement:
    """fastsafetensors, without GPUDirect Storage, which a virtual machine's disk does not offer."""
    import torch  # noqa: F401 - before its extension
    from fastsafetensors import fastsafe_open

    yield
    with run.clock(), fastsafe_open([str(file) for file in run.files], device=_device(run), nogds=True) as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    _check(run, tensors)


def instanttensor(run: Run, *, backend: str | None) -> Measurement:
    """InstantTensor: as it comes, with direct reads, or through the page cache by one of its ways."""
    import torch  # noqa: F401 - before its extension
    from instanttensor import Backend, BackendPolicy, safe_open

    yield
    tensors = {}
    given = BackendPolicy.BUFFERED if backend == "BUFFERED" else None if backend is None else Backend[backend]
    files = [str(file) for file in run.files]
    with run.clock(), safe_open(files, framework="pt", device=_device(run), backend=given) as opened:
        for name, tensor in opened.tensors():
            tensors[name] = tensor
    _check(run, tensors)


def _device(run: Run) -> str:
    return "cuda:0" if run.device == "cuda" else "cpu"


def _check(run: Run, tensors: dict[str, Any]) -> None:
    run.result["bytes"] = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    run.check_tensors(tensors)
