"""One site put into a model, and taken out again.

Packed parameters are filled here, straight from the originals: live tensors, or the lazy ones of a checkpoint. A
parameter that is packed whole is the same `Parameter` object before, during and after a graft.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kernelgraft.binding import ClassKey, bound_class
from kernelgraft.blueprint import PreparedFunction, PreparedSite
from kernelgraft.choosing import Asked, Runs
from kernelgraft.contents import Contents, joined
from kernelgraft.conversion.lazy import LazyTensor, parameter
from kernelgraft.conversion.program import Part, Program
from kernelgraft.layouts import Made, put_value
from kernelgraft.slot import CALL_HOOKS, KEY, STATE_HOOKS, GraftedModule, Site, Slot, add_stubs
from kernelgraft.tree import module_at, parameter_names, put_tensor, tensor_at

_CHECKPOINTING = "gradient_checkpointing"
_NO_SWITCHES = {*vars(nn.Module()), "forward"}
"""What every module has; and accelerate's `forward`, which moves with its hook."""


def install_site(model: nn.Module, prepared: PreparedSite) -> tuple[Site, dict[str, nn.Module]]:
    """Put one site into the model.

    Returns:
        What its slots share, and the modules that now stand at its paths.
    """
    paths, keys = prepared.site.paths, prepared.keys
    site = _new_site(prepared.site.host, prepared.runs, [prepared.asked])
    if prepared.made is None:
        return _rebind(model, site, paths[0], keys[0])
    members = [module_at(model, path) for path in paths]
    program = prepared.kind.program
    assert program is not None
    filled = _fill(prepared, prepared.made, program, members, model)
    values = {name: value.to(_device(filled, members)) for name, value in prepared.made.values().items()}
    # From here on nothing can fail: it is assignments only.
    layout = prepared.made.layout
    _put_all(prepared.made.contents, filled)
    for name, value in values.items():
        put_value(layout, name, value)
    for name, kept in prepared.made.kept.items():
        member_index, _, local = kept.partition(".")
        if name not in filled:
            put_tensor(layout, name, tensor_at(members[int(member_index)], local))
    _set_training(prepared.made.contents, members[paths.index(site.host)].training)
    modules: dict[str, nn.Module] = {}
    slots = []
    for index, (path, member, key) in enumerate(zip(paths, members, keys, strict=True)):
        parts = _parts_of(program, index, path)
        slot = Slot(path, site, member, layout, parts)
        slot.names = parameter_names(member)
        slot.lost = {name: tensor_at(member, name).detach() for name, part in parts.items() if part.kind == "lost"}
        _empty(member, parts)
        slots.append(slot)
        modules[path] = _stand_in(layout if slot.is_host else nn.Module(), slot, key)
    position = paths.index(site.host)
    slots[position].before = tuple(slots[:position])
    for slot in slots[position + 1 :]:
        slot.is_behind = True
    for path, module in modules.items():
        _put_module(model, path, module)
    return site, modules


def rebind_function(model: nn.Module, prepared: PreparedFunction) -> tuple[Site, dict[str, nn.Module]]:
    """Let the forward of one module call function kernels."""
    site = _new_site(prepared.path, prepared.runs, prepared.asked)
    return _rebind(model, site, prepared.path, prepared.key)


def _new_site(host: str, runs: Runs, asked: Sequence[Asked]) -> Site:
    fallback = "reference" if all(each.optional for each in asked) else "error"
    return Site(host, runs.modes, runs.originals, fallback)


def _rebind(model: nn.Module, site: Site, path: str, key: ClassKey) -> tuple[Site, dict[str, nn.Module]]:
    module = module_at(model, path)
    vars(module)[KEY] = Slot(path, site, module, module, {})
    _set_class(module, bound_class(key))
    return site, {path: module}


def _set_training(layout: Contents, training: bool) -> None:
    """`train(training)`, unless that would change nothing."""
    for _, module in layout.modules:
        if module.training != training or type(module).train is not nn.Module.train:
            layout.module.train(training)
            return


