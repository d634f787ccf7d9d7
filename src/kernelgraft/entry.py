"""One entry of a `KernelConfig`: which modules it is about, and what is to run there on which device in which mode.

Here keys and values are read and checked; nothing is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, Flag
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from kernelgraft.errors import ConfigError, ConfigTypeError
from kernelgraft.kernel import Kernel, is_kernel_object, is_repository, use_text
from kernelgraft.reference import FORMS, KernelReference

if TYPE_CHECKING:
    from kernels import Device

Target: TypeAlias = str | tuple[tuple[str, str], ...]
# What runs: a reference, a kernel, a class, a function, or a repository object. `None` leaves the module alone.
Use: TypeAlias = "KernelReference | Kernel | type | Callable[..., Any] | Any | None"

DEVICES = ("cpu", "cuda", "mps", "neuron", "npu", "rocm", "tpu", "xpu")
MODES = ("inference", "training", "inference|torch_compile", "training|torch_compile")

FUSION = '(("RMSNorm", "model.layers.*.post_attention_layernorm"), ("MLP", "model.layers.*.mlp"))'
_KEY_FORMS = f"""\
A key is one of
  "RMSNorm"   the name of a class, or of a function
  ("Linear", "lm_head")
              class name and path of a module that is replaced alone
  {FUSION}
              a fusion: class name and path of each module, in the order that the layout's __init__ takes them"""
_VALUE_FORMS = f"""\
A value is one of
{FORMS}
  ("owner/repo:KernelName", {{"version": 2, "trust_remote_code": True}})
  {{"cuda": value, "cpu": value}}, {{"cuda": {{"inference": value, "training": value}}}}
  ""   to leave the module alone
  a kernel class, a function, a Kernel, or a repository object of the kernels library"""


class Missing(Enum):
    """The type of `MISSING`."""

    MISSING = "missing"


MISSING: Literal[Missing.MISSING] = Missing.MISSING


@dataclass(frozen=True)
class Choice:
    """What to run on one device in one mode.

    Attributes:
        device: A device type of `DEVICES`, a `kernels.Device` with properties, or `None` for any other device.
        mode: One of `MODES`, or `None` for any other mode.
        use: What was asked for; `None` leaves the module alone.
    """

    device: Device | str | None
    mode: str | None
    use: Use

    @property
    def device_type(self) -> str | None:
        """The device's type without its properties."""
        return self.device if self.device is None or isinstance(self.device, str) else str(self.device.type)


@dataclass(frozen=True)
class Entry:
    """One key of a config and everything that it may run.

    Attributes:
        target: A class or function name; or `(class name, path pattern)` pairs, one for a module that is named by its
            path, several for a fusion.
        choices: By device and mode, no two for the same.
    """

    target: Target
    choices: tuple[Choice, ...]

    @property
    def is_fusion(self) -> bool:
        """Whether it takes several modules over."""
        return self.has_paths and len(self.target) > 1

    @property
    def has_paths(self) -> bool:
        """Whether it names its modules by their paths too."""
        return not isinstance(self.target, str)

    @property
    def label(self) -> str:
        """The key as a message names it."""
        return target_label(self.target)


def target_label(target: Target) -> str:
    """A key as a message names it: `RMSNorm`, or `RMSNorm + MLP at model.layers.*.{norm, mlp}`, or `Linear at head`."""
    if isinstance(target, str):
        return target
    if len(target) == 1:
        return f"{target[0][0]} at {target[0][1]}"
    parent, _, _ = target[0][1].rpartition(".")
    children = ", ".join(path.rpartition(".")[2] for _, path in target)
    return f"{' + '.join(name for name, _ in target)} at {parent + '.' if parent else ''}{{{children}}}"


# --- choosing ---------------------------------------------------------------------------------------------------------

# The order of preference of the kernels library (`_MODE_FALLBACK_PRIORITY` in its layer/repos.py), by (training,
# compiling). It is not called because it is private there, and because its repositories of CUDA ask for the capability
# of a GPU even where no choice depends on one, as on a machine that only plans. A test holds the two side by side.
_PREFERENCE: dict[tuple[bool, bool], tuple[str | None, ...]] = {
    (False, False): ("inference", "inference|torch_compile", "training", "training|torch_compile", None),
    (True, False): ("training", "training|torch_compile", None),
    (False, True): ("inference|torch_compile", "training|torch_compile", None),
    (True, True): ("training|torch_compile", None),
}


def select(
    entry: Entry, device: torch.device | str, *, training: bool, compiling: bool = False
) -> Use | Literal[Missing.MISSING]:
    """What an entry runs on a device in a mode, by the order of preference of the `kernels` library.

    The device decides first: of those of its type the one with the narrowest range of capabilities that holds the
    GPU's, else the choices that name no device. Among these the mode decides.

    Returns:
        What to run; `None` where the module is to be left alone; `MISSING` if the entry says nothing about this case.
    """
    choices = _for_device(entry.choices, device)
    by_mode = {choice.mode: choice for choice in choices}
    for mode in _PREFERENCE[training, compiling]:
        if mode in by_mode:
            return by_mode[mode].use
    return MISSING


