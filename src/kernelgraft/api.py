"""Planning, grafting, loading and saving, for any `torch.nn.Module`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernelgraft import compat, recorded_config, saving
from kernelgraft.blueprint import Blueprint, Subject
from kernelgraft.checkpoint.files import Checkpoint
from kernelgraft.checkpoint.fill import all_or_nothing, check_names, fill_from, materialize
from kernelgraft.config import KernelConfig
from kernelgraft.errors import PlanError
from kernelgraft.graft import Graft, apply_blueprint, graft_of
from kernelgraft.plan import Plan
from kernelgraft.planner import make_blueprint
from kernelgraft.recording import Arguments, Recording, arguments_of
from kernelgraft.slot import KEY, GraftedModule
from kernelgraft.soundness import Run, example_runner, forward_runner


def plan(
    model: nn.Module, config: Any, *, example_inputs: Any = None, device: str | torch.device | None = None
) -> Plan:
    """Plan a graft without changing anything.

    Args:
        model: Any module; its parameters may be on the meta device.
        config: A `KernelConfig`, Transformers' own, a mapping, or the path of a TOML file.
        example_inputs: Inputs of one forward (a tuple, or a dict of keywords), by which the soundness of fusions is
            checked. Models of Transformers need none.
        device: Where a model that is on the meta device will be: kernels are chosen for that; the CPU if left out.

    Returns:
        The plan, to `print`, or to keep with `to_json`.

    Raises:
        KernelGraftError: The config, a kernel or the graft is refused; the message says why and what to write.
    """
    live = not any(parameter.is_meta for parameter in model.parameters())
    return _blueprint(model, config, example_inputs, live=live, device=None if live else device).plan


def graft(model: nn.Module, config: Any, *, example_inputs: Any = None, verify: bool = False) -> Graft:
    """Put kernels into a model that is there, in place.

    The model keeps its identity and its weights; `state_dict()` keeps its original names. The default table of kernels
    is not consulted: only what `config` names is put in.

    Args:
        model: Any module whose parameters have values.
        config: A `KernelConfig`, Transformers' own, a mapping, or the path of a TOML file.
        example_inputs: Inputs of one forward (a tuple, or a dict of keywords), by which the soundness of fusions is
            checked. Models of Transformers need none.
        verify: Whether one site of each kind is verified at once, on `example_inputs` or drawn ones, as by
            `Graft.verify`. If a kernel fails, the graft is taken out again.

    Returns:
        The graft. `graft.remove()`, or leaving it as a context manager, gives the original modules back.

    Raises:
        KernelGraftError: The config, a kernel or the graft is refused. Nothing has changed.
        VerificationError: A kernel does not answer as the original does. The model is as it was.
    """
    made = apply_blueprint(model, _blueprint(model, config, example_inputs, live=True))
    if verify:
        from kernelgraft.verify import verify_or_remove

        verify_or_remove(made, example_inputs)
    return made


def _blueprint(
    model: nn.Module, config: Any, example_inputs: Any, *, live: bool, device: torch.device | str | None = None
) -> Blueprint:
    _refuse_grafted(model)
    subject = subject_of(model, example_inputs, live=live)
    if device is not None:
        subject.device_of = lambda _: torch.device(device)
    return make_blueprint(subject, KernelConfig.of(config))


def _refuse_grafted(model: nn.Module) -> None:
    if graft_of(model) is not None or any(KEY in vars(module) for module in model.modules()):
        raise PlanError(
            "The model is grafted already, and a second graft would not see its originals. Remove the first one "
            "(graft_of(model).remove()) and graft with one config that names all kernels. New weights go into a "
            "grafted model by load_state_dict, or by graft_of(model).update."
        )


def subject_of(
    model: nn.Module, example_inputs: Any = None, *, live: bool, recording: Recording | None = None
) -> Subject:
    """What a planner needs to know about a model."""
    skeleton: nn.Module | None = None
    if live and compat.is_pretrained(model):
        built = compat.skeleton_of(model)
        if built is not None:
            skeleton, recording = built

    def arguments(path: str) -> Arguments | None:
        own = model.get_submodule(path)
        original = vars(own)[KEY].tree() if isinstance(own, GraftedModule) else own
        module = own if skeleton is None else _submodule(skeleton, path)
        if module is not None and recording is not None and (module is own or _same(module, original)):
            found = recording.of(module)
            if found is not None:
                return found
        return arguments_of(own)

    return Subject(
        model=model,
        live=live,
        skeleton=skeleton,
        arguments=arguments,
        run=_runner(model, example_inputs),
        tied=compat.tied_weights(model),
        prefix=compat.base_prefix(model),
    )


def _runner(model: nn.Module, example_inputs: Any) -> Run | None:
    if example_inputs is None:
        return forward_runner(model)
    if isinstance(example_inputs, Mapping):
        return example_runner(**example_inputs)
    return example_runner(*(example_inputs if isinstance(example_inputs, tuple | list) else (example_inputs,)))


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _same(module: nn.Module, other: nn.Module) -> bool:
    shapes = [[(n, p.shape) for n, p in each.named_parameters()] for each in (module, other)]
    return type(module) is type(other) and shapes[0] == shapes[1]


def load(
    model: nn.Module,
    checkpoint: str | Path | Mapping[str, torch.Tensor],
    config: Any = None,
    *,
    device: torch.device | str = "cpu",
    example_inputs: Any = None,
) -> nn.Module:
    """Fill any module from a checkpoint with the names of its `state_dict()`, and put kernels in on the way.

    A module built on the meta device (under `torch.device("meta")`, and inside `kernelgraft.recorded()` if a layout for
    a single module is to be made) gets each byte once, straight to its final place. One that has values already is
    overwritten in place and grafted then.

    Args:
        model: The module.
        checkpoint: A safetensors file, an index of shards, a folder with either, a Hub id, or tensors by name.
        config: As in `graft`; without it nothing is grafted.
        device: Where parameters that are on meta now shall be.
        example_inputs: As in `graft`.

    Returns:
        The same module.

    Raises:
        CheckpointError: A tensor is missing, unexpected or of another shape, or a buffer would have no value.
        KernelGraftError: The graft is refused. The module has not changed.
    """
    if not isinstance(checkpoint, Mapping):
        with Checkpoint.at(checkpoint) as tensors:
            return load(model, tensors, config, device=device, example_inputs=example_inputs)
    _refuse_grafted(model)
    check_names(model, checkpoint)
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    blueprint = None
    if config is not None:
        blueprint = _blueprint(model, config, example_inputs, live=not on_meta, device=device if on_meta else None)
    with all_or_nothing(model):
        fill_from(model, checkpoint, torch.device(device))
        if blueprint is not None:
            apply_blueprint(model, blueprint)
        else:
            materialize(model)
    return model


def save_pretrained(model: nn.Module, folder: str | Path, **kwargs: Any) -> None:
    """Save a model, grafted or not, under its original names, so that the untouched model loads it.

    Weights are streamed from where they are by a few threads, and the folder holds the old checkpoint until the new one
    takes its place in one step. A grafted model leaves `kernelgraft.json` beside its weights, which says what kernels
    it had: `from_pretrained(folder, kernel_config="recorded")` loads it with them.

    Args:
        model: Any module. What is written for one of Transformers is what its own `save_pretrained` writes.
        folder: Where to; made if it is not there. Other files in it stay.
        **kwargs: For a model of Transformers, those of its `save_pretrained`; for other modules `max_shard_size`.

    Raises:
        ConversionError: A rule of the graft has no inverse, so that original weights cannot be had.
        CheckpointError: Something in the state cannot stand in a checkpoint.
        SaveError: The files cannot be written. What was in the folder has not changed.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    graft = graft_of(model)
    own = getattr(model, "save_pretrained", None)
    if compat.is_pretrained(model):
        saving.save_pretrained(model, graft, folder, **kwargs)
    elif own is None:
        saving.save_model(model, graft, folder, **kwargs)
    else:
        own(folder, **kwargs)
        recorded_config.put(Path(folder), recorded_config.record_of(graft, folder))
