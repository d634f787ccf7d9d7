"""What a graft must not touch, each with the message that says what to do instead."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from kernelgraft.contents import Contents, joined
from kernelgraft.errors import PlanError
from kernelgraft.slot import KEY

_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_RECORDERS = "transformers.utils.output_capturing"
_QUANTIZERS = (
    "bitsandbytes.",
    "torchao.",
    "hqq.",
    "gptqmodel.",
    "awq.",
    "auto_gptq.",
    "quanto.",
    "compressed_tensors.",
    "transformers.integrations.",
)
_PLAIN_TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)


def check_members(paths: Sequence[str], members: Sequence[Contents], *, live: bool) -> None:
    """Refuse members that a kernel cannot take over as they are.

    Args:
        paths: The members' paths.
        members: The modules and what is in them.
        live: Whether they hold values; on a skeleton all parameters are on the meta device.

    Raises:
        PlanError: The first thing that stands in the way, with its path.
    """
    for path, member in zip(paths, members, strict=True):
        for name, module in member.modules:
            inner_path = joined(path, name)
            _check_module(inner_path, module)
            for registry in (module._parameters, module._buffers):
                for last, tensor in registry.items():
                    if tensor is not None:
                        _check_tensor(inner_path, last, tensor, live=live)


def check_hooks(paths: Sequence[str], members: Sequence[Contents]) -> None:
    """Refuse hooks that would see something else, or nothing any more, once a layout stands there.

    The hooks of a module that is replaced alone go on running. Those by which Transformers records outputs do nothing
    unless they are asked, which `check_recorded_outputs` looks at.

    Raises:
        PlanError: A member of a fusion, or a module inside a member, has forward or backward hooks.
    """
    for path, member in zip(paths, members, strict=True):
        for inner, module in member.modules:
            if module is member.module and len(members) == 1:
                continue
            own = vars(module)
            hooks = [hook for name in _FORWARD_HOOKS if own.get(name) for hook in own[name].values()]
            if any(getattr(hook, "__module__", None) != _RECORDERS for hook in hooks):
                raise PlanError(
                    f"{joined(path, inner)!r} has forward or backward hooks, which would not see what they expect: a "
                    f"kernel takes its place. Remove the hooks before grafting, and add them to the grafted model."
                )


def _check_module(path: str, module: nn.Module) -> None:
    cls, own = type(module), vars(module)
    if KEY in own:
        raise PlanError(f"{path!r} is grafted already. Remove that graft first: graft_of(model).remove().")
    if isinstance(module, torch.jit.ScriptModule):
        raise PlanError(f"{path!r} is a compiled TorchScript module, whose forward is fixed. Graft before scripting.")
    forward, hook = own.get("forward"), own.get("_hf_hook")
    # Accelerate leaves the module's own forward there when it takes a hook off.
    if forward is not None and "_hf_hook" not in own and getattr(forward, "__func__", None) is not cls.forward:
        raise PlanError(
            f"{path!r} has a forward of its own on the instance ({forward!r}), which a kernel would "
            f"replace. Undo what put it there (kernelize, a tensor-parallel plan, a patch) before grafting."
        )
    if hook is not None and _is_offloaded(hook):
        raise PlanError(
            f"{path!r} is offloaded: accelerate brings its weights for each call. Graft before offloading, and offload "
            f"inside `with graft.packed_names():`."
        )
    if "parametrizations" in module._modules and parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        raise PlanError(
            f"{path!r} is parametrized ({names}): its weights are computed. Call "
            f"torch.nn.utils.parametrize.remove_parametrizations on it first, or leave it out of the config."
        )
    if cls.__module__.startswith("peft."):
        raise PlanError(
            f"{path!r} is adapted ({cls.__name__} of peft). Merge the adapter first (merge_and_unload), or graft "
            f"first and adapt what no kernel takes over."
        )
    if cls.__module__.startswith(_QUANTIZERS):
        raise PlanError(
            f"{path!r} is quantized ({cls.__module__}.{cls.__name__}), and a kernel's layout packs plain weights. "
            f"Load the model unquantized, or leave this module out of the config."
        )


def _is_offloaded(hook: Any) -> bool:
    return any(getattr(each, "offload", False) for each in getattr(hook, "hooks", (hook,)))


def _check_tensor(path: str, name: str, tensor: torch.Tensor, *, live: bool) -> None:
    if hasattr(tensor, "device_mesh"):
        raise PlanError(
            f"{path}.{name} is a DTensor: the model is sharded already. Graft before the model is distributed; grafts "
            f"of sharded modules are not supported yet."
        )
    if live and type(tensor) not in _PLAIN_TENSORS:
        raise PlanError(
            f"{path}.{name} is a {type(tensor).__name__}, not a plain tensor (quantized?). A kernel's layout packs "
            f"plain weights: load the model unquantized, or leave this module out of the config."
        )
    if isinstance(tensor, nn.Parameter) and not (tensor.is_floating_point() or tensor.is_complex()):
        raise PlanError(
            f"{path}.{name} has dtype {tensor.dtype}: a quantized weight. A kernel's layout packs plain weights: load "
            f"the model unquantized, or leave this module out of the config."
        )
    if live and tensor.is_meta:
        raise PlanError(
            f"{path}.{name} has no values: it is on the meta device (offloaded, or not loaded yet). Graft before "
            f"offloading, or load with kernelgraft.from_pretrained."
        )


def check_sources_agree(
    site: str,
    packed: str,
    sources: Mapping[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype],
    devices: Mapping[str, Any],
) -> None:
    """Refuse a packed parameter whose sources differ in dtype, device or `requires_grad`.

    Args:
        site: The site's host path, for the message.
        packed: The packed parameter's name.
        sources: Its sources by their names in the model.
        dtypes: The dtype that each source has, or will be loaded in.
        devices: Where each source is, or will be loaded to.

    Raises:
        PlanError: They disagree.
    """
    found: tuple[tuple[str, list[Any]], ...] = (
        ("dtype", [dtypes[name] for name in sources]),
        ("requires_grad", [tensor.requires_grad for tensor in sources.values()]),
        ("device", [devices[name] for name in sources]),
    )
    for what, values in found:
        if len(set(values)) > 1:
            listed = ", ".join(f"{name}: {value}" for name, value in zip(sources, values, strict=True))
            raise PlanError(
                f"{site}.{packed} would be packed from parameters that differ in {what} ({listed}). Make them agree, "
                f"or leave this site out of the config."
            )


def check_one_device(site: str, devices: Mapping[str, Any]) -> None:
    """Refuse a site whose parameters a device map puts on several devices.

    Raises:
        PlanError: They are on more than one device.
    """
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name}: {device}" for name, device in devices.items())
        raise PlanError(
            f"The device map cuts the site at {site!r} ({listed}). Put its modules on one device, or leave it out of "
            f"the config."
        )


def tie_groups(tied: Mapping[str, str]) -> dict[str, set[str]]:
    """All names that will be tied to each name once the checkpoint is loaded, itself included.

    Args:
        tied: Target to source.
    """
    groups: dict[str, set[str]] = {}
    for target, source in tied.items():
        groups.setdefault(source, {source}).add(target)
        groups[target] = groups[source]
    return groups


def check_shared(
    site: str,
    moved: Mapping[str, torch.Tensor],
    users: Mapping[int, Sequence[str]],
    ties: Mapping[str, set[str]],
) -> None:
    """Refuse to merge or transpose a parameter that stands in another place too.

    Args:
        site: The site's host path.
        moved: The parameters that are not packed whole (merged, transposed or cut), by their names in the model.
        users: For each parameter's id, all its names in the model.
        ties: What `tie_groups` gives.

    Raises:
        PlanError: One of `moved` is shared.
    """
    for name, tensor in moved.items():
        shared = {*users.get(id(tensor), ()), *ties.get(name, ())} - {name}
        if shared:
            raise PlanError(
                f"{name} is shared with {', '.join(sorted(shared))} (tied weights), and the kernel at {site!r} would "
                f"repack it, which would cut the tie. Leave this module out of the config, or untie the weights."
            )


@dataclass(frozen=True)
class Recorder:
    """One place from which a model takes an optional output that its config asks for.

    Attributes:
        key: The output's name.
        switch: The attribute of the config that switches it on.
        spec: A class, or an object that says more.
    """

    key: str
    switch: str
    spec: Any


def recorders_of(modules: Iterable[nn.Module]) -> list[Recorder]:
    """What the configs of a model and of the models in it ask to record.

    Models of Transformers name, in `_can_record_outputs`, the class from which each optional output is taken; the
    config's `output_<name>` switches it on.
    """
    found = []
    name = "_can_record_outputs"
    # Asked of a module that has none, it would go through torch's own search and an error, for each of thousands.
    for inner in [each for each in modules if name in vars(each) or hasattr(type(each), name)]:
        config, recorders = getattr(inner, "config", None), getattr(inner, name)
        if config is None or not recorders:
            continue
        for key, specs in recorders.items():
            switch = next((each for each in _switches(key) if getattr(config, each, False)), None)
            if switch is not None:
                found += [Recorder(key, switch, spec) for spec in (specs if isinstance(specs, list) else [specs])]
    return found


def check_recorded_outputs(recorders: Sequence[Recorder], absorbed: Mapping[str, nn.Module], site: str) -> None:
    """Refuse to absorb a module whose output the model's config asks to record.

    Args:
        recorders: What `recorders_of` gives for the model.
        absorbed: The modules that a kernel takes over, by path.
        site: The site's host path, for the message.

    Raises:
        PlanError: An absorbed module is one of which an output is recorded.
    """
    for each in recorders:
        for path, module in absorbed.items():
            if _records(each.spec, path, module):
                raise PlanError(
                    f"The config asks for {each.key!r}, which {path!r} ({type(module).__name__}) gives, and the "
                    f"kernel at {site!r} takes that module over, so nothing would give it. Switch "
                    f"{each.switch} off in the config, or leave this site out."
                )


def _switches(key: str) -> tuple[str, ...]:
    """The attributes of a config that ask for an output; those for attentions ask for all kinds of them."""
    return (f"output_{key}", "output_attentions") if key.endswith("attentions") else (f"output_{key}",)


def _records(spec: Any, path: str, module: nn.Module) -> bool:
    """Whether a recorder takes an output from a module: by its class or the end of its path, and a part of its path."""
    target = getattr(spec, "target_class", spec)
    ending = spec if isinstance(spec, str) else getattr(spec, "class_name", None)
    within = getattr(spec, "layer_name", None)
    fits = isinstance(target, type) and isinstance(module, target)
    fits = fits or (ending is not None and f".{path}".endswith(ending))
    return fits and (within is None or f".{within.strip('.')}." in f".{path}.")
