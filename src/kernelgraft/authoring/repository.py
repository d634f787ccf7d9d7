"""What lies in the folder of a kernel repository: its code, what `build.toml` says of it, and its builds."""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernelgraft.errors import AuthoringError

COMPILED = (".cu", ".cuh", ".cpp", ".cc", ".cxx", ".c", ".h", ".hpp", ".mm", ".metal", ".hip", ".so", ".pyd")


@dataclass(frozen=True)
class Repository:
    """A kernel repository on the disk.

    Attributes:
        folder: Its folder.
        package: The folder of its Python code.
        in_build: Whether that is a build itself, because there is no other source.
        said: The content of `build.toml`; empty if there is none.
    """

    folder: Path
    package: Path
    in_build: bool
    said: dict[str, Any]

    @property
    def general(self) -> dict[str, Any]:
        """The table of that name in `build.toml`."""
        general = self.said.get("general", {})
        return general if isinstance(general, dict) else {}

    @property
    def name(self) -> str:
        """The repository's name, as metadata has it."""
        return str(self.general.get("name") or self.folder.resolve().name.replace("_", "-").lower())

    @property
    def builds(self) -> list[Path]:
        """The folders of its variants."""
        found = self.folder / "build"
        return sorted(each for each in found.iterdir() if each.is_dir()) if found.is_dir() else []

    def sources(self) -> Iterator[Path]:
        """The Python files of its package."""
        return (path for path in sorted(self.package.rglob("*.py")) if "__pycache__" not in path.parts)

    def compiled(self) -> list[str]:
        """What shows that it has to be compiled: sources, or a table for them."""
        files = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.suffix in COMPILED]
        kernels = self.said.get("kernel", {})
        tables = [f"[kernel.{name}] in build.toml" for name in kernels] if isinstance(kernels, dict) else []
        return sorted(files) + tables


def open_repository(folder: str | Path) -> Repository:
    """Look at a folder.

    Its code is `torch-ext/<name>/`, as kernel-builder has it; else the folder itself, if it is a package; else a build.

    Raises:
        AuthoringError: There is no code, or `build.toml` cannot be read.
    """
    place = Path(folder)
    if not place.is_dir():
        raise AuthoringError(f"{str(place)!r} is no folder. Give that of a kernel repository.")
    said: dict[str, Any] = {}
    if (place / "build.toml").is_file():
        try:
            said = tomllib.loads((place / "build.toml").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise AuthoringError(f"{str(place / 'build.toml')!r} cannot be read as TOML: {error}.") from error
    packages = sorted(path.parent for path in (place / "torch-ext").glob("*/__init__.py"))
    if len(packages) > 1:
        raise AuthoringError(
            f"{str(place / 'torch-ext')!r} has {len(packages)} packages ({', '.join(each.name for each in packages)}), "
            f"and a repository has one."
        )
    if packages:
        return Repository(place, packages[0], False, said)
    if (place / "__init__.py").is_file():
        return Repository(place, place, False, said)
    builds = sorted(path.parent for path in (place / "build").glob("*/__init__.py"))
    if builds:
        return Repository(place, builds[0], True, said)
    there = ", ".join(sorted(each.name for each in place.iterdir())[:8]) or "nothing"
    raise AuthoringError(
        f"{str(place)!r} is no kernel repository: its code would be torch-ext/<name>/__init__.py, __init__.py or "
        f"build/<variant>/__init__.py; there is {there}. `kernelgraft new` makes one."
    )
