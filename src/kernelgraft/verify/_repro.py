"""A fault in a folder: the modules that a kernel replaces, one input, and a script that shows the fault from them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernelgraft.errors import GraftError
from kernelgraft.graft import Graft, Installed, apply_blueprint
from kernelgraft.verify._calls import SiteCall
from kernelgraft.verify._kinds import Kind, kinds_of
from kernelgraft.verify._replica import Replica
from kernelgraft.verify._running import How, run
from kernelgraft.verify._site import Findings, SiteTrials
from kernelgraft.verify._stored import stored
from kernelgraft.verify._text import case_of
from kernelgraft.verify._verification import undisturbed
from kernelgraft.verify.report import Check

ABOUT, KERNELS = "repro.json", "kernels.toml"


@dataclass(frozen=True)
class Repro:
    """One site outside of its model, grafted, with the input that showed a fault.

    Attributes:
        folder: Where it lies.
        about: What `repro.json` says.
        graft: The graft of a module that holds the site's modules at their paths, and nothing else.
        call: The input.
        before: An input on which the kernel runs first, as it did when the fault was found; `None` if that is `call`.
    """

    folder: Path
    about: dict[str, Any]
    graft: Graft
    call: SiteCall
    before: SiteCall | None

    @property
    def dtype(self) -> torch.dtype | None:
        """What weights and inputs are cast to; `None` where they are tried as they are."""
        cast = self.about["cast"]
        return None if cast is None else getattr(torch, cast)

    def check(self) -> Check:
        """Run the kernel and the originals, and compare them as `Graft.verify` does."""
        kind, site = self._kind()
        passes, _ = kind.passes(self.about["gradients"])
        each = next((each for each in passes if each.training == (self.about["mode"] == "train")), None)
        nothing = Check(
            0, site.site.host, self.about["case"], self.about["mode"], self.about["dtype"], self.about["input"]
        )
        if each is None:
            return replace(nothing, skipped=f"no kernel runs in mode {self.about['mode']!r} here")
        trials = SiteTrials(0, site, self.about["seed"], Findings())
        with undisturbed(self.graft):
            found = list(trials.again(self.about["case"], self.dtype, self.call, self.before, each))
        return found[0] if found else nothing

    def run(self, *, kernel: bool) -> dict[str, torch.Tensor]:
        """Call the kernel, or the originals, once without gradients; the outputs by name."""
        _, site = self._kind()
        with undisturbed(self.graft):
            replica = Replica(site.modules, self.dtype)
            how = How(kernel=kernel, training=self.about["mode"] == "train")
            return run(replica, self.call.cast(self.dtype), how, {}, self.about["seed"]).outputs

    def said(self, check: Check) -> str:
        """What a check found, for a person."""
        verdict = "passes" if check.passed else "FAILS"
        given = f" ({check.input})" if check.input else ""
        lines = [
            f"{self.about['kernel']['name']} at {check.site}, {case_of(check)}{given}: {verdict}",
            *(f"  {fault}" for fault in check.faults),
            *(f"  {figure}" for figure in check.figures if str(figure) not in "\n".join(check.faults)),
        ]
        if check.skipped:
            lines.append(f"  not tried: {check.skipped}")
        then, now = self.about["kernel"]["digest"], about_kernel(self._kind()[1])["digest"]
        if then != now:
            lines.append(f"  the kernel's files are others than those that were tried: digest {now}, then {then}")
        return "\n".join(lines)

    def _kind(self) -> tuple[Kind, Installed]:
        kind = kinds_of(self.graft)[0]
        return kind, kind.sites[0]


def about_kernel(site: Installed) -> dict[str, str | None]:
    """Name, reference and digest of the kernel that runs at a site."""
    kernel = site.kernels[0]
    return {"name": kernel.name, "reference": kernel.reference, "digest": kernel.digest}


def read_repro(folder: str | Path, device: str | None = None) -> Repro:
    """Read what `write_repro` wrote: make the site's modules again, and graft them.

    Reading it runs what the folder holds, as running its script would.

    Args:
        folder: The folder.
        device: Where all tensors go; by default where each was.

    Raises:
        GraftError: The folder is no repro, or the classes of its modules cannot be imported here.
        KernelGraftError: The kernel cannot be had, or does not fit the modules any more.
    """
    place = Path(folder)
    try:
        about = json.loads((place / ABOUT).read_text(encoding="utf-8"))
    except OSError as error:
        raise GraftError(f"{str(place)!r} is no repro: {error}. Write one with write_repro.") from error
    try:
        structure = stored(place, device)
    except ImportError as error:
        files = ", ".join(f"{each['class']} was in {each['file']}" for each in about["classes"].values())
        raise GraftError(
            f"The modules of {str(place)!r} cannot be made again: {error}. {files}; put its folder on PYTHONPATH."
        ) from error
    root = _standing(structure["members"])
    return Repro(
        place, about, _grafted(root, structure["arguments"], place / KERNELS), structure["call"], structure["before"]
    )


def _standing(members: Mapping[str, nn.Module]) -> nn.Module:
    """A module that has nothing but these, at their paths."""
    root = nn.Module()
    parameters: dict[int, nn.Parameter] = {}
    for path, member in members.items():
        for module in member.modules():
            for name, tensor in module._parameters.items():
                if tensor is not None and not isinstance(tensor, nn.Parameter):
                    made = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
                    module._parameters[name] = parameters.setdefault(id(tensor), made)
        *parents, last = path.split(".")
        holder = root
        for step in parents:
            holder = holder._modules.setdefault(step, nn.Module())  # type: ignore[assignment]
        holder._modules[last] = member
    return root.eval()


def _grafted(root: nn.Module, arguments: Mapping[str, Any], kernels: Path) -> Graft:
    from kernelgraft.api import subject_of
    from kernelgraft.config import KernelConfig
    from kernelgraft.planner import make_blueprint

    subject = subject_of(root, live=True)
    subject.arguments = arguments.get
    return apply_blueprint(root, make_blueprint(subject, KernelConfig.from_file(kernels)))