def device_type(device: torch.device | str) -> str:
    """The device type as the `kernels` library calls it: torch's "cuda" is "rocm" on a ROCm build."""
    kind = device.type if isinstance(device, torch.device) else device.partition(":")[0]
    return "rocm" if kind == "cuda" and torch.version.hip is not None else kind


def _for_device(choices: Sequence[Choice], device: torch.device | str) -> list[Choice]:
    kind = device_type(device)
    same = [choice for choice in choices if choice.device_type == kind]
    fitting = {choice.device: _range(choice) for choice in same if _range(choice) is None}
    if limited := [choice for choice in same if _range(choice) is not None]:
        capability = _capability(device)
        for choice in limited:
            low, high = _range(choice) or (0, 0)
            if capability is not None and low <= capability <= high:
                fitting[choice.device] = (low, high)
    if not fitting:
        return [choice for choice in choices if choice.device is None]
    narrowest = min(fitting, key=lambda key: float("inf") if (span := fitting[key]) is None else span[1] - span[0])
    return [choice for choice in same if choice.device == narrowest]


def _range(choice: Choice) -> tuple[int, int] | None:
    properties = getattr(choice.device, "properties", None)
    return None if properties is None else (properties.min_capability, properties.max_capability)


def _capability(device: torch.device | str) -> int | None:
    if not torch.cuda.is_available():
        return None
    torch_device = torch.device(device.replace("rocm", "cuda", 1)) if isinstance(device, str) else device
    major, minor = torch.cuda.get_device_capability(torch_device)
    return major * 10 + minor


# --- reading keys -----------------------------------------------------------------------------------------------------


def read_target(key: object) -> Target:
    """Reads a key.

    Raises:
        ConfigTypeError: It is neither text nor a sequence of pairs.
        ConfigError: It is empty, or its patterns cannot be meant.
    """
    if isinstance(key, str):
        return _read_class_name(key, key)
    if not isinstance(key, list | tuple):
        raise ConfigTypeError(f"The key {key!r} is of type {type(key).__name__}. {_KEY_FORMS}")
    if not key:
        raise ConfigError(f"The key {key!r} is empty. {_KEY_FORMS}")
    if all(isinstance(part, str) for part in key) and len(key) == 2:
        return (_read_pair(key, key),)
    pairs = tuple(_read_pair(pair, key) for pair in key)
    _check_paths([path for _, path in pairs], key)
    return pairs


def _read_class_name(name: str, key: object) -> str:
    if re.fullmatch(r"[\w-]+", name):
        return name
    found = f"The key {key!r} is empty" if name == key == "" else f"{name!r} in the key {key!r} is no class name"
    hint = ' A path stands beside a class name only: ("MLP", "model.layers.*.mlp").' if re.search(r"[.*]", name) else ""
    raise ConfigError(f"{found}.{hint} {_KEY_FORMS}")


def _read_pair(pair: object, key: object) -> tuple[str, str]:
    if not isinstance(pair, list | tuple):
        raise ConfigTypeError(
            f"{pair!r} in the key {key!r} is of type {type(pair).__name__}, not a pair of class name and path. "
            f"{_KEY_FORMS}"
        )
    if len(pair) != 2:
        raise ConfigError(f"{pair!r} in the key {key!r} is no pair of class name and path. {_KEY_FORMS}")
    if not all(isinstance(part, str) for part in pair):
        raise ConfigTypeError(f"{pair!r} in the key {key!r} holds what is no text. {_KEY_FORMS}")
    return _read_class_name(pair[0], key), _read_pattern(pair[1], key)


def _read_pattern(pattern: str, key: object) -> str:
    segments = pattern.split(".")
    wrong = [s for s in segments if not s or re.search(r"\s", s) or ("*" in s and s not in ("*", "**"))]
    if not wrong and "*" not in segments[-1]:
        return pattern
    reason = (
        f"ends in {segments[-1]!r}; the last segment is the name of the module itself"
        if not wrong
        else f"has the segment {wrong[0]!r}; '*' stands for one whole segment and '**' for any number"
        if wrong[0]
        else "has an empty segment"
    )
    raise ConfigError(
        f"The path {pattern!r} in the key {key!r} {reason}. Write it as a path from the root of the model: "
        f"'model.layers.*.mlp'."
    )


def _check_paths(paths: list[str], key: object) -> None:
    parents = list(dict.fromkeys(path.rpartition(".")[0] for path in paths))
    if len(parents) > 1:
        raise ConfigError(
            f"The key {key!r} fuses modules of different parents: {parents[0]!r} and {parents[1]!r}. "
            f"A fusion joins children of one module; write the patterns with the same parent: {FUSION}."
        )
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise ConfigError(f"The key {key!r} names {twice[0]!r} twice. Name each module of the fusion once.")


# --- reading values ---------------------------------------------------------------------------------------------------


