"""Writes a fault into a folder: finds the call of one site that shows it, and puts there what it is made of."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernelgraft.config_file import table_of
from kernelgraft.environment import environment
from kernelgraft.errors import GraftError, VerificationError
from kernelgraft.graft import Graft, Installed
from kernelgraft.recorded_config import as_reference
from kernelgraft.slot import KEY, GraftedModule
from kernelgraft.tree import shallow_tree
from kernelgraft.verify._calls import SiteCall
from kernelgraft.verify._cases import leading_dims
from kernelgraft.verify._kinds import Pass, kinds_of
from kernelgraft.verify._repro import ABOUT, KERNELS, Repro, about_kernel, read_repro
from kernelgraft.verify._site import Findings, SiteTrials
from kernelgraft.verify._stored import Store
from kernelgraft.verify._values import named
from kernelgraft.verify._verification import Options, Verification, undisturbed
from kernelgraft.verify.report import Check, Report, plain

SCRIPT = "repro.py"

_SCRIPT = '''\
"""{title}

{input}

In this folder lie the modules that the kernel replaces, with their weights under original names, and one input. Run
this file: it ends with 1 while the fault is there. {kernels} says which kernel runs, {about} what was found.
"""

import sys
from pathlib import Path

from kernelgraft.verify import read_repro

repro = read_repro(Path(__file__).parent)
# For a debugger: repro.run(kernel=True) and repro.run(kernel=False) call either once, and give the outputs by name.
check = repro.check()
print(repro.said(check))
sys.exit(0 if check.passed else 1)
'''


def write_repro(
    graft: Graft, report: Report, folder: str | Path, inputs: Any = None, *, site: str | None = None
) -> Repro:
    """Write what is needed to see a fault without the model.

    The folder gets the input (`inputs.safetensors`), the site's weights in original names (`weights.safetensors`), what
    else the modules and the call are made of (`structure.pkl`), the kernel's reference (`kernels.toml`), what was found
    (`repro.json`) and a script (`repro.py`), which ends with 1 while the fault is there.

    Args:
        graft: The graft.
        report: What `Graft.verify` found of it.
        folder: Where to write: a new folder, an empty one, or one of an older repro.
        inputs: The inputs that `verify` got.
        site: Host path of the site; by default that of the first fault. One in which the report has no fault is tried
            again in full.

    Returns:
        The repro as it was read back from the folder; `check()` it to see whether the site shows its fault alone.

    Raises:
        VerificationError: No site has a fault, or none that a call of the site shows.
        GraftError: The kernel is an object of this process, the modules cannot be written, or the folder has other
            files.
    """
    place = check_folder(folder)
    shown = [check for check in report.checks if check.kind >= 0 and check.faults and check.input]
    check = next((check for check in shown if site in (None, check.site)), None)
    host = site if site is not None else check.site if check is not None else None
    if host is None:
        raise VerificationError(
            "There is no fault of a site to write: "
            + ("no site has one." if report.passed else str(report.failures[0])),
            report,
        )
    gradients = all(kind.gradients != "not asked for" for kind in report.kinds)
    verification = Verification(graft, inputs, Options(False, False, gradients, None, report.seed))
    with undisturbed(graft):
        fault = _Finder(verification, host).found(check)
        if fault is None:
            raise VerificationError(f"{host} passes alone, so there is no fault to write for it.", report)
        _write(place, graft, fault, gradients, report.seed)
    return read_repro(place)


def check_folder(folder: str | Path) -> Path:
    """The place of a repro.

    Raises:
        GraftError: Something else is there.
    """
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise GraftError(f"{str(place)!r} is a file, and a repro is a folder. Name another one.")
    if place.exists() and any(place.iterdir()) and not (place / ABOUT).exists():
        raise GraftError(f"The folder {str(place)!r} has other files in it. Name a new one for the repro.")
    return place


@dataclass(frozen=True)
class _Fault:
    site: Installed
    check: Check
    cast: torch.dtype | None
    call: SiteCall
    before: SiteCall | None


class _Finder:
    """Finds the call that shows a fault of one site."""

    def __init__(self, verification: Verification, host: str) -> None:
        self.verification = verification
        kinds = [(kind, each) for kind in kinds_of(verification.graft) for each in kind.sites if each.site.host == host]
        if not kinds:
            raise GraftError(f"{host!r} is no site of this graft. Write a path of graft.calls.sites.")
        self.kind, self.site = kinds[0]
        self.trials = SiteTrials(0, self.site, verification.options.seed, Findings())

    def found(self, known: Check | None) -> _Fault | None:
        captured = next(iter(self.verification.captured([self.site])), None)
        passes, _ = self.kind.passes(self.verification.options.gradients)
        if captured is None or not passes:
            return None
        _, call = captured
        odd = self.verification.odd_calls(self.site, Findings()) if leading_dims(call) is None else {}
        floating = [tensor.dtype for tensor in call.inputs().values() if tensor.is_floating_point()]
        usual = str(floating[0]).removeprefix("torch.") if floating else ""
        for each in passes:
            if known is not None and each.training == (known.mode == "train"):
                cast = None if known.dtype in ("", usual) else getattr(torch, known.dtype)
                found = self._again(known.case, cast, call, odd, each)
                if found is not None:
                    return found
        for each in passes:
            for check in self.trials.all(call, odd, each):
                if check.faults:
                    return self._again(check.case, None, call, odd, each)
        for dtype in self.verification.other_dtypes(self.kind, call):
            for check in self.trials.in_dtype(dtype, call, odd, passes[0]):
                if check.faults:
                    return self._again(check.case, dtype, call, odd, passes[0])
        return None

    def _again(
        self, case: str, cast: torch.dtype | None, call: SiteCall, odd: Mapping[str, SiteCall], each: Pass
    ) -> _Fault | None:
        """The fault as it shows on what will be written: the case's own input, and one call before it."""
        given = self.trials.input_of(case, cast, call, odd, each)
        if given is None:
            return None
        before = None if given is call else call
        for check in self.trials.again(case, cast, given, before, each):
            if check.faults:
                return _Fault(self.site, check, cast, given, before)
        return None


