"""`KernelConfig`: which kernels a user asks for, and where they go.

A config knows no model. It is read and checked when it is made, it never changes, and using it leaves no trace in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

from kernelgraft.entry import (
    DEVICES,
    MISSING,
    MODES,
    Choice,
    Entry,
    Missing,
    Target,
    Use,
    device_type,
    place_label,
    read_choices,
    read_target,
    select,
    target_label,
    use_label,
)
from kernelgraft.errors import ConfigError, ConfigTypeError
from kernelgraft.reference import KernelReference

__all__ = [
    "DEVICES",
    "MISSING",
    "MODES",
    "Choice",
    "Entry",
    "KernelConfig",
    "KernelReference",
    "Missing",
    "Target",
    "Use",
    "device_type",
    "select",
]

FALLBACKS = ("error", "reference")
Fallback = Literal["error", "reference"]


class KernelConfig:
    """Which kernels replace which modules.

    It takes what the `KernelConfig` of Transformers takes, and more: kernels by mode, for the CPU, as classes, and
    `""` to leave a module alone.

    Example:
        ```python
        KernelConfig({
            "RMSNorm": "owner/my-kernel:CustomRMSNorm",
            (
                ("RMSNorm", "model.layers.*.post_attention_layernorm"),
                ("MLP", "model.layers.*.mlp"),
            ): ("owner/my-kernel:RMSNormMLP", {"version": 2}),
            ("Linear", "lm_head"): "kernelgraft.kernels:LinearCrossEntropy",
            "rotary_pos_emb": {"cuda": {"inference": "./rotary.py:Rotary", "training": ""}},
        })
        ```

    Attributes:
        entries: What was asked for, one entry for each key.
        use_local_kernel: Every reference is a path.
        inherit_mapping: As it was given; see `inherits`.
        fallback: What happens where a kernel that was asked for cannot run: "error", or "reference" to run the
            module's original forward.
    """

    __slots__ = ("_given", "entries", "fallback", "inherit_mapping", "use_local_kernel")

    _given: tuple[tuple[Any, Any], ...]
    entries: tuple[Entry, ...]
    use_local_kernel: bool
    inherit_mapping: bool
    fallback: Fallback

    def __init__(
        self,
        kernel_mapping: Mapping[Any, Any] | Iterable[tuple[Any, Any]] | None = None,
        use_local_kernel: bool = False,
        inherit_mapping: bool = True,
        *,
        fallback: Fallback = "error",
    ) -> None:
        """Reads and checks a config. No kernel is loaded yet.

        Args:
            kernel_mapping: What replaces what, as a dict or as (key, value) pairs. It is copied.
            use_local_kernel: Read every reference as a path, and inherit no table of kernels.
            inherit_mapping: Take the default table of kernels for what `kernel_mapping` does not name.
            fallback: What to do where a kernel that was asked for cannot run.

        Raises:
            ConfigTypeError: Something is of a type that means nothing here.
            ConfigError: A reference, device, mode or pattern cannot be meant, or a key stands there twice.
        """
        for name, flag in (("use_local_kernel", use_local_kernel), ("inherit_mapping", inherit_mapping)):
            if not isinstance(flag, bool):
                raise ConfigTypeError(f"{name} is {flag!r} of type {type(flag).__name__}. Write True or False.")
        if fallback not in FALLBACKS:
            raise ConfigError(
                f"fallback is {fallback!r}. Write 'error', or 'reference' to run the original forward instead."
            )
        given = tuple((_copied(key), _copied(value)) for key, value in _pairs(kernel_mapping))
        entries: dict[Target, Entry] = {}
        for key, value in given:
            target = read_target(key)
            if target in entries:
                raise ConfigError(
                    f"The key {target_label(target)!r} stands there twice, for "
                    f"{use_label(entries[target].choices[0].use)} and {value!r}. Write it once; kernels that differ by "
                    f'device or mode stand in a dict: {{"cuda": {{"inference": ..., "training": ...}}}}.'
                )
            label = f"At {target_label(target)!r}"
            entries[target] = Entry(target, read_choices(value, label, local=use_local_kernel))
        values = (given, tuple(entries.values()), fallback, inherit_mapping, use_local_kernel)
        for name, value in zip(self.__slots__, values, strict=True):
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, config: object) -> KernelConfig:
        """Makes a config of whatever says the same.

        Args:
            config: A `KernelConfig`, one of Transformers (also one that has been used, which Transformers fills with
                repository objects), a dict, (key, value) pairs, or the path of a file. It is left as it is.

        Raises:
            ConfigTypeError: It is none of these.
            ConfigError: What it says cannot be meant.
        """
        if isinstance(config, KernelConfig):
            return config
        if isinstance(config, str | os.PathLike):
            return cls.from_file(config)
        if isinstance(config, Mapping | list | tuple):
            return cls(config)
        if all(hasattr(config, name) for name in ("kernel_mapping", "use_local_kernel", "inherit_mapping")):
            theirs: Any = config
            mapping = theirs.kernel_mapping or {}
            if theirs.use_local_kernel and isinstance(mapping, Mapping):
                mapping = {key: _without_version(value) for key, value in mapping.items()}
            return cls(mapping, theirs.use_local_kernel, theirs.inherit_mapping)
        raise ConfigTypeError(
            f"{config!r} of type {type(config).__name__} is no kernel config. "
            f'Write KernelConfig({{"RMSNorm": "owner/repo:KernelName"}}), or give the path of a TOML file.'
        )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> KernelConfig:
        """Reads a TOML file; relative paths in it start at the file's folder.

        Where a lock file is beside it (`kernels.toml.lock`, see `kernelgraft lock`), kernels of the Hub are loaded at
        the commits that it names and with the files that it names, or not at all.

        Raises:
            ConfigError: It cannot be read; the message names the file and the number of the table.
            ConfigTypeError: A value in it is of a type that means nothing.
        """
        from kernelgraft.config_file import read
        from kernelgraft.lock import pinned

        pairs, options = read(Path(path))
        return cls(pinned(pairs, Path(path)), **options)

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Writes the config as TOML, which `from_file` reads.

        A relative path is written relative to the file if it leads into the file's folder, else as an absolute one.

        Raises:
            ConfigError: It holds classes, functions or other objects, which only references can stand for in a file.
        """
        from kernelgraft.config_file import write

        write(self, Path(path))

    @property
    def kernel_mapping(self) -> dict[Any, Any]:
        """What was given, in a new dict."""
        return {key: _copied(value) for key, value in self._given}

    @property
    def inherits(self) -> bool:
        """Whether a default table is added; local kernels inherit none, as in Transformers."""
        return self.inherit_mapping and not self.use_local_kernel

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"A KernelConfig does not change: cannot set {name!r}. Make a new one: KernelConfig(...).")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"A KernelConfig does not change: cannot delete {name!r}.")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KernelConfig):
            return NotImplemented
        return self._content() == other._content()

    def __hash__(self) -> int:
        # Of the keys only: repository objects of other packages need not be hashable.
        return hash((frozenset(entry.target for entry in self.entries), *self._options()))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (self.kernel_mapping, self.use_local_kernel, self.inherit_mapping, self.fallback))

    def __copy__(self) -> KernelConfig:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelConfig:
        return self

    def __repr__(self) -> str:
        lines = [
            f"    {entry.label}: {use_label(choice.use)}"
            + ("" if choice.device is choice.mode is None else f" ({place_label(choice)})")
            for entry in self.entries
            for choice in entry.choices
        ]
        options = [f"    {name}={value!r}" for name, value in self._changed_options().items()]
        return "\n".join(["KernelConfig(", *lines, *options, ")"]) if lines or options else "KernelConfig()"

    def _changed_options(self) -> dict[str, Any]:
        options = {}
        if self.use_local_kernel:
            options["use_local_kernel"] = True
        if not self.inherit_mapping:
            options["inherit_mapping"] = False
        return options if self.fallback == "error" else {**options, "fallback": self.fallback}

    def _options(self) -> tuple[bool, bool, str]:
        return self.use_local_kernel, self.inherit_mapping, self.fallback

    def _content(self) -> tuple[Any, ...]:
        by_target = {
            entry.target: {(choice.device, choice.mode): choice.use for choice in entry.choices}
            for entry in self.entries
        }
        return by_target, self._options()


