"""A `KernelConfig` as a TOML file, in both directions.

```toml
fallback = "reference"

[[kernel]]
replaces = "RMSNorm"
use = "owner/my-kernel:CustomRMSNorm"
version = 2

[[kernel]]
replaces = ["Linear", "lm_head"]
use = "kernelgraft.kernels:LinearCrossEntropy"

[[kernel]]
fuses = [["RMSNorm", "model.layers.*.post_attention_layernorm"], ["MLP", "model.layers.*.mlp"]]
use = "./my-kernel:RMSNormMLP"
device = "cuda"
mode = "inference"
```
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelgraft.entry import (
    Choice,
    Entry,
    Target,
    place_label,
    read_device,
    read_mode,
    read_target,
    read_use,
    target_label,
    use_label,
)
from kernelgraft.errors import ConfigError, ConfigTypeError
from kernelgraft.reference import KernelReference

if TYPE_CHECKING:
    from kernelgraft.config import KernelConfig

_OPTIONS = ("use_local_kernel", "inherit_mapping", "fallback")
_METADATA = ("revision", "version", "trust_remote_code")
_TABLE = ("replaces", "fuses", "use", *_METADATA, "device", "mode")
_EXAMPLE = """\
  [[kernel]]
  replaces = "RMSNorm"
  use = "owner/repo:KernelName\""""