def _stand_in(module: nn.Module, slot: Slot, key: ClassKey) -> nn.Module:
    """Make `module` the one that answers for the slot's path."""
    original = slot.skeleton
    if not slot.is_host:
        module.train(original.training)
    own, its = vars(module), vars(original)
    for name in (*CALL_HOOKS, *STATE_HOOKS, "_is_full_backward_hook"):
        if name in its:
            own[name] = its[name]
    for name in CALL_HOOKS:
        its[name] = OrderedDict()
    for name in _switches(original):
        own.setdefault(name, its[name])
    if _CHECKPOINTING in its:
        # The slot checkpoints now; inside it the original's forward must not do so once more.
        setattr(original, _CHECKPOINTING, False)
    own[KEY] = slot
    module.__class__ = bound_class(key)
    add_stubs(module, slot)
    _move_hook(original, module)
    return module


def _switches(module: nn.Module) -> list[str]:
    """Attributes set on the instance that shadow one of its class: `gradient_checkpointing` above all."""
    classes = [vars(base) for base in type(module).__mro__ if base not in (nn.Module, object)]
    return [name for name in vars(module) if name not in _NO_SWITCHES and any(name in names for names in classes)]


def _move_hook(source: nn.Module, target: nn.Module) -> None:
    """Let accelerate's hook, if there is one, run where calls arrive now."""
    hook = vars(source).get("_hf_hook")
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(source)
        add_hook_to_module(target, hook)


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give `module` another class, whose forward runs under accelerate's hook, if there is one."""
    hook = vars(module).get("_hf_hook")
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(module)
    # What accelerate leaves there when it takes a hook off: the forward of the class that was.
    vars(module).pop("forward", None)
    module.__class__ = cls
    if hook is not None:
        add_hook_to_module(module, hook)


# --- parameters


def _fill(
    prepared: PreparedSite, made: Made, program: Program, members: list[nn.Module], model: nn.Module
) -> dict[str, torch.Tensor]:
    """Every packed parameter and buffer with its values."""
    originals = {name: _original(members, name) for name in program.sources}
    computed = _compute(prepared, program, members, model) if program.computed else {}
    filled: dict[str, torch.Tensor] = {}
    named = made.contents.parameters | made.contents.buffers
    for target in program.targets:
        like = named[target]
        if prepared.keeps(target):
            filled[target] = originals[program.whole[target]]
            continue
        sources = [originals[name] for name in program.feeds[target] or program.computed.get(target, ())]
        if target in computed:
            value = computed[target]
        elif (lazy := prepared.lazy(target, originals)) is not None:
            value = lazy  # read with all others, when all sites are there
        else:
            dtype = getattr(torch, program.casts[target]) if target in program.casts else sources[0].dtype
            value = torch.empty(program.targets[target], dtype=dtype, device=sources[0].device)
            program.fill(target, value, originals.__getitem__)
        if isinstance(like, nn.Parameter):
            value = parameter(value, any(source.requires_grad for source in sources))
            value.grad = _gradient(program, target, value, originals)
        filled[target] = value
    return filled


def _original(members: Sequence[nn.Module], name: str) -> torch.Tensor:
    index, _, local = name.partition(".")
    return tensor_at(members[int(index)], local)


