"""From a kernel reference to an imported module: which code it is, and where it came from.

Only what a user's reference names is imported. The Hub, and repositories in the Hub's layout, go through the `kernels`
library with its own rules of trust, pinning and signatures. A plain folder and a single file are imported here, under
a module name made from their place and their content: the same place and content is the same module, and an edited
file is another one beside it.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from itertools import pairwise
from pathlib import Path
from types import CodeType, ModuleType

from kernelgraft.errors import KernelError
from kernelgraft.pins import check_pinned, trust_of
from kernelgraft.reference import KernelReference

# Neither the import of a module under a name of its own nor the `kernels` library's is safe in two threads at once.
_IMPORTING = threading.RLock()
_COMMIT = re.compile(r"[0-9a-f]{40}")
# By place, the digest of what this process has imported from it and cannot import again after an edit.
_LOADED: dict[str, str] = {}


@dataclass(frozen=True)
class Source:
    """An imported module, and what is known of its origin.

    Attributes:
        module: The module whose `layers` are looked at.
        origin: Its folder or file.
        digest: The commit of a snapshot from the Hub, else the sha256 of what lies in `origin`.
    """

    module: ModuleType
    origin: str | None
    digest: str | None


def load_source(reference: KernelReference, *, backend: str | None = None) -> Source:
    """Imports the module that a reference names.

    Raises:
        KernelError: There is nothing there, it is no kernel repository, or its import failed.
    """
    with _IMPORTING:
        if reference.kind == "hub":
            return _from_hub(reference, backend)
        if reference.kind == "module":
            return _from_installed(reference)
        return _from_path(reference, backend)


@contextmanager
def importing(what: object, *, doing: str = "loading it") -> Iterator[None]:
    """Holds the lock of imports, and turns whatever an import raises into a `KernelError` that names `what`."""
    with _IMPORTING:
        try:
            yield
        except KernelError:
            raise
        except Exception as error:
            raise KernelError(f"Kernel {what}: {doing} failed: {type(error).__name__}: {error}") from error


def digest_of(place: Path, pattern: str = "*") -> str:
    """The sha256 of a file, or of every file in a folder but bytecode and hidden ones, names included."""
    total = hashlib.sha256()
    for path in [place] if place.is_file() else _files(place, pattern):
        name = path.name if path == place else path.relative_to(place).as_posix()
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{name}\0{content}\n".encode())
    return total.hexdigest()


def place_of(module: ModuleType | None) -> tuple[str | None, str | None]:
    """Origin and digest of a module that somebody else imported: of its commit only, as its files may have changed."""
    file = getattr(module, "__file__", None)
    return (file, _commit(Path(file))) if file else (None, None)


def _files(folder: Path, pattern: str) -> Iterator[Path]:
    for path in sorted(folder.rglob(pattern)):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
        if not hidden and path.suffix != ".pyc" and path.is_file():
            yield path


def _commit(place: Path) -> str | None:
    """The commit in a path of the Hub's cache, `.../snapshots/<commit>/...`."""
    parts = place.parts
    for before, part in pairwise(parts):
        if before == "snapshots" and _COMMIT.fullmatch(part):
            return part
    return None


def _from_hub(reference: KernelReference, backend: str | None) -> Source:
    local, pin = Path(reference.location), reference.pin
    if pin is not None:
        check_pinned(reference, pin, backend)
    hint = f" (A folder of that name is here; to mean it, write './{reference}'.)" if local.is_dir() else ""
    try:
        from kernels import get_kernel

        module = get_kernel(
            reference.location,
            revision=reference.revision if pin is None else pin.commit,
            version=reference.version if pin is None else None,
            backend=backend,
            trust_remote_code=trust_of(reference),
        )
    except Exception as error:
        at = f"revision {reference.revision!r}" if reference.revision is not None else f"version {reference.version}"
        raise KernelError(
            f"Kernel {str(reference)!r}: the kernels library could not load {reference.location!r} at {at}: "
            f"{type(error).__name__}: {error}{hint}"
        ) from error
    return _placed(module, reference)


def _from_installed(reference: KernelReference) -> Source:
    """An installed module is imported under its own name, so that its classes are those that others import."""
    name = reference.location
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _import_failed(reference, error) from error
        raise KernelError(
            f"Kernel {str(reference)!r}: there is no Python module {error.name!r} in this environment. Install it, "
            f"or name a file ('./{name.rpartition('.')[2]}.py:{reference.name}') "
            f"or a repository of the Hub ('owner/repo:{reference.name}')."
        ) from error
    except Exception as error:
        raise _import_failed(reference, error) from error
    file = getattr(module, "__file__", None)
    if file is None:
        return Source(module, None, None)
    origin = Path(file).parent if hasattr(module, "__path__") else Path(file)
    return Source(module, str(origin), _LOADED.setdefault(str(origin), digest_of(origin, "*.py")))


def _from_path(reference: KernelReference, backend: str | None) -> Source:
    path = reference.path.resolve()
    if not path.exists():
        there = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, there, n=3)
        found = f"in {str(path.parent)!r} there is {', '.join(map(repr, near or there[:8])) or 'nothing'}"
        raise KernelError(
            f"Kernel {str(reference)!r}: there is no file or folder {str(path)!r}; "
            f"{found if path.parent.is_dir() else f'nor is there a folder {str(path.parent)!r}'}."
        )
    if path.is_file():
        if path.suffix != ".py":
            raise KernelError(
                f"Kernel {str(reference)!r}: {str(path)!r} is no Python file. "
                f"Name a '.py' file or the folder of the repository: '{path.parent}:{reference.name}'."
            )
        return _import_privately(path, path, reference)
    if _in_hub_layout(path):
        return _from_hub_layout(path, reference, backend)
    if (path / "__init__.py").is_file():
        return _import_privately(path, path / "__init__.py", reference)
    raise _no_repository(path, reference)