def read_choices(value: object, label: str, *, local: bool) -> tuple[Choice, ...]:
    """Reads what stands at the key that `label` names.

    Args:
        value: A value of a `kernel_mapping`.
        label: The key, for messages.
        local: Read every reference as a path.

    Raises:
        ConfigTypeError: A value, or a key of a dict in it, is of a type that means nothing.
        ConfigError: A dict is empty, names a device or mode that there is not, or names one twice.
    """
    if not isinstance(value, Mapping):
        return (Choice(None, None, read_use(value, label, local=local)),)
    choices: dict[tuple[object, object], Choice] = {}
    for device_key, inner in _items(value, label, "device", '{"cuda": "owner/repo:KernelName"}'):
        device = read_device(device_key, label)
        by_mode: Mapping[object, object] = inner if isinstance(inner, Mapping) else {None: inner}
        for mode_key, use in _items(by_mode, label, "mode", '{"cuda": {"inference": "owner/repo:KernelName"}}'):
            choice = Choice(device, read_mode(mode_key, label), read_use(use, label, local=local))
            if (choice.device, choice.mode) in choices:
                raise ConfigError(f"{label}: {place_label(choice)} stands there twice. Write it once.")
            choices[choice.device, choice.mode] = choice
    return tuple(choices.values())


def place_label(choice: Choice) -> str:
    """The device and mode of a choice as a message names them."""
    device = "any device" if choice.device is None else f"device {choice.device!r}"
    return f"{device}, {'any mode' if choice.mode is None else f'mode {choice.mode!r}'}"


def read_device(device: object, label: str) -> Device | str | None:
    """Reads a device: a type without properties becomes plain text."""
    properties = None
    kind = device
    if device is not None and not isinstance(device, str):
        kind, properties = getattr(device, "type", None), getattr(device, "properties", None)
        if not isinstance(kind, str) or isinstance(device, torch.device):
            raise ConfigTypeError(
                f"{label}: the device {device!r} is of type {type(device).__name__}. Write the type of a device "
                f"({', '.join(map(repr, DEVICES))}) or a kernels.Device."
            )
    if kind is not None and kind not in DEVICES:
        kind_of_index = str(kind).partition(":")[0]
        hint = f" Write {kind_of_index!r}." if kind_of_index in DEVICES else ""
        raise ConfigError(f"{label}: there is no device {kind!r}; known are {', '.join(map(repr, DEVICES))}.{hint}")
    return device if properties is not None else kind


def read_mode(mode: object, label: str) -> str | None:
    """Reads a mode, of the `kernels` library or as text in any order; its FALLBACK is `None`."""
    known = f"known are {', '.join(map(repr, MODES))}"
    if mode is None:
        return None
    if isinstance(mode, str):
        flags = {flag.strip().lower() for flag in mode.split("|")}
    elif isinstance(mode, Flag):
        flags = {str(flag.name).lower() for flag in mode}
    else:
        raise ConfigTypeError(
            f"{label}: the mode {mode!r} is of type {type(mode).__name__}. Write a kernels.Mode or text; {known}."
        )
    if flags == {"fallback"}:
        return None
    for name in MODES:
        if flags == set(name.split("|")):
            return name
    hint = (
        " The kernels library never chooses a kernel for 'torch_compile' alone: say compiled for what, "
        "'inference|torch_compile' or 'training|torch_compile', or both."
        if flags == {"torch_compile"}
        else ""
    )
    raise ConfigError(f"{label}: there is no mode {mode!r}; {known}.{hint}")


def read_use(value: object, label: str, *, local: bool) -> Use:
    """Reads what is to run; `""` becomes `None`."""
    text, metadata = value, None
    if isinstance(value, list | tuple):
        if len(value) != 2:
            raise ConfigError(f"{label}: {value!r} has {len(value)} parts, not a reference and a dict. {_VALUE_FORMS}")
        text, metadata = value
        if not isinstance(text, str) or not isinstance(metadata, Mapping):
            raise ConfigTypeError(f"{label}: {value!r} is not a reference and a dict. {_VALUE_FORMS}")
    if isinstance(text, str):
        if text == "" and metadata is None:
            return None
        try:
            return KernelReference.parse(text, local=local, metadata=metadata)
        except (ConfigError, ConfigTypeError) as error:
            raise type(error)(f"{label}: {error}") from None
    if isinstance(value, Kernel | KernelReference) or is_repository(value):
        return value
    if not is_kernel_object(value):
        hint = " Give its class, not an instance." if isinstance(value, torch.nn.Module) else ""
        raise ConfigTypeError(f"{label}: {value!r} is of type {type(value).__name__}.{hint} {_VALUE_FORMS}")
    if isinstance(value, type) and not callable(getattr(value, "forward", None)):
        raise ConfigTypeError(
            f"{label}: the class {value.__name__!r} has no forward. A kernel class is "
            f"`class {value.__name__}(nn.Module): def forward(self, ...): ...`."
        )
    return value


def _items(value: Mapping[Any, Any], label: str, word: str, example: str) -> list[tuple[Any, Any]]:
    if not value:
        raise ConfigError(f'{label}: the dict names no {word}. Write {example}, or "" to leave the module alone.')
    return list(value.items())


def use_label(use: Use) -> str:
    """What is to run, as a message names it."""
    return "left alone" if use is None else use_text(use)
