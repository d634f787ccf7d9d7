"""What differs between versions of Transformers and of `kernels`, asked by feature and not by version number.

With `auto.py` the only module that imports Transformers, and it does so only inside functions.
"""

import copy
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from kernelgraft.config import KernelConfig
from kernelgraft.entry import Entry
from kernelgraft.plan import Rejected
from kernelgraft.recording import Recording, recorded


def is_pretrained(model: nn.Module) -> bool:
    """Whether `model` is one of Transformers', without importing it."""
    utils = sys.modules.get("transformers.modeling_utils")
    return utils is not None and isinstance(model, utils.PreTrainedModel)


def skeleton_of(model: nn.Module) -> tuple[nn.Module, Recording] | None:
    """The same Transformers model built once more on the meta device from a copy of its config, and recorded.

    `None` if it cannot be built from its config alone.
    """
    config: Any = copy.deepcopy(model.config)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]), recorded() as recording:
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


def reads_whole_files(load_config: Any, files: Iterable[str]) -> bool:
    """Whether files must not be mapped: the caller says so (`disable_mmap`), or Transformers does of their place."""
    from transformers import modeling_utils

    on_hf_mount = getattr(modeling_utils, "_is_on_hf_mount", lambda _: False)
    return bool(load_config.disable_mmap) or any(on_hf_mount(file) for file in files)


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