def _write(place: Path, graft: Graft, fault: _Fault, gradients: bool, seed: int) -> None:
    import tomli_w

    members = {path: untouched(module) for path, module in fault.site.modules.items()}
    tables = _tables(fault.site, place)
    names = _names(members, {"inputs": fault.call, "before": fault.before})
    store = Store({identity: where for identity, (where, _) in names.items()})
    structure = {"members": members, "arguments": _arguments(graft, fault.site), "call": fault.call}
    structure["before"] = fault.before
    pickled = store.pickled(structure)
    about = {
        "model": type(graft.model).__name__,
        "site": fault.site.site.host,
        "kernel": about_kernel(fault.site),
        "classes": {path: _about_class(type(module)) for path, module in members.items()},
        "cast": None if fault.cast is None else str(fault.cast).removeprefix("torch."),
        **{name: getattr(fault.check, name) for name in ("case", "mode", "dtype", "input")},
        "faults": list(fault.check.faults),
        "figures": [plain(asdict(figure)) for figure in fault.check.figures],
        "gradients": gradients,
        "seed": seed,
        "environment": environment(),
    }
    place.mkdir(parents=True, exist_ok=True)
    store.write(place, pickled)
    (place / KERNELS).write_text(tomli_w.dumps({"kernel": tables}), encoding="utf-8")
    (place / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    title = (
        f"{about['kernel']['name']} at {about['site']} of {about['model']}: {fault.check.case}, {fault.check.dtype}."
    )
    script = _SCRIPT.format(title=title, input=fault.check.input, kernels=KERNELS, about=ABOUT)
    (place / SCRIPT).write_text(script, encoding="utf-8")


def untouched(module: nn.Module) -> nn.Module:
    """The original of a module of a graft, on views of the packed parameters, and what is inside it."""
    if isinstance(module, GraftedModule):
        original: nn.Module = vars(module)[KEY].tree()
        return original
    copy = shallow_tree(module)
    slot = vars(copy).pop(KEY, None)
    if slot is not None:
        copy.__class__ = type(module)._kernelgraft_maker.original  # type: ignore[attr-defined]
    for name, child in module._modules.items():
        copy._modules[name] = None if child is None else untouched(child)
    return copy


def _names(
    members: Mapping[str, nn.Module], calls: Mapping[str, SiteCall | None]
) -> dict[int, tuple[tuple[str, str], torch.Tensor]]:
    """File and name of each tensor, by identity; and the tensor, which keeps its identity so."""
    found: dict[int, tuple[tuple[str, str], torch.Tensor]] = {}
    for file, call in calls.items():
        for name, value in call.objects().items() if call is not None else ():
            for inner, tensor in named(value, name).items():
                found.setdefault(id(tensor), ((file, inner), tensor))
    for path, member in members.items():
        for inner, module in member.named_modules(prefix=path, remove_duplicate=False):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    found.setdefault(id(tensor), (("weights", f"{inner}.{name}"), tensor))
    return found


def _tables(site: Installed, folder: Path) -> list[dict[str, Any]]:
    """The entries that ask for the site's kernels, with its own paths in the place of patterns."""
    tables = []
    for asked in site.asked:
        entry = asked.entry
        if not isinstance(entry.target, str):
            names = [name for name, _ in entry.target]
            entry = replace(entry, target=tuple(zip(names, site.modules, strict=True)))
        for choice in entry.choices:
            found = as_reference(choice)
            if found is None:
                raise GraftError(
                    f"A repro of {entry.label} cannot be written: its kernel is an object of this process, which no "
                    f"other can load. Name it by a reference, such as './file.py:KernelName'."
                )
            tables.append(table_of(entry, found, folder.absolute()))
    return tables


def _arguments(graft: Graft, site: Installed) -> dict[str, Any]:
    """What the originals' `__init__` got, for layouts that want the same."""
    from kernelgraft.api import subject_of

    subject = subject_of(graft.model, live=True)
    return {path: found for path in site.modules if (found := subject.arguments(path)) is not None}


def _about_class(cls: type) -> dict[str, str | None]:
    module = sys.modules.get(cls.__module__)
    return {"class": f"{cls.__module__}.{cls.__qualname__}", "file": getattr(module, "__file__", None)}
