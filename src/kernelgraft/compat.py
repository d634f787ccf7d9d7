"""What differs between versions of Transformers and of `kernels`, asked by feature and not by version number.

With `auto.py` the only module that imports Transformers, and it does so only inside functions.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from kernelgraft.config import KernelConfig
from kernelgraft.entry import Entry
from kernelgraft.errors import PlanError
from kernelgraft.functions import with_globals
from kernelgraft.pausing import collector_paused
from kernelgraft.plan import Rejected
from kernelgraft.recording import Recording, recorded


def is_pretrained(model: nn.Module) -> bool:
    """Whether `model` is one of Transformers', without importing it."""
    return is_pretrained_class(type(model))


def is_pretrained_class(cls: type) -> bool:
    """Whether `cls` is a model class of Transformers, without importing it."""
    utils = sys.modules.get("transformers.modeling_utils")
    return utils is not None and issubclass(cls, utils.PreTrainedModel)


def skeleton_of(model: nn.Module) -> tuple[nn.Module, Recording] | None:
    """The same Transformers model built once more on the meta device from a copy of its config, and recorded.

    `None` if it cannot be built from its config alone.
    """
    config: Any = copy.deepcopy(model.config)
    try:
        with collector_paused(), torch.device("meta"), torch.random.fork_rng(devices=[]), recorded() as recording:
            skeleton = type(model)(config)
    except Exception:
        # What a model's own __init__ may raise is anything; without a skeleton the plan says what it could not check.
        return None
    return skeleton, recording


def tied_weights(model: nn.Module) -> Mapping[str, str]:
    """Parameters that Transformers ties when it has loaded a checkpoint: target to source."""
    found: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return found


def loaded_dtypes(load_config: Any) -> Callable[[str], torch.dtype | None]:
    """Which parameters Transformers loads in a dtype of their own (`_keep_in_fp32_modules`), by name."""
    from transformers.core_model_loading import build_glob_alternation

    kept: dict[str, torch.dtype] = load_config.dtype_plan or {}
    if not kept:
        return lambda _: None
    pattern, groups, _ = build_glob_alternation(list(kept))

    def dtype_of(name: str) -> torch.dtype | None:
        match = pattern.search(name)
        return kept[groups[str(match.lastgroup)]] if match else None

    return dtype_of


def explicit_devices(device_map: Any) -> dict[str, Any] | None:
    """The devices that a `device_map` names, by path; `None` if it leaves them to Transformers, or is wrong."""
    if device_map is None:
        return None
    from transformers.integrations.accelerate import check_and_set_device_map

    try:
        found = check_and_set_device_map(device_map)
    except (ValueError, RuntimeError, ImportError):  # the load says so, when it comes to it
        return None
    return found if isinstance(found, dict) else None


def weight_map_of(load_config: Any) -> Any:
    """What stands in the index that named a checkpoint's files: tensor name to file name; `None` without an index."""
    return (load_config.sharded_metadata or {}).get("weight_map")


def reads_whole_files(load_config: Any, files: Iterable[str]) -> bool:
    """Whether files must not be mapped: the caller says so (`disable_mmap`), or Transformers does of their place."""
    from transformers import modeling_utils

    on_hf_mount = getattr(modeling_utils, "_is_on_hf_mount", lambda _: False)
    return bool(load_config.disable_mmap) or any(on_hf_mount(file) for file in files)


def save_arguments(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
    """The arguments of a call of Transformers' `save_pretrained`, by name; `None` if it takes others."""
    signature = inspect.signature(sys.modules["transformers.modeling_utils"].PreTrainedModel.save_pretrained)
    try:
        said = signature.bind(model, *args, **kwargs).arguments
    except TypeError:
        return None
    own = next(iter(signature.parameters))
    return {**{name: value for name, value in said.items() if name not in (own, "kwargs")}, **said.get("kwargs", {})}


def saves_by_itself(model: Any, said: Mapping[str, Any]) -> bool:
    """Whether this process alone saves the whole model, and nothing but saves it."""
    return (
        writes_whole_model(model, said)
        and not said.get("push_to_hub")
        and not said.get("distributed_checkpoint")
        and getattr(model, "hf_quantizer", None) is None
        and getattr(model.config, "distributed_config", None) is None
        and getattr(model, "_tp_size", None) is None
    )


def writes_whole_model(model: Any, said: Mapping[str, Any]) -> bool:
    """Whether this process writes files, and not those of an adapter alone."""
    main = bool(said.get("is_main_process", True))
    ask = getattr(model, "should_save_on_this_rank", None)
    return (main if ask is None else bool(ask(main))) and not getattr(model, "_hf_peft_config_loaded", False)


def saving_class(cls: Any, replacements: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Any:
    """A model class whose `save_pretrained` calls other functions than Transformers' in some places.

    Args:
        cls: The class; what it has around Transformers' `save_pretrained` stays around it.
        replacements: Gives, by their global names, what is called in the place of the functions that it gets.

    Returns:
        The subclass, or `None` if Transformers' code is not made of these functions.
    """
    base = sys.modules["transformers.modeling_utils"].PreTrainedModel
    theirs = base.save_pretrained
    calls = inspect.unwrap(theirs)
    new = replacements(calls.__globals__)
    if not all(name in calls.__globals__ and name in calls.__code__.co_names for name in new):
        return None
    try:
        ours = with_globals(theirs, new)
    except PlanError:
        return None
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    # In the order of bases it comes right before Transformers' own, so that `super().save_pretrained` finds it.
    layer = type(base.__name__, (base,), {"__module__": base.__module__, "save_pretrained": ours})
    return type(cls.__name__, (cls, layer), named)


def base_prefix(model: nn.Module) -> str:
    """The name under which a model with a head holds its base model; "" if there is none."""
    return str(getattr(model, "base_model_prefix", "") or "")


def default_table() -> tuple[tuple[Entry, ...], tuple[Rejected, ...]]:
    """Transformers' own table of kernels as entries, and why there is none.

    Nothing is registered and nothing fetched: Transformers' function that builds the table only makes the objects
    that know where a kernel lies.
    """
    try:
        from transformers.integrations import hub_kernels
    except ImportError as error:
        return (), (Rejected("default table", "", f"Transformers cannot be imported: {error}"),)
    build = getattr(hub_kernels, "_build_kernel_mapping", None)
    if build is None:
        import kernels

        reason = (
            f"the installed Transformers has no table for kernels {kernels.__version__}: its own kernel support is off "
            f"beside that version"
        )
        return (), (Rejected("default table", "", reason),)
    return KernelConfig(build()).entries, ()
