"""Writes a kernel repository that works at once: kernel, layout, rules, plain-torch reference, tests, card."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kernelgraft.authoring.copied import files_for
from kernelgraft.authoring.export import export
from kernelgraft.authoring.members import GatedMLP, Member, Norm
from kernelgraft.authoring.pieces import in_triton
from kernelgraft.authoring.places import Place, fusion_place, single_place
from kernelgraft.errors import AuthoringError

_WITHOUT_MODEL: dict[str, Member] = {"RMSNorm": Norm(), "MLP": GatedMLP()}
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:[-_][A-Za-z0-9]+)*")


@dataclass(frozen=True)
class NewRepository:
    """A repository that was written.

    Attributes:
        folder: Where it is.
        kernel: The kernel's name in `layers`.
        reference: The text that names the kernel as it lies there.
        replaces: What it takes the place of: class names, or `class at path` for a fusion.
        files: Its files, relative to the folder.
    """

    folder: str
    kernel: str
    reference: str
    replaces: tuple[str, ...]
    files: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def new(
    name: str,
    *,
    replaces: str | None = None,
    fuses: Sequence[str] | None = None,
    model: nn.Module | None = None,
    folder: str | Path = ".",
    at: Sequence[str] = (),
    triton: bool = False,
    merge: bool = True,
) -> NewRepository:
    """Write a kernel repository in the Hub's layout, which works untouched.

    Args:
        name: Of the repository (`my-kernel`) or of the kernel (`MyKernel`); each gives the other.
        replaces: The class of single modules, as in a `KernelConfig`.
        fuses: The classes of several modules in the order in which data flows through them.
        model: The model that has them; only names, shapes and code are read, so it may be on the meta device. It can be
            left out for `replaces="RMSNorm"` and `replaces="MLP"`, which are then those of Llama.
        folder: The folder in which the repository's is made.
        at: For a fusion, what the parent calls the modules, where more than one choice would do.
        triton: Start with a Triton kernel; on a CPU torch computes the same.
        merge: Pack the gate and up projections of a gated MLP as one parameter.

    Raises:
        AuthoringError: The modules are not there, compute something that no template is for, or the folder is in use.
    """
    if not _NAME.fullmatch(name) or len(name) < 2:
        raise AuthoringError(
            f"{name!r} cannot be a name. Write one of a repository (my-kernel) or of a kernel (MyKernel), of "
            "letters, digits and dashes, two of them at least."
        )
    if (replaces is None) == (fuses is None):
        raise AuthoringError("Say what the kernel is for: --replaces RMSNorm, or --fuses RMSNorm,MLP with a model.")
    place = _place(replaces, fuses, model, at)
    if triton and not any(map(in_triton, place.members)):
        raise AuthoringError(
            "There is a Triton template for an RMS norm and for a gated MLP with SiLU, and none of "
            f"{', '.join(place.names)} is one. Leave --triton out, and write the Triton kernel into the forward."
        )
    plan = files_for(name, place, model, triton=triton, merge=merge)
    target = Path(folder) / plan.repository
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise AuthoringError(f"{str(target)!r} is there already. Choose another name, or remove it.")
    try:
        for path, text in plan.files().items():
            file = target / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        export(target)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    written = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    reference = f"{target / 'torch-ext' / plan.package}:{plan.kernel}"
    where = tuple(f"{each} at {place.patterns[i]}" if place.patterns else each for i, each in enumerate(place.names))
    return NewRepository(str(target), plan.kernel, reference, where, tuple(written))


def _place(replaces: str | None, fuses: Sequence[str] | None, model: nn.Module | None, at: Sequence[str]) -> Place:
    if fuses is not None:
        if len(fuses) < 2:
            raise AuthoringError(f"--fuses takes two classes or more, got {', '.join(fuses) or 'none'}: RMSNorm,MLP.")
        if model is None:
            raise AuthoringError(
                "A fusion needs a model, which says where its modules are and what they are: --model DIR."
            )
        return fusion_place(model, fuses, at)
    assert replaces is not None
    if at:
        raise AuthoringError("--at chooses among the places of a fusion; --replaces means every module of the class.")
    if model is not None:
        return single_place(model, replaces)
    if replaces not in _WITHOUT_MODEL:
        raise AuthoringError(
            f"Without a model only {' and '.join(_WITHOUT_MODEL)} are known. Give one that has a {replaces}: "
            f"--model DIR."
        )
    member = _WITHOUT_MODEL[replaces]
    return Place((replaces,), (), ("",), (member,), None if isinstance(member, Norm) else _llama_mlp())


def _llama_mlp() -> type[nn.Module] | None:
    """How Llama builds its MLP, where Transformers is there to say so."""
    try:
        from transformers.models.llama.modeling_llama import LlamaMLP
    except ImportError:
        return None
    found: type[nn.Module] = LlamaMLP
    return found
