"""Lazy tensors turned into the parameters and buffers of a model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from kernelgraft.checkpoint.device import reserve
from kernelgraft.checkpoint.files import FileTensor, OpenFile
from kernelgraft.checkpoint.memory import fresh
from kernelgraft.checkpoint.progress import progress_bar
from kernelgraft.checkpoint.reader import Reading, check_readable, fill, goes_to_cuda
from kernelgraft.checkpoint.sharding import is_sharded, local_part, with_local
from kernelgraft.conversion.lazy import LazyTensor
from kernelgraft.errors import CheckpointError
from kernelgraft.pausing import collector_paused
from kernelgraft.recording import arguments_of
from kernelgraft.tree import put_tensor, saved_tensors, tensor_at

Job = tuple[LazyTensor, torch.Tensor]


def materialize(model: nn.Module, ready: Reading | None = None) -> None:
    """Give every parameter and buffer of `model` that is still lazy its bytes, all in one pass over the files.

    On the CPU what is a run of a file as it stands becomes a view of the mapped file. Everything else gets memory of
    its own, into which its bytes are read.

    Args:
        model: The model.
        ready: Threads that wait for what goes to CUDA devices, or have begun (see `begin`); they end with the call.

    Raises:
        CheckpointError: A file cannot be read, or was replaced in the meantime. The model is as it was.
    """
    held = [
        (registry, name, tensor)
        for module in model.modules()
        for registry in (module._parameters, module._buffers)
        for name, tensor in registry.items()
        if isinstance(tensor, LazyTensor)
    ]
    lazies = {id(lazy): lazy for _, _, lazy in held if not lazy.is_resolved}
    values: dict[int, torch.Tensor] = {}
    jobs: list[Job] = []
    begun = ready.begun if ready is not None else {}
    reserve_for(lazy for key, lazy in lazies.items() if key not in begun)
    for key, lazy in lazies.items():
        view = begun[key][1] if key in begun else lazy.view_of_source()
        if view is None:
            view = fresh(lazy.shape, lazy.dtype, lazy.device)
            jobs.append((lazy, view))
        values[key] = view
    read(jobs, ready)
    check_unchanged(lazies.values())
    for key, lazy in lazies.items():
        lazy.resolve(values[key])
    for registry, name, lazy in held:
        registry[name] = lazy.resolved()  # type: ignore[assignment]


def begin(lazies: Iterable[torch.Tensor], ready: Reading) -> None:
    """Start to read what goes to CUDA devices from files alone, before the tensors are in the model.

    Args:
        lazies: Lazy tensors that will be in it; what was begun already goes on.
        ready: Threads that wait. `materialize` puts in what they read; if it does not come to that, stop them before
            the files are closed.
    """
    jobs = [
        (lazy, fresh(lazy.shape, lazy.dtype, lazy.device))
        for lazy in lazies
        if isinstance(lazy, LazyTensor)
        and goes_to_cuda(lazy)
        and id(lazy) not in ready.begun
        and all(isinstance(source, FileTensor) for source in lazy.sources)
    ]
    ready.begin(jobs)


def reserve_for(lazies: Iterable[torch.Tensor]) -> None:
    """Have memory for tensors at hand on the CUDA devices that they go to."""
    nbytes: dict[torch.device, int] = {}
    for lazy in lazies:
        nbytes[lazy.device] = nbytes.get(lazy.device, 0) + lazy.numel() * lazy.dtype.itemsize
    reserve(nbytes)


def read(jobs: Sequence[Job], ready: Reading | None = None) -> None:
    """Fill tensors from files, with a progress bar where that is long; see `fill`."""
    begun = ready.begun.values() if ready is not None else ()
    total = sum(move.numel * move.source.dtype.itemsize for lazy, _ in (*begun, *jobs) for move in lazy.moves)
    with progress_bar(total) as on_progress:
        fill(jobs, on_progress=on_progress, ready=ready)


def _files(lazies: Iterable[LazyTensor]) -> list[OpenFile]:
    sources = (source for lazy in lazies for source in lazy.sources)
    return list({id(s.file): s.file for s in sources if isinstance(s, FileTensor)}.values())


def check_unchanged(lazies: Iterable[LazyTensor]) -> None:
    """Make sure that the files behind lazy tensors are still those that were opened.

    Raises:
        CheckpointError: One was replaced or written to.
    """
    for file in _files(lazies):
        file.check_unchanged()


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """If the block fails, the model's modules hold the same tensors as before; what was written into them stays."""
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        raise


