"""Holds a kernel of the Hub against what a lock file says of it, before any of its code is imported."""

import hashlib
import os
from pathlib import Path

from kernelgraft.errors import KernelError
from kernelgraft.reference import KernelReference, Pin


def trust_of(reference: KernelReference) -> bool | list[str]:
    """What the `kernels` library is told about trust."""
    trust = reference.trust_remote_code
    return list(trust) if isinstance(trust, tuple) else trust


def check_pinned(reference: KernelReference, pin: Pin, backend: str | None) -> None:
    """Fetch a kernel at the commit of its pin, and compare its files; nothing is imported.

    Raises:
        KernelError: The lock does not name it, it cannot be had, or a file is another one.
    """
    if not pin.commit:
        raise KernelError(
            f"Kernel {str(reference)!r} is not in {pin.lock!r}, and with a lock nothing else is loaded. Run "
            f"`kernelgraft lock {pin.lock.removesuffix('.lock')}` to pin it, or remove the lock file."
        )
    if any(entry.partition("=")[0] == reference.location for entry in os.environ.get("LOCAL_KERNELS", "").split(":")):
        raise KernelError(
            f"Kernel {str(reference)!r} is locked to commit {pin.commit} by {pin.lock!r}, and LOCAL_KERNELS names "
            f"something else in its place. Unset the one or remove the other."
        )
    _check_files(reference, pin, _variant(reference, pin, backend))


def hashes_of(folder: Path, root: Path) -> dict[str, str]:
    """The sha256 of each file in a folder but bytecode, by its path relative to `root`."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not is_bytecode(path.relative_to(root).as_posix())
    }


def is_bytecode(path: str) -> bool:
    """Whether Python itself writes such a file where it imports from, so that it is part of no repository."""
    return path.endswith(".pyc") or "__pycache__" in path.split("/")


def _variant(reference: KernelReference, pin: Pin, backend: str | None) -> Path:
    from huggingface_hub import constants
    from kernels import install_kernel
    from kernels._rust import Metadata

    try:
        variant = Path(
            install_kernel(
                reference.location,
                revision=pin.commit,
                backend=backend,
                local_files_only=constants.HF_HUB_OFFLINE,
                trust_remote_code=trust_of(reference),
            )
        )
        depends = [each.repo_id for each in Metadata.read_from_file(variant / "metadata.json").kernel_depends]
    except Exception as error:
        raise KernelError(
            f"Kernel {str(reference)!r}: the kernels library could not get commit {pin.commit} of "
            f"{reference.location!r}, which {pin.lock!r} names: {type(error).__name__}: {error}"
        ) from error
    if depends:
        raise KernelError(
            f"Kernel {str(reference)!r} loads other kernels ({', '.join(depends)}), and {pin.lock!r} does not pin "
            f"those yet. Remove the lock file to load it."
        )
    return variant


def _check_files(reference: KernelReference, pin: Pin, variant: Path) -> None:
    root = variant.parent.parent
    prefix = f"{variant.relative_to(root).as_posix()}/"
    wanted = {path: digest for path, digest in pin.files if path.startswith(prefix)}
    found = hashes_of(variant, root)
    wrong = [f"{path} has another content" for path in wanted if path in found and found[path] != wanted[path]]
    wrong += [f"{path} is missing" for path in wanted if path not in found]
    wrong += [f"{path} is not in the lock" for path in found if path not in wanted]
    if wrong:
        raise KernelError(
            f"Kernel {str(reference)!r}: what lies in {str(variant)!r} is not what {pin.lock!r} pins: "
            f"{'; '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}. Nothing was imported. Remove that folder to "
            f"fetch it anew, or run `kernelgraft lock` if the change is meant."
        )
