"""Builds of a repository in pure Python or Triton, as they are published: code, `metadata.json` and digests."""

import hashlib
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernelgraft.authoring.repository import Repository, open_repository
from kernelgraft.errors import AuthoringError

BACKENDS = ("cpu", "cuda")
"""What is built for where `build.toml` names no backends."""

_METADATA = "metadata.json"
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", _METADATA, f"{_METADATA}.sigstore")


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        folder: The repository.
        variants: Its builds, as folders relative to it.
        digests: The sha256 of every file of a build, in base64 as in its metadata, by build.
    """

    folder: str
    variants: tuple[str, ...]
    digests: dict[str, dict[str, str]]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def export(folder: str | Path) -> Exported:
    """Write `build/torch-<backend>/` for each backend of a repository's `build.toml`.

    Each holds the code, and `metadata.json` with the digests that the `kernels` library validates. A build that is
    there is replaced as a whole. A repository whose only code is in `build/` gets its metadata completed in place.

    Raises:
        AuthoringError: It has to be compiled, which is kernel-builder's job, or what it says of itself is refused by
            the `kernels` library.
    """
    repository = open_repository(folder)
    if compiled := repository.compiled():
        raise AuthoringError(
            f"{str(repository.folder)!r} has to be compiled ({', '.join(compiled[:5])}"
            f"{', ...' if len(compiled) > 5 else ''}). That is the job of kernel-builder, which builds a variant for "
            f"each system: `nix run .#build-and-copy` in the repository. `export` is for kernels in Python and Triton."
        )
    if repository.in_build:
        variants = [path for path in repository.builds if (path / "__init__.py").is_file()]
        for variant in variants:
            _complete(repository, variant, variant)
    else:
        backends = repository.general.get("backends") or list(BACKENDS)
        variants = [repository.folder / "build" / f"torch-{backend}" for backend in backends]
        for backend, variant in zip(backends, variants, strict=True):
            _write(repository, str(backend), variant)
    names = [path.relative_to(repository.folder).as_posix() for path in variants]
    return Exported(
        str(repository.folder), tuple(names), {n: _digests(p) for n, p in zip(names, variants, strict=True)}
    )


def metadata_of(repository: Repository, backend: str, build: Path) -> dict[str, Any]:
    """What `metadata.json` says of a build: the id is made of its content, so that no two builds share one."""
    general = repository.general
    content = "".join(f"{name}\0{digest}\n" for name, digest in sorted(_digests(build).items()))
    mark = hashlib.sha256(f"{repository.name}\0{backend}\0{content}".encode()).hexdigest()[:10]
    said = {
        "name": repository.name,
        "id": f"_{repository.name.replace('-', '_')}_{backend}_{mark}",
        "version": general.get("version", 1),
        "license": general.get("license", "Apache-2.0"),
        "upstream": general.get("upstream"),
        "source": general.get("source"),
        "python-depends": list(general.get("python-depends", [])),
        "backend": {"type": backend},
    }
    return {key: value for key, value in said.items() if value is not None}


def _write(repository: Repository, backend: str, variant: Path) -> None:
    variant.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that it gets there in one step: an error leaves the old build.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=variant.parent) as made:
        fresh = Path(made) / variant.name
        ignored = {"build", "tests", "torch-ext"} if repository.package == repository.folder else set()
        shutil.copytree(
            repository.package,
            fresh,
            ignore=lambda where, names: (
                set(_IGNORED(where, names)) | (ignored & set(names) if Path(where) == repository.package else set())
            ),
        )
        (fresh / _METADATA).write_text(_spelt({**metadata_of(repository, backend, fresh)}), encoding="utf-8")
        _complete(repository, fresh, variant)
        if variant.exists():
            variant.rename(Path(made) / "old")
        fresh.rename(variant)


def _complete(repository: Repository, build: Path, variant: Path) -> None:
    """Put the digests of a build's files into its metadata, and have the library accept both."""
    from kernels._rust import Digest, DigestAlgorithm, Metadata
    from kernels.variants import parse_variant

    file = build / _METADATA
    try:
        parse_variant(variant.name)
        said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else metadata_of(repository, "cpu", build)
        said["digest"] = {"algorithm": "sha256", "files": dict(sorted(_digests(build).items()))}
        text = _spelt(said)
        metadata = Metadata.from_bytes(text.encode())
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, build))
    except (OSError, ValueError) as error:
        raise AuthoringError(
            f"The kernels library does not take {variant.name!r} of {str(repository.folder)!r}: {error}. "
            f"Correct build.toml{' or the metadata.json there' if repository.in_build else ''}."
        ) from error
    file.write_text(text, encoding="utf-8")


def _digests(build: Path) -> dict[str, str]:
    from kernels._rust import Digest, DigestAlgorithm

    found: dict[str, str] = Digest.hash_variant(DigestAlgorithm.SHA256, build).files
    return found


def _spelt(metadata: dict[str, Any]) -> str:
    return json.dumps(metadata, indent=2) + "\n"
