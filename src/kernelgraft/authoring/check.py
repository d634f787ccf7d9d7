"""Says all that is wrong with a kernel repository at once; each finding has its fix.

What can be read off the code stands in `_code.py`, what a model is needed for in `_in_model.py`. Here is what a
repository's classes and metadata say.
"""

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from kernelgraft.authoring import _code, _in_model
from kernelgraft.authoring.findings import CheckReport, Finding
from kernelgraft.authoring.repository import Repository, open_repository
from kernelgraft.conversion.rules import read_rules
from kernelgraft.errors import KernelGraftError
from kernelgraft.kernel import Kernel, kernels_in, state_of
from kernelgraft.reference import KernelReference
from kernelgraft.source import Source, load_source

__all__ = ["CheckReport", "Finding", "check"]

_FLAGS_OF_KERNELS = {"has_backward", "can_torch_compile"}
_CONFIG = "kernels.toml"


def check(folder: str | Path, model: nn.Module | None = None, config: Any = None) -> CheckReport:
    """Look at a kernel repository.

    Args:
        folder: The repository, as `kernelgraft new` writes one, as kernel-builder has them, or a plain package.
        model: A model that has the modules which the kernels replace; it may be on the meta device, if it was built
            inside `kernelgraft.recorded()`. Without it signatures, rules, and what happens in a call are not checked.
        config: The `KernelConfig` that says what the kernels replace; by default the repository's `kernels.toml`.

    Raises:
        AuthoringError: The folder holds no code of a repository.
        ConfigError: The config cannot be read.
    """
    repository = open_repository(folder)
    findings = [*_code.check_code(repository), *check_metadata(repository)]
    not_checked: list[str] = []
    kernels: list[type] = []
    source, failed = _load(repository)
    findings += failed
    if source is not None:
        findings += check_layers(source)
        kernels = [each for each in map(_class_in(source), _names(source)) if each is not None]
        for cls in kernels:
            findings += [*check_naming(cls, source), *check_state(cls, source), *check_rules_are_written(cls, source)]
        findings += check_aliases(source)
    if model is None:
        not_checked.append("signatures, coverage of the rules, torch.compile, fake tensors, backward: give a model")
    elif kernels:
        if config is None and (repository.folder / _CONFIG).is_file():
            config = repository.folder / _CONFIG
        if config is None:
            not_checked.append(f"anything in the model: no {_CONFIG} says what the kernels replace in it")
        else:
            found, left = _in_model.check_in_model(repository, model, config)
            findings += found
            not_checked += left
    unique = sorted(dict.fromkeys(findings), key=lambda each: (each.severity, each.rule))
    return CheckReport(
        str(repository.folder), tuple(each.__name__ for each in kernels), tuple(unique), tuple(not_checked)
    )


# --- its classes


def check_layers(source: Source) -> Iterator[Finding]:
    """A repository lists its kernels in `layers`."""
    where = str(source.module.__file__)
    if not hasattr(source.module, "layers"):
        yield Finding(
            "layers",
            "there is no `layers`, where a repository lists its kernels",
            where,
            "write `from . import layers` into __init__.py, and `from .kernel import KernelName` into layers.py",
        )
    elif not kernels_in(source.module.layers):
        yield Finding("layers", "`layers` lists no kernel", where, "import the kernels' classes in layers.py")


def check_aliases(source: Source) -> Iterator[Finding]:
    """What `layers` calls a kernel is its class's name."""
    for name in _names(source):
        cls = getattr(source.module.layers, name)
        if isinstance(cls, type) and cls.__name__ != name:
            yield Finding(
                "naming",
                f"`layers` calls it {name!r}, and the class {cls.__name__!r}, after which its layout is looked for",
                _place(cls),
                f"call the class {name!r} and its layout '{name}Layout', or list it as {cls.__name__!r}",
                "warning",
            )


def check_naming(cls: type, source: Source) -> Iterator[Finding]:
    """The layout of `Name` is `NameLayout`, in the same module; every layout has its kernel."""
    own = sys.modules[cls.__module__]
    name = f"{cls.__name__}Layout"
    elsewhere = [
        each for each in _modules(source) if name in vars(each) and vars(each)[name].__module__ != cls.__module__
    ]
    if not hasattr(own, name) and elsewhere:
        yield Finding(
            "naming",
            f"{name} is in {elsewhere[0].__name__!r}, and is looked for in the module that defines {cls.__name__}",
            _place(cls),
            f"put {name} beside {cls.__name__}, or import it there",
        )
    for other, value in vars(own).items():
        is_layout = isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == cls.__module__
        if is_layout and other.endswith("Layout") and not hasattr(own, other.removesuffix("Layout")):
            yield Finding(
                "naming",
                f"{other} is the layout of no kernel: there is no {other.removesuffix('Layout')!r} in its module",
                _place(value),
                f"call the kernel {other.removesuffix('Layout')!r}, or the layout '{cls.__name__}Layout'",
            )