def read(path: Path) -> tuple[list[tuple[Target, Any]], dict[str, Any]]:
    """Reads a file.

    Returns:
        The (key, value) pairs and the options that `KernelConfig` takes.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read as TOML: {error}. A kernel is written\n{_EXAMPLE}") from error
    return read_tables(content, path)


def read_tables(content: Mapping[str, Any], path: Path) -> tuple[list[tuple[Target, Any]], dict[str, Any]]:
    """Reads what a file says, already parsed; `path` is the file, for messages and for relative paths."""
    _refuse_unknown(content, ("kernel", *_OPTIONS), f"{str(path)!r}")
    options = {name: value for name, value in content.items() if name != "kernel"}
    tables = content.get("kernel", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigTypeError(f"{str(path)!r}: 'kernel' is {tables!r}, not a list of tables. Write\n{_EXAMPLE}")
    local = content.get("use_local_kernel", False) is True
    found: dict[Target, dict[Any, dict[str | None, Any]]] = {}
    for number, table in enumerate(tables, 1):
        label = f"{str(path)!r}, table {number}"
        target, choice = _read_table(table, label, local=local, folder=path.absolute().parent)
        by_mode = found.setdefault(target, {}).setdefault(choice.device, {})
        if choice.mode in by_mode:
            raise ConfigError(
                f"{label}: {target_label(target)!r} for {place_label(choice)} stands there twice. "
                f"Write it once, or tell the tables apart by device or mode."
            )
        by_mode[choice.mode] = "" if choice.use is None else choice.use
    for option in ("use_local_kernel", "inherit_mapping"):
        if not isinstance(content.get(option, False), bool):
            raise ConfigTypeError(f"{str(path)!r}: {option} is {content[option]!r}. Write true or false.")
    if content.get("fallback", "error") not in ("error", "reference"):
        raise ConfigError(f'{str(path)!r}: fallback is {content["fallback"]!r}. Write "error" or "reference".')
    return [(target, _plain(by_device)) for target, by_device in found.items()], options


def _plain(by_device: dict[Any, dict[str | None, Any]]) -> Any:
    """What is for every device and mode stands by itself, as a user would write it."""
    return by_device[None][None] if by_device.keys() == by_device.get(None, {}).keys() == {None} else by_device


def _read_table(table: Mapping[str, Any], label: str, *, local: bool, folder: Path) -> tuple[Target, Choice]:
    _refuse_unknown(table, _TABLE, label)
    keys = [key for key in ("replaces", "fuses") if key in table]
    if len(keys) != 1:
        found = "both replaces and fuses" if keys else "neither replaces nor fuses"
        raise ConfigError(f"{label} has {found}, and needs one of them. Write\n{_EXAMPLE}")
    key = table[keys[0]]
    alone = isinstance(key, str) or (isinstance(key, list) and [type(part) for part in key] == [str, str])
    if (keys[0] == "replaces") != alone:
        raise ConfigTypeError(
            f'{label}: {keys[0]} is {key!r}. Write replaces = "RMSNorm", or replaces = ["Linear", "lm_head"], or '
            f'fuses = [["RMSNorm", "model.layers.*.post_attention_layernorm"], ["MLP", "model.layers.*.mlp"]].'
        )
    text = table.get("use")
    if not isinstance(text, str):
        found = f"use is {text!r}" if "use" in table else "there is no use"
        raise ConfigTypeError(f"{label}: {found}. Write the reference of a kernel, as in\n{_EXAMPLE}")
    metadata = {name: table[name] for name in _METADATA if name in table}
    try:
        target = read_target(key)
    except (ConfigError, ConfigTypeError) as error:
        raise type(error)(f"{label}: {error}") from None
    use = read_use((text, metadata) if metadata else text, label, local=local)
    if isinstance(use, KernelReference):
        use = use.relative_to(folder)
    return target, Choice(_read_device(table.get("device"), label), read_mode(table.get("mode"), label), use)


def _read_device(device: object, label: str) -> Any:
    """A device type, or a table `{type = "cuda", min_capability = 80, max_capability = 90}`."""
    if not isinstance(device, dict):
        return read_device(device, label)
    if set(device) != {"type", "min_capability", "max_capability"} or device["type"] not in ("cuda", "rocm"):
        raise ConfigError(
            f'{label}: the device is {device!r}. Write device = "cuda", or, for some GPUs only, '
            f'device = {{ type = "cuda", min_capability = 80, max_capability = 90 }}; "rocm" takes the same.'
        )
    from kernels import CUDAProperties, Device, ROCMProperties

    make = CUDAProperties if device["type"] == "cuda" else ROCMProperties
    limits = {name: device[name] for name in ("min_capability", "max_capability")}
    if not all(isinstance(limit, int) and not isinstance(limit, bool) for limit in limits.values()):
        raise ConfigTypeError(f"{label}: a capability is a whole number such as 80, got {limits!r}.")
    return Device(type=device["type"], properties=make(**limits))


def _refuse_unknown(table: Mapping[str, Any], known: tuple[str, ...], label: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{label} has {key!r}, which means nothing; known are {', '.join(known)}.{hint}")


def write(config: KernelConfig, path: Path) -> None:
    """Writes a config; nothing is written if any of it cannot be."""
    import tomli_w

    folder = path.absolute().parent
    content: dict[str, Any] = config._changed_options()
    content["kernel"] = [table_of(entry, choice, folder) for entry in config.entries for choice in entry.choices]
    path.write_text(tomli_w.dumps(content), encoding="utf-8")


def key_of(entry: Entry) -> dict[str, Any]:
    """What a table says of the place."""
    if isinstance(entry.target, str):
        return {"replaces": entry.target}
    pairs = [list(pair) for pair in entry.target]
    return {"fuses": pairs} if entry.is_fusion else {"replaces": pairs[0]}


def table_of(entry: Entry, choice: Choice, folder: Path) -> dict[str, Any]:
    """One `[[kernel]]` table; paths in `folder` are relative to it.

    Raises:
        ConfigError: What is to run is an object of this process.
    """
    use = choice.use
    if use is not None and not isinstance(use, KernelReference):
        raise ConfigError(
            f"The config cannot be written: {entry.label!r} uses {use_label(use)}, an object of this process "
            f"({type(use).__name__}). Name the kernel by a reference, such as './file.py:KernelName'."
        )
    table: dict[str, Any] = {**key_of(entry), "use": "" if use is None else text_in(use, folder)}
    if use is not None:
        table.update(use.metadata)
    if choice.device is not None:
        table["device"] = choice.device if isinstance(choice.device, str) else _device_table(choice.device)
    if choice.mode is not None:
        table["mode"] = choice.mode
    return table


def text_in(use: KernelReference, folder: Path) -> str:
    """A reference as a file in `folder` has it."""
    if use.kind != "path":
        return str(use)
    inside = use.path.is_relative_to(folder)
    return f"./{use.path.relative_to(folder).as_posix()}:{use.name}" if inside else f"{use.path}:{use.name}"


def _device_table(device: Any) -> dict[str, Any]:
    limits = {name: getattr(device.properties, name) for name in ("min_capability", "max_capability")}
    return {"type": device.type, **limits}