def _gradient(
    program: Program, target: str, packed: nn.Parameter, originals: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    """The gradient of a packed parameter from those that its sources have by now, if any has one."""
    names = program.feeds[target]
    grads = {name: originals[name].grad for name in names if not isinstance(originals[name], LazyTensor)}
    given = {name: grad for name, grad in grads.items() if grad is not None}
    if not given:
        return None
    found = torch.empty_like(packed)
    program.fill(target, found, lambda name: given[name] if name in given else torch.zeros_like(originals[name]))
    return found


def _compute(
    prepared: PreparedSite, program: Program, members: Sequence[nn.Module], model: nn.Module
) -> dict[str, torch.Tensor]:
    """What a rule computes, and does not only move, from the originals' values."""
    assert prepared.rules is not None
    used = {
        f"{index}.{name}": tensor.materialize() if isinstance(tensor, LazyTensor) else tensor.detach()
        for index, contents in enumerate(map(Contents, members))
        for name, tensor in (*contents.parameters.items(), *contents.buffers.items())
    }
    paths = prepared.site.paths
    config = getattr(model, "config", None)
    names = list(program.targets)
    prefix = getattr(model, "base_model_prefix", "")
    converted = prepared.rules.run(
        used, paths, prepared.site.host, prefix=prefix, model=model, config=config, packed_names=names
    )
    return {name: converted.packed[name].contiguous() for name in program.computed}


def _parts_of(program: Program, index: int, path: str) -> dict[str, Part]:
    """The parts of one member by their names in it; they themselves bear the names that they have in the model."""
    prefix = f"{index}."
    found = {name[len(prefix) :]: program.part(name) for name in program.sources if name.startswith(prefix)}
    return {name: part.renamed(joined(path, name)) for name, part in found.items()}


def _empty(member: nn.Module, parts: Mapping[str, Part]) -> None:
    """Take the bytes of the originals that are packed now; the objects stay what they are."""
    for name, part in parts.items():
        original = tensor_at(member, name)
        nothing = torch.empty(0, dtype=original.dtype, device=original.device)
        is_parameter = isinstance(original, nn.Parameter)
        if is_parameter and not isinstance(original, LazyTensor) and part.kind != "whole":
            original.data, original.grad = nothing, None
        else:
            put_tensor(member, name, nn.Parameter(nothing, original.requires_grad) if is_parameter else nothing)


def _put_all(layout: Contents, filled: Mapping[str, torch.Tensor]) -> None:
    """Put the values in, wherever the layout keeps the tensor that they stand for (it may do so twice)."""
    named = layout.parameters | layout.buffers
    by_id = {id(named[name]): value for name, value in filled.items()}
    for _, module in layout.modules:
        for registry in (module._parameters, module._buffers):
            for name, tensor in registry.items():
                if tensor is not None and id(tensor) in by_id:
                    registry[name] = by_id[id(tensor)]  # type: ignore[assignment]


def _device(filled: Mapping[str, torch.Tensor], members: list[nn.Module]) -> torch.device:
    for tensor in filled.values():
        return tensor.device
    for member in members:
        for each in member.parameters():
            return each.device
    return torch.device("cpu")


# --- and back


def restore_site(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put the originals of one site back, with the weights as they are now."""
    for path, module in modules.items():
        slot: Slot = vars(module)[KEY]
        if not isinstance(module, GraftedModule):
            key: ClassKey = type(module)._kernelgraft_maker  # type: ignore[attr-defined]
            _set_class(module, key.original)
            del vars(module)[KEY]
            continue
        original = slot.skeleton
        _refill(slot, original)
        handed_back = (*CALL_HOOKS, "_is_full_backward_hook", "_gradient_checkpointing_func")
        for name in (*_switches_of(module, original), *handed_back):
            if name in vars(module):
                vars(original)[name] = vars(module)[name]
        _move_hook(module, original)
        _put_module(model, path, original)


def _switches_of(module: nn.Module, original: nn.Module) -> list[str]:
    kept = {*_switches(original), _CHECKPOINTING}
    return [name for name in _switches(module) if name in kept]


def _refill(slot: Slot, original: nn.Module) -> None:
    for name, part in slot.parts.items():
        if part.kind == "whole":
            put_tensor(original, name, slot.packed(part.packed[0]))
            continue
        if name in slot.lost:
            value = slot.lost[name]
        else:
            value = part.read(slot.packed).detach().clone(memory_format=torch.contiguous_format)
        before: Any = tensor_at(original, name)
        if not isinstance(before, nn.Parameter):
            put_tensor(original, name, value)
            continue
        packed = [slot.packed(each) for each in part.packed]
        before.data = value
        if packed:
            before.requires_grad_(any(tensor.requires_grad for tensor in packed))
        if packed and all(tensor.grad is not None for tensor in packed):
            grads = {each: tensor.grad for each, tensor in zip(part.packed, packed, strict=True)}
            before.grad = part.read(grads.__getitem__).clone(memory_format=torch.contiguous_format)  # type: ignore[arg-type]


def _put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    module_at(model, parent)._modules[name] = module