def _pairs(mapping: object) -> list[tuple[Any, Any]]:
    if mapping is None:
        return []
    if isinstance(mapping, Mapping):
        return list(mapping.items())
    example = '{"RMSNorm": "owner/repo:KernelName"}'
    if isinstance(mapping, str | bytes | os.PathLike) or not isinstance(mapping, Iterable):
        hint = f" To read a file, write KernelConfig.from_file({str(mapping)!r})." if isinstance(mapping, str) else ""
        raise ConfigTypeError(
            f"kernel_mapping is {mapping!r} of type {type(mapping).__name__}. Write a dict: {example}.{hint}"
        )
    pairs = list(mapping)
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ConfigTypeError(
                f"kernel_mapping is no dict, and {pair!r} in it is no (key, value) pair. Write a dict: {example}."
            )
    return [(key, value) for key, value in pairs]


def _copied(value: Any) -> Any:
    """A copy that shares no container with `value`; lists in it become tuples, objects stay the same."""
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_copied(inner) for inner in value)
    return value


def _without_version(value: Any) -> Any:
    """Transformers writes a version beside local paths too, where it means nothing."""
    if isinstance(value, Mapping):
        return {key: _without_version(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[1], Mapping):
        return value[0], {key: said for key, said in value[1].items() if key not in ("version", "revision")}
    return value


def _rebuild(mapping: dict[Any, Any], use_local: bool, inherit: bool, fallback: Fallback) -> KernelConfig:
    return KernelConfig(mapping, use_local, inherit, fallback=fallback)
