"""The text that names a kernel: `owner/repo:KernelName`, a path, or a Python module.

Reading a reference touches neither the network nor the disk: what a text means depends on the text alone, never on
what happens to lie in the working folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from kernelgraft.errors import ConfigError, ConfigTypeError

Trust = bool | tuple[str, ...]

FORMS = """\
  "owner/repo:KernelName"            a repository on the Hub, version 1
  "owner/repo@revision:KernelName"   the same at a branch, tag or commit
  "/path/to/repo:KernelName"         a folder; also "./repo:KernelName", "../repo:KernelName", "~/repo:KernelName"
  "./file.py:KernelName"             a single file
  "package.module:KernelName"        an installed Python module"""

_METADATA_KEYS = ("revision", "version", "trust_remote_code")
_HUB = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[^\s:@]+))?")
_MODULE = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
# What only a path begins with. A drive letter is one character, an owner on the Hub is never followed by a colon.
_PATH_START = re.compile(r"[/\\]|\.{1,2}(?:[/\\]|$)|~|[A-Za-z]:[/\\]")


@dataclass(frozen=True)
class Pin:
    """What a lock file says of a kernel on the Hub: this, and nothing else, may be loaded.

    Attributes:
        lock: The lock file.
        commit: The commit; "" if the file does not name the kernel, so that nothing may be loaded.
        files: Path in the repository and sha256 of each file of its builds.
    """

    lock: str
    commit: str = ""
    files: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class KernelReference:
    """Where a kernel is and what it is called there.

    Attributes:
        location: `owner/repo`, a path as it was written, or the dotted name of a module.
        name: The kernel's name in the repository's `layers`.
        revision: A branch, tag or commit; Hub only.
        version: The kernel's major version; Hub only, 1 if neither this nor a revision was given.
        trust_remote_code: Passed on to the `kernels` library: false, true, or the repositories that are allowed.
        local: True if the text is a path whatever it looks like (`use_local_kernel=True`).
        pin: What a lock file beside the config says of it; `None` where there is no lock file.
    """

    location: str
    name: str
    revision: str | None = None
    version: int | None = None
    trust_remote_code: Trust = False
    local: bool = False
    pin: Pin | None = field(default=None, compare=False, repr=False)

    @classmethod
    def parse(cls, text: str, *, local: bool = False, metadata: Mapping[str, object] | None = None) -> KernelReference:
        """Reads a reference.

        Args:
            text: One of the forms that this module's `FORMS` shows.
            local: Read the text as a path, as `use_local_kernel=True` asks.
            metadata: `revision` or `version`, and `trust_remote_code`; `None` stands for "not given".

        Raises:
            ConfigTypeError: The text is no string, or a value of the metadata is of the wrong type.
            ConfigError: The text cannot be read, or it and the metadata do not go together.
        """
        if not isinstance(text, str):
            raise ConfigTypeError(
                f"A kernel reference is text, got {text!r} of type {type(text).__name__}.\n{_forms()}"
            )
        location, colon, name = text.rpartition(":")
        if not colon or not location or re.fullmatch(r"[A-Za-z]", location):
            raise ConfigError(f"The kernel reference {text!r} does not say which kernel: no ':KernelName'.\n{_forms()}")
        if not name.isidentifier():
            raise ConfigError(
                f"The kernel reference {text!r} ends in {name!r}, which cannot be the name of a kernel.\n{_forms()}"
            )
        if local or _looks_like_a_path(location):
            reference = cls(location, name, local=local)
        elif hub := _HUB.fullmatch(location):
            reference = cls(hub["repo"], name, revision=hub["revision"])
        elif _MODULE.fullmatch(location):
            reference = cls(location, name)
        else:
            raise ConfigError(
                f"The kernel reference {text!r} cannot be read: {location!r} is no repository of the Hub, "
                f"no path and no Python module.\n{_forms()}"
            )
        return reference._with(metadata or {}, text)

    @property
    def kind(self) -> Literal["hub", "path", "module"]:
        """What the location is."""
        if self.local or _looks_like_a_path(self.location):
            return "path"
        return "hub" if "/" in self.location else "module"

    @property
    def path(self) -> Path:
        """The absolute path of a reference of kind "path"; a relative one starts at the working folder of now."""
        return Path(self.location).expanduser().absolute()

    @property
    def metadata(self) -> dict[str, object]:
        """What the text does not say: non-default `version` and `trust_remote_code`."""
        said: dict[str, object] = {}
        if self.kind == "hub" and self.version not in (None, 1):
            said["version"] = self.version
        if self.trust_remote_code:
            trust = self.trust_remote_code
            said["trust_remote_code"] = True if trust is True else list(trust or ())
        return said

    def relative_to(self, folder: Path) -> KernelReference:
        """The same reference, a relative path in it read from `folder` instead of the working folder."""
        if self.kind != "path":
            return self
        return replace(self, location=str(folder.absolute() / Path(self.location).expanduser()))

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision is not None else ""
        return f"{self.location}{at}:{self.name}"

    def _with(self, metadata: Mapping[str, object], text: str) -> KernelReference:
        if unknown := [key for key in metadata if key not in _METADATA_KEYS]:
            raise ConfigError(
                f"{text!r} comes with {', '.join(map(repr, unknown))}, which means nothing here. "
                f"Known are {', '.join(map(repr, _METADATA_KEYS))}: ({text!r}, {{'version': 1}})."
            )
        revision, version = _read_revision(metadata, text), _read_version(metadata, text)
        trust = _read_trust(metadata, text)
        if revision is not None and version is not None:
            raise ConfigError(
                f"{text!r} comes with revision {revision!r} and version {version!r}. Write one of the two: "
                f"a version is a branch of the repository, so that the revision says it already."
            )
        if self.kind != "hub":
            if (given := revision if revision is not None else version) is not None:
                word = "revision" if revision is not None else "version"
                raise ConfigError(
                    f"{text!r} comes with {word} {given!r}, but a {_KINDS[self.kind]} has none. "
                    f"Leave it out, or name a repository of the Hub: 'owner/repo:{self.name}'."
                )
            return replace(self, trust_remote_code=trust)
        if self.revision is not None and (revision is not None or version is not None):
            raise ConfigError(
                f"{text!r} names revision {self.revision!r} and comes with "
                f"{'revision' if revision is not None else 'version'} "
                f"{revision if revision is not None else version!r} beside it. Write it once."
            )
        revision = self.revision if revision is None else revision
        if revision is None and version is None:
            version = 1
        return replace(self, revision=revision, version=version, trust_remote_code=trust)


_KINDS = {"path": "path", "module": "Python module"}


def _forms() -> str:
    return f"A kernel reference is one of\n{FORMS}"


def _looks_like_a_path(location: str) -> bool:
    return _PATH_START.match(location) is not None or location.endswith(".py") or "\\" in location


def _read_revision(metadata: Mapping[str, object], text: str) -> str | None:
    revision = metadata.get("revision")
    if revision is None:
        return None
    if not isinstance(revision, str):
        raise ConfigTypeError(
            f"{text!r} comes with revision {revision!r} of type {type(revision).__name__}. "
            f"A revision is the name of a branch or tag, or a commit: {{'revision': 'main'}}."
        )
    if not revision or re.search(r"[\s:@]", revision):
        raise ConfigError(
            f"{text!r} comes with revision {revision!r}, which names no branch, tag or commit. "
            f"Write {{'revision': 'main'}}, or leave it out."
        )
    return revision


def _read_version(metadata: Mapping[str, object], text: str) -> int | None:
    version = metadata.get("version")
    if version is None:
        return None
    wanted = "A version is a whole number: {'version': 1}."
    if isinstance(version, bool) or not isinstance(version, int | str):
        raise ConfigTypeError(f"{text!r} comes with version {version!r} of type {type(version).__name__}. {wanted}")
    try:
        number = int(version)
    except ValueError:
        number = -1
    if number < 0:
        raise ConfigError(f"{text!r} comes with version {version!r}. {wanted}")
    return number


def _read_trust(metadata: Mapping[str, object], text: str) -> Trust:
    trust = metadata.get("trust_remote_code")
    if trust is None:
        return False
    if isinstance(trust, bool):
        return trust
    if isinstance(trust, list | tuple) and all(isinstance(repository, str) for repository in trust):
        return tuple(trust) or False
    raise ConfigTypeError(
        f"{text!r} comes with trust_remote_code {trust!r} of type {type(trust).__name__}. "
        f"Write True, False, or the repositories that you trust: {{'trust_remote_code': ['owner/repo']}}."
    )