def check_state(cls: type, source: Source) -> Iterator[Finding]:
    """A kernel's class has a forward and flags: its parameters and constants are its layout's."""
    del source
    forward = getattr(cls, "forward", None)
    if not callable(forward) or forward is nn.Module.forward:
        yield Finding("forward", f"{cls.__name__} has no forward", _place(cls), "write `def forward(self, ...)`")
        return
    state = state_of(cls)
    for each in state:
        yield Finding(
            "state",
            f"{cls.__name__} carries state: {each}",
            _place(cls),
            f"put parameters and attributes into {cls.__name__}Layout, which the forward gets as `self`; constants "
            f"into the module",
        )
    if not state:
        try:
            Kernel(cls)
        except KernelGraftError as error:
            yield Finding("forward", str(error), _place(cls), "see the message")
    further = sorted(set(dir(cls)) - set(dir(nn.Module)) - _FLAGS_OF_KERNELS)
    further = [name for name in further if not any(said.startswith(f"{name} =") for said in state)]
    if further:
        yield Finding(
            "state",
            f"{cls.__name__} has {', '.join(further)} beside its forward, which the kernels library and Transformers' "
            f"own loader refuse",
            _place(cls),
            "make helpers functions of the module; `supports` may stand in the layout",
            "warning",
        )


def check_rules_are_written(cls: type, source: Source) -> Iterator[Finding]:
    """`packing` or `conversion_mapping` can be read."""
    del source
    layout = getattr(sys.modules[cls.__module__], f"{cls.__name__}Layout", None)
    if not isinstance(layout, type):
        return
    try:
        read_rules(layout)
    except KernelGraftError as error:
        fix = 'write {"packed name": "original name"}, see "Rules" in docs/kernel-authors.md'
        yield Finding("rules", str(error), _place(layout), fix)


def _load(repository: Repository) -> tuple[Source | None, list[Finding]]:
    try:
        return load_source(KernelReference(str(repository.package), "layers", local=True)), []
    except KernelGraftError as error:
        fix = "correct the code there: a repository must import with torch alone"
        return None, [Finding("import", str(error), str(repository.package), fix)]


def _names(source: Source) -> list[str]:
    layers = getattr(source.module, "layers", None)
    return [] if layers is None else kernels_in(layers)


def _class_in(source: Source) -> Any:
    def found(name: str) -> type | None:
        value = getattr(source.module.layers, name)
        return value if isinstance(value, type) else None

    return found


def _modules(source: Source) -> list[Any]:
    name = source.module.__name__
    return [module for key, module in list(sys.modules.items()) if key == name or key.startswith(f"{name}.")]


def _place(cls: type) -> str:
    try:
        return f"{inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]}"
    except (OSError, TypeError):
        return f"{cls.__module__}.{cls.__qualname__}"


# --- what it says of itself


def check_metadata(repository: Repository) -> Iterator[Finding]:
    """Each build has a metadata.json that the `kernels` library takes, and is built of the code that is there."""
    builds = repository.builds
    if repository.compiled():
        return  # kernel-builder writes these builds, and checks them
    if not builds:
        yield Finding(
            "metadata.json",
            "there is no build, and a build is what the kernels library loads",
            str(repository.folder / "build"),
            f"run `kernelgraft export {repository.folder}`",
            "warning",
        )
    ids: dict[str, Path] = {}
    for build in builds:
        yield from _check_build(repository, build, ids)


def _check_build(repository: Repository, build: Path, ids: dict[str, Path]) -> Iterator[Finding]:
    from kernels._rust import Digest, DigestValidationError, Metadata
    from kernels.variants import parse_variant

    file = build / "metadata.json"
    export = f"run `kernelgraft export {repository.folder}`"
    try:
        parse_variant(build.name)
    except ValueError as error:
        names = "torch-cpu, torch-cuda or torch-universal"
        yield Finding("metadata.json", f"{build.name!r} is no variant: {error}", str(build), f"call it {names}")
    if not file.is_file():
        yield Finding("metadata.json", "it is missing", str(file), export)
        return
    try:
        metadata = Metadata.from_bytes(file.read_bytes())
    except ValueError as error:
        yield Finding("metadata.json", str(error).strip(), str(file), f"correct build.toml and {export}")
        return
    for depends in sorted(set(metadata.python_depends) - set(_code.known_dependencies())):
        known = ", ".join(sorted(_code.known_dependencies()))
        yield Finding(
            "metadata.json",
            f"python-depends names {depends!r}, which the Hub does not allow",
            str(file),
            f"leave it out; known are {known}",
        )
    if metadata.id in ids:
        yield Finding(
            "metadata.json",
            f"the id {metadata.id!r} is that of {ids[metadata.id]} too, and two modules cannot share a name",
            str(file),
            export,
        )
    ids.setdefault(metadata.id, build)
    if metadata.digest is not None:
        try:
            metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, build))
        except DigestValidationError as error:
            said = "; ".join(map(str, error.violations))
            yield Finding("metadata.json", f"its digests are not those of the files: {said}", str(file), export)
            return
    if not repository.in_build and _content(build) != _content(repository.package):
        yield Finding(
            "metadata.json",
            f"{build.name} was built of other code than {repository.package.name!r} has now",
            str(build),
            export,
            "warning",
        )
    if "name" in repository.general and json.loads(file.read_text())["name"] != repository.name:
        yield Finding("metadata.json", f"build.toml says {repository.name!r}, it says another name", str(file), export)


def _content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*.py")
        if not {"build", "tests"} & set(path.relative_to(folder).parts)
    }