def _in_hub_layout(folder: Path) -> bool:
    patterns = ("metadata.json", "build/*/metadata.json", "*/metadata.json")
    if any(next(folder.glob(pattern), None) for pattern in patterns):
        return True
    return (folder / "build").is_dir() and not (folder / "__init__.py").is_file()


def _no_repository(folder: Path, reference: KernelReference) -> KernelError:
    there = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    files = [name for name in there if name.endswith(".py")]
    hint = f" To mean a file in it, write '{folder / files[0]}:{reference.name}'." if files else ""
    return KernelError(
        f"Kernel {str(reference)!r}: {str(folder)!r} is no kernel repository. One has 'build/<variant>/metadata.json', "
        f"as on the Hub, or an '__init__.py'; what is there is {', '.join(map(repr, there[:8])) or 'nothing'}.{hint}"
    )


# --- repositories in the Hub's layout ---------------------------------------------------------------------------------


def _from_hub_layout(folder: Path, reference: KernelReference, backend: str | None) -> Source:
    from kernels import get_local_kernel
    from kernels.resolver import resolve_local_kernel

    with importing(repr(str(reference)), doing=f"loading the repository {str(folder)!r} with the kernels library"):
        variant = resolve_local_kernel(folder, backend=backend)
        _refuse_taken_id(variant.metadata.id, variant.variant_path, reference)
        module = get_local_kernel(folder, backend=backend, trust_remote_code=trust_of(reference))
    return _placed(module, reference)


def _refuse_taken_id(module_name: str, folder: Path, reference: KernelReference) -> None:
    """The library names a module by the id in its metadata: two repositories of one id would mix their modules."""
    taken = sys.modules.get(module_name)
    if taken is not None and not _is_within(taken, folder):
        raise KernelError(
            f"Kernel {str(reference)!r}: its metadata.json has the id {module_name!r}, and {taken.__file__!r} has been "
            f"loaded in this process under the same id. Give each repository an id of its own."
        )


def _placed(module: ModuleType, reference: KernelReference) -> Source:
    """The source of a module that the `kernels` library gave.

    The library never loads a folder twice, so that it would give the old code of an edited one.
    """
    folder = Path(str(module.__file__)).parent
    if not _is_within(sys.modules.get(module.__name__), folder):
        raise KernelError(
            f"Kernel {str(reference)!r}: another kernel repository has been loaded since under the id "
            f"{module.__name__!r} that {str(folder)!r} has too. Give each repository an id of its own."
        )
    if commit := _commit(folder):
        return Source(module, str(folder), commit)
    digest = digest_of(folder)
    if _LOADED.setdefault(str(folder), digest) != digest:
        raise KernelError(
            f"Kernel {str(reference)!r}: {str(folder)!r} has been edited since this process loaded it, and the "
            f"kernels library would give the old code. Start a new process; while you work on a kernel, name its "
            f"file instead, which is read anew: './file.py:{reference.name}'."
        )
    return Source(module, str(folder), digest)


def _is_within(module: ModuleType | None, folder: Path) -> bool:
    return module is not None and Path(module.__file__ or "").is_relative_to(folder)


# --- plain folders and single files -----------------------------------------------------------------------------------


class _Reader(SourceFileLoader):
    """Compiles what stands in the file: bytecode is told apart by whole seconds, which an edit can be faster than."""

    def get_code(self, fullname: str) -> CodeType | None:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def _import_privately(place: Path, file: Path, reference: KernelReference) -> Source:
    digest = digest_of(place)
    mark = hashlib.sha256(f"{place}\0{digest}".encode()).hexdigest()[:16]
    name = f"_kernelgraft_{re.sub(r'[^0-9A-Za-z]', '_', place.stem)}_{mark}"
    if (module := sys.modules.get(name)) is None:
        folder = [str(place)] if place.is_dir() else None
        spec = importlib.util.spec_from_file_location(
            name, file, loader=_Reader(name, str(file)), submodule_search_locations=folder
        )
        assert spec is not None  # given a loader, there always is one
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        importlib.invalidate_caches()
        try:
            _without_bytecode(spec.loader.exec_module, module)
        except BaseException as error:
            for loaded in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
                del sys.modules[loaded]
            if not isinstance(error, Exception):
                raise
            raise _import_failed(reference, error) from error
    return Source(module, str(place), digest)


def _without_bytecode(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Imports the submodules without leaving bytecode, for `_Reader`'s reason and for a clean repository."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        execute(module)
    finally:
        sys.dont_write_bytecode = before


def _import_failed(reference: KernelReference, error: Exception) -> KernelError:
    where = ""
    frame = error.__traceback__
    while frame is not None:
        if (
            not frame.tb_frame.f_code.co_filename.startswith("<frozen")
            and frame.tb_frame.f_code.co_filename != __file__
        ):
            where = f" (line {frame.tb_lineno} of {frame.tb_frame.f_code.co_filename!r})"
        frame = frame.tb_next
    return KernelError(
        f"Kernel {str(reference)!r}: importing it raised {type(error).__name__}: {error}{where}. Nothing was loaded."
    )