def check_names(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that are not exactly the model's.

    Raises:
        CheckpointError: Names are missing or unexpected, or shapes differ; one error lists them all.
    """
    state = saved_tensors(model)
    same: dict[int, list[str]] = {}
    for name, tensor in state.items():
        same.setdefault(id(tensor), []).append(name)
    # Of parameters that are tied, safetensors keeps one.
    missing = [name for name, tensor in state.items() if not any(each in tensors for each in same[id(tensor)])]
    unexpected = [name for name in tensors if name not in state]
    wrong = [
        f"{name} (model {list(tensor.shape)}, checkpoint {list(tensors[name].shape)})"
        for name, tensor in state.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    if any(found.values()):
        listed = "; ".join(f"{what}: {_some(names)}" for what, names in found.items() if names)
        raise CheckpointError(
            f"The checkpoint does not fit {type(model).__name__}: {listed}. It must have the names and shapes of "
            f"model.state_dict()."
        )


def _some(names: Sequence[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def fill_from(model: nn.Module, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Give `model` the values of `tensors`: in place where it has values, else as lazy or plain parameters.

    A sharded parameter (a `DTensor`) gets its own part, of which alone the bytes are read.

    Args:
        model: The model; what of it is on the meta device gets new parameters.
        tensors: What `check_names` has let through; lazy tensors stay lazy until `materialize`.
        device: Where new parameters shall be.

    Raises:
        CheckpointError: A non-persistent buffer on the meta device cannot be made again, or a file cannot be read. What
            has values has them still.
    """
    remade = _remade(model)
    state = saved_tensors(model)
    # Of parameters that are tied, a checkpoint may have any one.
    values = {id(state[name]): tensor for name, tensor in tensors.items()}
    made: dict[int, torch.Tensor] = {}
    new: list[tuple[torch.Tensor, torch.Tensor]] = []
    in_place: list[tuple[torch.Tensor, torch.Tensor]] = []
    for target in {id(target): target for target in state.values()}.values():
        value = values[id(target)]
        if is_sharded(target):
            local, value = local_part(target, value)
            if target.is_meta:
                local = fresh(local.shape, local.dtype, device)
                made[id(target)] = _as_in(target, with_local(target, local))
                new.append((value, local))
            else:
                in_place.append((value, local))
        elif target.is_meta:
            made[id(target)] = _as_in(target, value.to(device=device, dtype=target.dtype))
        else:
            in_place.append((value, target))
    check_readable(_jobs(in_place))
    check_unchanged(lazy for lazy, _ in _jobs(in_place))
    _fill(new + in_place)
    for name, target in state.items():
        if id(target) in made:
            put_tensor(model, name, made[id(target)])
    for name, buffer in remade.items():
        put_tensor(model, name, buffer.to(device))


def _jobs(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[Job]:
    return [(value, out.detach()) for value, out in pairs if isinstance(value, LazyTensor)]


def _fill(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Write values into tensors, from the files those that are lazy."""
    try:
        read(_jobs(pairs))
        with torch.no_grad():
            for value, out in pairs:
                if not isinstance(value, LazyTensor):
                    out.copy_(value)
    finally:
        # Bytes that came from a file did not pass by autograd, which must notice, be it only some of them.
        torch.autograd.graph.increment_version([out for _, out in pairs])


def _as_in(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(value, requires_grad=target.requires_grad) if isinstance(target, nn.Parameter) else value


def _unsaved_on_meta(model: nn.Module) -> list[str]:
    saved = saved_tensors(model)
    return [name for name, buffer in model.named_buffers() if name not in saved and buffer.is_meta]


def _remade(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that no checkpoint has and that are on meta, from building their modules once more on the CPU."""
    again: dict[str, nn.Module] = {}
    found = {}
    for name in _unsaved_on_meta(model):
        path, _, last = name.rpartition(".")
        if path not in again:
            again[path] = _built_again(model.get_submodule(path), name)
        found[name] = tensor_at(again[path], last)
    return found


def _built_again(module: nn.Module, name: str) -> nn.Module:
    arguments = arguments_of(module)
    if arguments is None:
        raise CheckpointError(
            f"{name} is a non-persistent buffer on the meta device: no checkpoint has it. Build the model inside `with "
            f"kernelgraft.recorded():`, so that {type(module).__name__} can be made again, or build it on the CPU."
        )
    with collector_paused(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return type(module)(*arguments.args, **arguments.kwargs)
