"""`kernelgraft.json`: what a grafted model was saved with, beside its weights.

```json
{
  "kernelgraft": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0", "device": "cuda",
  "config": {"kernel": [{"replaces": "RMSNorm", "use": "owner/my-kernel:CustomRMSNorm", "version": 2}]},
  "kernels": [{"reference": "owner/my-kernel@v2:CustomRMSNorm", "digest": "5f1c..."}]
}
```

Loads that do not ask for it ignore it. `from_pretrained(folder, kernel_config="recorded")` loads with that config, and
refuses kernels of another digest. `config` has the tables of a TOML file; what of it only this process could load, a
class or another object, stands under `not_recorded`, and then the record cannot be loaded.

That a file names code is not the user's word for it. So a record never holds `trust_remote_code`, however the kernels
were loaded before it was written, and it is refused if somebody put that in. A record from the Hub may name kernels of
the Hub only, which come under the rules of the `kernels` library. One in a folder may name paths and installed modules
too, but code inside that folder only with trust. The user gives it beside the ask:
`kernel_config=("recorded", {"trust_remote_code": True})`, or a list of repositories.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kernelgraft.config import KernelConfig
from kernelgraft.config_file import key_of, read_tables, table_of, text_in
from kernelgraft.entry import Choice, Entry, use_label
from kernelgraft.errors import ConfigError
from kernelgraft.kernel import Kernel, is_repository, use_text
from kernelgraft.reference import KernelReference

if TYPE_CHECKING:
    from kernelgraft.graft import Graft
    from kernelgraft.plan import Plan

FILE = "kernelgraft.json"
FILES = (FILE,)

_WRITE = 'Write what you want instead: kernel_config=KernelConfig({"RMSNorm": "owner/repo:KernelName"}).'


# --- writing


def described(config: KernelConfig) -> dict[str, Any]:
    """A config as plain data with absolute paths, made when it is used: the working folder may change."""
    tables, missing = [], []
    for entry in config.entries:
        for choice in entry.choices:
            found = as_reference(choice)
            if found is None:
                missing.append({**key_of(entry), "use": use_label(choice.use)})
            else:
                tables.append(_table(entry, found))
    return {"config": {**config._changed_options(), "kernel": tables}, **({"not_recorded": missing} if missing else {})}


def as_reference(choice: Choice) -> Choice | None:
    """The choice with a reference for what it runs; `None` if none leads back to it."""
    use = choice.use
    if use is None or isinstance(use, KernelReference):
        return choice
    # A kernel that was loaded from somewhere has the digest of it.
    if not is_repository(use) and not (isinstance(use, Kernel) and use.digest):
        return None
    try:
        return replace(choice, use=KernelReference.parse(use_text(use)))
    except ConfigError:
        return None


def _table(entry: Entry, choice: Choice) -> dict[str, Any]:
    table = table_of(entry, choice, Path("/nowhere"))
    table.pop("trust_remote_code", None)
    return table


def record_of(graft: Graft | None, folder: str | Path) -> dict[str, Any] | None:
    """What is written beside the weights of a grafted model; `None` for one without a graft."""
    if graft is None or not graft.is_applied:
        return None
    from kernelgraft import __version__

    place = Path(folder).absolute()
    tables = [{**table, "use": _relative(table["use"], place)} for table in graft.asked["config"]["kernel"]]
    transformers = sys.modules.get("transformers")
    return {
        "kernelgraft": __version__,
        "torch": str(torch.__version__),
        **({} if transformers is None else {"transformers": transformers.__version__}),
        "device": graft._installed[0].device if graft._installed else graft.plan.device,
        **graft.asked,
        "config": {**graft.asked["config"], "kernel": tables},
        "kernels": [
            {"reference": _relative(kernel.reference, place), "name": kernel.name, "digest": kernel.digest}
            for kernel in _kernels_of(graft)
        ],
    }


def _kernels_of(graft: Graft) -> list[Kernel]:
    modes = [
        each
        for installed in graft._installed
        for key in installed.keys
        for each in (key.modes, *(of_function for _, of_function in key.functions))
    ]
    return list({kernel.reference: kernel for each in modes for _, _, kernel in each}.values())


def _relative(text: str, folder: Path) -> str:
    if not text.startswith(str(folder)):
        return text
    return text_in(KernelReference.parse(text), folder)


def write(folder: Path, record: Mapping[str, Any] | None) -> None:
    """Write a record into a folder, if there is one."""
    if record is not None:
        (folder / FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def put(folder: Path, record: Mapping[str, Any] | None) -> None:
    """Put a record into a folder that has its weights already, in the place of an old one; or remove that."""
    if record is None:
        (folder / FILE).unlink(missing_ok=True)
    elif folder.is_dir():
        new = folder / f".{FILE}.{os.getpid()}"
        try:
            new.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            os.replace(new, folder / FILE)
        finally:
            new.unlink(missing_ok=True)


# --- reading


@dataclass(frozen=True)
class Recorded:
    """A record that was read.

    Attributes:
        place: Where it was found.
        config: The config.
        device: The type of the device for which its kernels were chosen.
        digests: What was known of each kernel, by the text that names it.
    """

    place: str
    config: KernelConfig
    device: str
    digests: Mapping[str, str | None]

    def check(self, plan: Plan) -> None:
        """Refuse a plan whose kernels are others than those that the model was saved with.

        Raises:
            ConfigError: It names the kernels and digests.
        """
        kinds: tuple[Any, ...] = (*plan.kinds, *plan.functions)
        uses = [use for part in kinds for use in part.kernels]
        wrong = {}
        for use in uses:
            if use.reference not in self.digests:
                if plan.device == self.device:
                    wrong[use.reference] = "is not among the kernels that it was saved with"
            elif self.digests[use.reference] not in (None, use.digest):
                wrong[use.reference] = f"has digest {use.digest}, and was saved at {self.digests[use.reference]}"
        if wrong:
            raise ConfigError(
                f"{self.place} does not fit the kernels that are here: "
                f"{'; '.join(f'{reference} {why}' for reference, why in wrong.items())}. To accept them, pass a config "
                f"instead of 'recorded': kernel_config=KernelConfig({{...}}) with these references. To have the ones "
                f"that were saved, restore that version of the kernel, or name its revision."
            )


def asked(kernel_config: object) -> Mapping[str, Any] | None:
    """What was said beside an ask for the recorded config; `None` if it was not asked for.

    Raises:
        ConfigError: What was said means nothing.
    """
    if kernel_config == "recorded":
        return {}
    if not (isinstance(kernel_config, tuple) and len(kernel_config) == 2 and kernel_config[0] == "recorded"):
        return None
    said = kernel_config[1]
    if not isinstance(said, Mapping) or set(said) - {"trust_remote_code"}:
        raise ConfigError(
            f'{said!r} beside "recorded" means nothing. Write ("recorded", {{"trust_remote_code": True}}).'
        )
    return said


def read(place: str | os.PathLike[str] | None, said: Mapping[str, Any], **options: Any) -> Recorded:
    """The record of a checkpoint.

    Args:
        place: A folder, or the id of a repository on the Hub.
        said: What `asked` found.
        **options: Of `from_pretrained`, those that say where files lie (`revision`, `subfolder`, `cache_dir`, ...).

    Raises:
        ConfigError: There is none, or it does not say enough, or it may not say what it says.
    """
    path, from_hub = _found(place, options)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        tables, missing = record["config"], record.get("not_recorded", [])
        digests = {each["reference"]: each["digest"] for each in record["kernels"]}
        device = record["device"]
        trusting = [table for table in tables["kernel"] if "trust_remote_code" in table]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read as a record of kernels: {error!r}. {_WRITE}") from error
    if missing:
        raise ConfigError(
            f"{path} does not say how to load {', '.join(str(each.get('use')) for each in missing)}: the model was "
            f"saved with an object of that process, which no reference names. {_WRITE}"
        )
    if trusting:
        raise ConfigError(
            f"{path} asks for trust_remote_code, which a file cannot give. Remove it there, and give it yourself: "
            f'kernel_config=("recorded", {{"trust_remote_code": True}}).'
        )
    pairs, settings = read_tables(tables, path)
    trust = {} if "trust_remote_code" not in said else {"trust_remote_code": said["trust_remote_code"]}
    config = KernelConfig([(key, _allowed(value, path, from_hub, trust)) for key, value in pairs], **settings)
    return Recorded(str(path), config, device, {_absolute(text, path.parent): each for text, each in digests.items()})


def _found(place: str | os.PathLike[str] | None, options: Mapping[str, Any]) -> tuple[Path, bool]:
    folder = options.get("subfolder") or ""
    if place is None:
        raise ConfigError(f'kernel_config="recorded" needs a folder or a Hub id to read the record from. {_WRITE}')
    if Path(place).is_dir():
        path = Path(place, folder, FILE)
        if not path.is_file():
            raise ConfigError(
                f"{path.parent} has no {FILE}: the model in it was not saved with kernels by kernelgraft. {_WRITE}"
            )
        return path, False
    from huggingface_hub import hf_hub_download  # `import kernelgraft` needs torch alone

    names = ("revision", "cache_dir", "token", "local_files_only", "force_download")
    kept = {name: options[name] for name in names if options.get(name) is not None}
    try:
        return Path(hf_hub_download(str(place), FILE, subfolder=folder or None, **kept)), True
    except Exception as error:  # what a download may raise is anything; the cause says it
        raise ConfigError(
            f"{str(place)!r} is no folder, and its {FILE} cannot be had from the Hub: {error} {_WRITE}"
        ) from error


def _allowed(value: Any, path: Path, from_hub: bool, trust: Mapping[str, Any]) -> Any:
    """A value of the config under the trust that the user gave.

    Raises:
        ConfigError: It names code that a record from there may not name.
    """
    if isinstance(value, Mapping):
        return {key: _allowed(inner, path, from_hub, trust) for key, inner in value.items()}
    if not isinstance(value, KernelReference):
        return value
    inside = value.kind == "path" and value.path.resolve().is_relative_to(path.parent.resolve())
    if from_hub and value.kind != "hub":
        raise ConfigError(
            f"{path} comes from the Hub and names {str(value)!r}, which is no kernel of the Hub. Only those are taken "
            f"from there. {_WRITE}"
        )
    if inside and trust.get("trust_remote_code") is not True:
        raise ConfigError(
            f"{path} names {str(value)!r}, code that lies beside the weights. If you know it, give it your trust: "
            f'kernel_config=("recorded", {{"trust_remote_code": True}}).'
        )
    return KernelReference.parse(str(value), local=value.local, metadata={**value.metadata, **trust})


def _absolute(text: str, folder: Path) -> str:
    return use_text(KernelReference.parse(text).relative_to(folder)) if text.startswith("./") else text
