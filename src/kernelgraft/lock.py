"""Lock files: which commit of each Hub kernel of a config is meant, and what its files are.

The lock of `kernels.toml` is `kernels.toml.lock` beside it. `KernelConfig.from_file` looks for it. (A `kernels.lock`,
as the `kernels` library writes for a Python project, is another thing and is not touched.)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kernelgraft.errors import AuthoringError, ConfigError
from kernelgraft.pins import hashes_of, is_bytecode
from kernelgraft.reference import KernelReference, Pin

_FORMAT = 1
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class LockedKernel:
    """One repository at one revision.

    Attributes:
        repository: `owner/repo`.
        revision: What the config asks for: a branch, tag or commit; version 2 is the branch `v2`.
        commit: What that was when the lock was made.
        files: The sha256 of each file of its builds, by path in the repository.
    """

    repository: str
    revision: str
    commit: str
    files: dict[str, str]


@dataclass(frozen=True)
class Lock:
    """What a lock file says.

    Attributes:
        path: The file.
        kernels: The kernels in it.
    """

    path: str
    kernels: tuple[LockedKernel, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, as it stands in the file."""
        return {"format": _FORMAT, "kernels": [asdict(each) for each in self.kernels]}


def lock_path(config: str | os.PathLike[str]) -> Path:
    """The lock file of a config file."""
    path = Path(config)
    return path.with_name(f"{path.name}.lock")


def lock(config: str | os.PathLike[str]) -> Lock:
    """Pin every Hub kernel of a config file, and write its lock file; nothing of the kernels is imported.

    What is fetched is the list of a commit's files, and those that are small. With `HF_HUB_OFFLINE` the cache answers.

    Raises:
        ConfigError: The config file cannot be read.
        AuthoringError: A repository or revision is not there.
    """
    from kernelgraft.config import KernelConfig
    from kernelgraft.config_file import read

    pairs, options = read(Path(config))
    uses: list[Any] = [choice.use for entry in KernelConfig(pairs, **options).entries for choice in entry.choices]
    asked = dict.fromkeys((use.location, _revision(use)) for use in uses if _is_hub(use))
    made = Lock(str(lock_path(config)), tuple(_locked(repository, revision) for repository, revision in sorted(asked)))
    fresh = Path(f"{made.path}.new")
    fresh.write_text(json.dumps(made.to_json(), indent=2) + "\n", encoding="utf-8")
    fresh.replace(made.path)
    return made


def read_lock(path: str | os.PathLike[str]) -> Lock:
    """Read a lock file.

    Raises:
        ConfigError: It is none that this version can read.
    """
    try:
        said = json.loads(Path(path).read_text(encoding="utf-8"))
        if said["format"] != _FORMAT:
            raise ValueError(f"its format is {said['format']!r}, and {_FORMAT} is known")
        kernels = tuple(
            LockedKernel(each["repository"], each["revision"], each["commit"], dict(each["files"]))
            for each in said["kernels"]
        )
        if not all(_COMMIT.fullmatch(each.commit) for each in kernels):
            raise ValueError("a commit in it is none")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"The lock file {str(path)!r} cannot be read: {type(error).__name__}: {error}. Make it again with "
            f"`kernelgraft lock {str(path).removesuffix('.lock')}`."
        ) from error
    return Lock(str(path), kernels)


def pinned(pairs: list[tuple[Any, Any]], config: Path) -> list[tuple[Any, Any]]:
    """The pairs of a config file with its lock's pins at their references; the same pairs where there is no lock."""
    path = lock_path(config)
    if not path.exists():
        return pairs
    found = read_lock(path)
    pins = {
        (each.repository, each.revision): Pin(found.path, each.commit, tuple(each.files.items()))
        for each in found.kernels
    }

    def with_pins(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: with_pins(inner) for key, inner in value.items()}
        if _is_hub(value):
            return replace(value, pin=pins.get((value.location, _revision(value)), Pin(found.path)))
        return value

    return [(key, with_pins(value)) for key, value in pairs]


def _is_hub(use: object) -> bool:
    return isinstance(use, KernelReference) and use.kind == "hub"


def _revision(use: Any) -> str:
    revision: str = use.revision if use.revision is not None else f"v{1 if use.version is None else use.version}"
    return revision


# --- the Hub, or its cache


def _locked(repository: str, revision: str) -> LockedKernel:
    from huggingface_hub import constants

    try:
        if constants.HF_HUB_OFFLINE:
            snapshot = _cached(repository, revision)
            commit, files = snapshot.name, hashes_of(snapshot / "build", snapshot)
        else:
            commit = _commit_of(repository, revision)
            files = dict(sorted(_files_of(repository, commit)))
    except AuthoringError:
        raise
    except Exception as error:
        raise AuthoringError(
            f"{repository!r} at {revision!r} cannot be pinned: {type(error).__name__}: {error}. Nothing was written."
        ) from error
    if not files:
        raise AuthoringError(
            f"{repository!r} at {revision!r} (commit {commit}) has no files in build/, so it is no kernel repository. "
            f"Nothing was written."
        )
    return LockedKernel(repository, revision, commit, files)


def _cached(repository: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from kernels.hf_hub import CACHE_DIR

    return Path(
        snapshot_download(repository, repo_type="kernel", revision=revision, cache_dir=CACHE_DIR, local_files_only=True)
    )


def _commit_of(repository: str, revision: str) -> str:
    from kernels.hf_hub import _get_hf_api

    if _COMMIT.fullmatch(revision):
        return revision
    refs = _get_hf_api().list_repo_refs(repository, repo_type="kernel")
    there = {each.name: each.target_commit for each in (*refs.branches, *refs.tags)}
    if revision not in there:
        raise AuthoringError(
            f"{repository!r} has no branch or tag {revision!r}; it has {', '.join(sorted(there)) or 'none'}. A "
            f"version N is the branch vN. Nothing was written."
        )
    commit: str = there[revision]
    return commit


def _files_of(repository: str, commit: str) -> Iterator[tuple[str, str]]:
    """Large files by the sha256 that the Hub keeps of them, small ones by their content."""
    from huggingface_hub.hf_api import RepoFile
    from kernels.hf_hub import CACHE_DIR, _get_hf_api

    api = _get_hf_api()
    for each in api.list_repo_tree(repository, "build", recursive=True, revision=commit, repo_type="kernel"):
        if not isinstance(each, RepoFile) or is_bytecode(each.path):
            continue
        if each.lfs is not None:
            yield each.path, each.lfs.sha256
        else:
            file = api.hf_hub_download(repository, each.path, repo_type="kernel", revision=commit, cache_dir=CACHE_DIR)
            yield each.path, hashlib.sha256(Path(file).read_bytes()).hexdigest()
