"""The files of a repository whose kernel begins with the original's own code, and the choice between both kinds."""

import json
import re
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kernelgraft.authoring.copying import Copy, imports_of
from kernelgraft.authoring.files import Files, guarded_imports, sorted_imports
from kernelgraft.authoring.pieces import indented, template
from kernelgraft.authoring.places import Place
from kernelgraft.errors import AuthoringError


def files_for(name: str, place: Place, model: nn.Module | None, *, triton: bool, merge: bool) -> "Files":
    """What to write for a place.

    Args:
        name: Of the repository or of the kernel.
        place: The modules that the kernel is for.
        model: The model that has them.
        triton: Whether Triton computes what there is a template for.
        merge: Whether gate and up of a gated MLP become one parameter.
    """
    if place.copied is None:
        return Files(name, place, triton, merge)
    return CopiedFiles(name, place, model)


class CopiedFiles(Files):
    """The files of a new repository whose kernel begins with the original's own code."""

    def __init__(self, name: str, place: Place, model: nn.Module | None) -> None:
        assert place.copied is not None
        self.copied, self.model = place.copied, model
        self.small = _small_config(model)
        if self.small is None:
            raise AuthoringError(
                f"{self.copied.cls.__name__} is none of the modules that `new` knows, and {type(model).__name__} is no "
                f"model of Transformers, so that no test of a copy of its code could be written. Write the forward "
                f"yourself, with the original's parameters as `self`: see docs/kernel-authors.md."
            )
        super().__init__(name, place, False, False)

    def _read_members(self) -> None:
        self.by_init, self.init, self.input = False, self.copied.init, self.copied.input
        self.namings, self.pieces = [], []

    def _code(self) -> str:
        forward = self.copied.forward
        plain, guarded = imports_of([forward, *([self.init] if self.init else [])])
        layout = ""
        if self.init is not None:
            names = indented([f'"{name}": "{name}",' for name in self._parameters])
            layout = template(
                "copied_layout.py",
                kernel=self.kernel,
                packing=names,
                init=self.init.indented(),
            )
        return template(
            "copied.py",
            title=self._title,
            kernel=self.kernel,
            original=self.copied.cls.__name__,
            original_module=forward.module,
            **sorted_imports(plain),
            guarded=guarded_imports(guarded),
            layout=layout,
            summary=self._summary,
            state="its layout" if self.init else "the original, with its own parameters",
            forward=_with_note(forward).indented(),
        )

    def _further(self) -> dict[str, str]:
        return {}

    @property
    def _parameters(self) -> list[str]:
        assert self.model is not None
        module = next(each for each in self.model.modules() if type(each) is self.copied.cls)
        return [name for name, _ in module.named_parameters()]

    def _tests(self, said: dict[str, str]) -> dict[str, str]:
        text = template("copied_test.py", **said, model=type(self.model).__name__)
        return {f"test_{self.package}.py": text, "config.json": json.dumps(self.small, indent=2) + "\n"}

    @property
    def _loaders(self) -> str:
        return (
            "The loader of Transformers itself takes it too, on an accelerator: `use_kernels=True` with its own "
            "`KernelConfig`."
        )


def _small_config(model: nn.Module | None) -> dict[str, Any] | None:
    """The config of a model of Transformers with fewer layers and tokens, where it can be built and run so."""
    config: Any = getattr(model, "config", None)
    build: Any = type(model)
    if config is None or not hasattr(config, "to_dict"):
        return None
    for smaller in ({"num_hidden_layers": 2, "vocab_size": 512}, {"num_hidden_layers": 2}, {}):
        said: dict[str, Any] = {**config.to_dict(), **{k: v for k, v in smaller.items() if hasattr(config, k)}}
        if "num_hidden_layers" in smaller and isinstance(said.get("layer_types"), list):
            said["layer_types"] = said["layer_types"][:2]
        if "vocab_size" in smaller:
            said |= {key: None for key, value in said.items() if key.endswith("_token_id") and isinstance(value, int)}
        try:
            with torch.device("meta"):
                build(type(config).from_dict(said))
        except Exception:  # whatever a model has against the smaller config
            continue
        return said
    return None


def _with_note(forward: Copy) -> Copy:
    """The forward with a note where the kernel goes."""
    match = re.search(r"\)(?:\s*->[^:]+)?:\n", forward.source)
    if match is None:
        return forward
    note = "    # As the original computes it: your kernel goes here. Sizes are read off tensors, never off a config.\n"
    return replace(forward, source=forward.source[: match.end()] + note + forward.source[match.end() :])
