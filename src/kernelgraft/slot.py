"""What one path of a grafted model answers: original names, the original forward, and everything that asks for them.

A slot stands where an original module stood. The original stays beside it without its bytes (the *skeleton*), and each
of its parameters is read as a view of the packed parameters. No hook on the model or on a parent is needed: a slot
answers for its own path, through the original's own code run on a shallow tree of the skeleton.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.dlpack import from_dlpack

from kernelgraft.errors import GraftError
from kernelgraft.loading import load_slot, load_submodule
from kernelgraft.tree import put_tensor, shallow_tree, tensor_at

if TYPE_CHECKING:
    from kernelgraft.conversion.program import Part

KEY = "_kernelgraft"
"""Name in an instance's `__dict__` under which its `Slot` is kept: outside the module tree, so torch never sees it."""

CALL_HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
"""Torch's registries of hooks on calls. A slot takes over those of its skeleton, so that handles given out before go on
working; the skeleton has empty ones meanwhile, or a hook would run twice where the original does the work."""

STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Those of hooks on state dicts, which a slot shares with its skeleton: the skeleton's code runs them."""


class Site:
    """What the slots of one site share: which forward runs, and how often it did.

    Attributes:
        host: Path of the module that runs the kernel.
        modes: The pairs `(training, compiling)` in which the kernel runs.
        originals: Those in which the originals run instead, as the config says or allows.
        fallback: "reference" if the original forward may run where the kernel cannot, else "error".
        use_reference: Whether the originals run instead of the kernel; set by `Graft.reference`.
        packed_names: Whether state dicts use packed names; set by `Graft.packed_names`.
        blocks: How many blocks of `Graft.reference` and `Graft.packed_names` are entered and not yet left.
        has_no_gradient: Whether the originals' output is known to have none either.
        declined: Why the kernel must not run where gradients are asked for (it lost one), or "".
        refused: Threads in which the kernel refused the call that is under way (0 stands for a trace).
        accepted: What the call that `supports` accepted last looked like.
        kernel_calls: Eager calls in which the kernel ran.
        reference_calls: Eager calls in which the host's original forward ran.
    """

    def __init__(
        self,
        host: str,
        modes: frozenset[tuple[bool, bool]],
        originals: frozenset[tuple[bool, bool]],
        fallback: str,
    ) -> None:
        self.host = host
        self.modes = modes
        self.originals = originals
        self.fallback = fallback
        self.use_reference = False
        self.packed_names = False
        self.blocks = {"use_reference": 0, "packed_names": 0}
        self.has_no_gradient = False
        self.declined = ""
        self.refused: set[int] = set()
        self.accepted: object = None
        self.kernel_calls = 0
        self.reference_calls = 0

    def runs_originals(self, training: bool) -> bool:
        """Whether each slot of the site runs its own original, known before the call is looked at."""
        if self.use_reference or (training, torch.compiler.is_compiling()) not in self.modes:
            return True
        return bool(self.declined) and torch.is_grad_enabled()

    def may_run_originals(self, training: bool) -> bool:
        """Whether that is what was asked for or allowed, and no error."""
        wanted = self.use_reference or (training, torch.compiler.is_compiling()) in self.originals
        return wanted or self.fallback == "reference"


class Slot:
    """The record behind one path of a graft.

    Attributes:
        path: Where the slot stands in the model.
        site: What it shares with the other slots of its site.
        skeleton: The original module; parameters that were taken over are empty, all else is as it was.
        layout: The module that holds the packed parameters (the slot's own module, or the host that absorbed it).
        parts: For each original parameter that was taken over, how it reads from the packed ones.
        names: The original's parameters, taken over or not, in its order; none where it was only rebound.
        before: On a host, the slots whose output flows into it, in order.
        is_behind: Whether the host's output flows into this slot.
        lost: While a graft is being made, the values of originals that cannot be had back from the packed ones.
    """

    def __init__(
        self, path: str, site: Site, skeleton: nn.Module, layout: nn.Module, parts: "Mapping[str, Part]"
    ) -> None:
        self.path = path
        self.site = site
        self.skeleton = skeleton
        self.layout = layout
        self.parts = dict(parts)
        self.names: tuple[str, ...] = ()
        self.before: tuple[Slot, ...] = ()
        self.is_behind = False
        self.lost: dict[str, torch.Tensor] = {}

    @property
    def is_host(self) -> bool:
        """Whether the kernel runs here; else the slot passes its input through."""
        return self.path == self.site.host

    def packed(self, name: str) -> torch.Tensor:
        """The packed parameter or buffer called `name`."""
        return tensor_at(self.layout, name)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every original parameter that was taken over, read from the packed ones, with gradients."""
        return {name: part.read(self.packed) for name, part in self.parts.items()}

    def tree(self) -> nn.Module:
        """A shallow tree of the skeleton with its parameters in place; made per call, so threads do not meet in it."""
        tree = shallow_tree(self.skeleton)
        for name, tensor in self.tensors().items():
            put_tensor(tree, name, tensor)
        return tree

    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """The original's forward, on views of the packed parameters."""
        if torch.compiler.is_compiling():
            return functional_call(self.skeleton, self.tensors(), args, kwargs, tie_weights=False)
        return self.tree().forward(*args, **kwargs)

    def owned(self) -> dict[str, bool]:
        """The packed parameters that hold this slot's weights, and whether they hold no other slot's."""
        held: dict[str, int] = {}
        for part in self.parts.values():
            for name in part.packed:
                held[name] = held.get(name, 0) + math.prod(part.shape)
        return {name: numel >= self.packed(name).numel() for name, numel in held.items()}

    def original_attribute(self, name: str) -> Any:
        """What `name` was on the original: a parameter reads as its view, a submodule as a shallow tree."""
        if name in self.parts:
            return self.parts[name].read(self.packed)
        if name in self.skeleton._modules:
            return self.tree()._modules[name]
        return getattr(self.skeleton, name)


class GraftedModule(nn.Module):
    """Base of the generated classes: answers for one path as the original module did."""

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As the original's: its names, order, metadata and values.

        The values are live views; a part that lies between others' elements in a packed parameter is a copy.
        """
        slot: Slot = self.__dict__[KEY]
        if slot.site.packed_names:
            return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        return _original_state(slot, "", *args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        slot: Slot = self.__dict__[KEY]
        if slot.site.packed_names:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            return
        mine = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        load_slot(slot, mine, prefix, local_metadata, missing_keys, unexpected_keys, error_msgs)
        for key in list(state_dict):
            if key.startswith(prefix):
                del state_dict[key]
        # Torch now goes on to the layout's own children: each finds itself, which copies nothing.
        state_dict.update({prefix + name: parameter for name, parameter in self.named_parameters()})
        state_dict.update({prefix + name: buffer for name, buffer in self.named_buffers()})

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        slot: Slot = self.__dict__[KEY]
        slot.skeleton._apply(fn)  # type: ignore[no-untyped-call]
        return self

    def train(self, mode: bool = True) -> Any:
        """Sets the mode here and in the original, whose forward may depend on it."""
        self.__dict__[KEY].skeleton.train(mode)
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As the original's. Where a host holds the weights, they are switched there, if it holds no other slot's too.

        Raises:
            GraftError: One packed parameter holds weights of this module and of another.
        """
        slot: Slot = self.__dict__[KEY]
        if not slot.is_host:
            owned = slot.owned()
            shared = [name for name, alone in owned.items() if not alone]
            if shared:
                raise GraftError(
                    f"{slot.path}.requires_grad_({requires_grad}) would switch {', '.join(shared)} of the graft, which "
                    f"holds weights of other modules too. Switch {slot.site.host}, or remove the graft first."
                )
            for name in owned:
                slot.packed(name).requires_grad_(requires_grad)
        return super().requires_grad_(requires_grad)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            slot = self.__dict__.get(KEY)
            if slot is None or name.startswith("__"):
                raise
            return slot.original_attribute(name)

    def __setattr__(self, name: str, value: Any) -> None:
        slot: Slot | None = self.__dict__.get(KEY)
        if slot is not None:
            if isinstance(value, nn.Module) and name in self._modules and self._modules[name] is not value:
                self._refuse_replacing(name, value)
            if name in slot.parts and isinstance(value, torch.Tensor):
                return self._set_original(slot, name, value)
        return super().__setattr__(name, value)

    def _refuse_replacing(self, name: str, value: nn.Module) -> None:
        old = self._modules[name]
        if isinstance(old, AbsorbedSubmodule) or (old is not None and any(True for _ in old.parameters())):
            slot: Slot = self.__dict__[KEY]
            raise GraftError(
                f"{type(value).__name__} would replace {name!r} of the graft at {slot.path!r}, whose weights are "
                f"packed for the kernel. Leave this module out of what you replace (an adapter's target_modules, for "
                f"example), or remove the graft first."
            )

    def _set_original(self, slot: Slot, name: str, value: torch.Tensor) -> None:
        part = slot.parts[name]
        if part.kind != "whole" or not isinstance(value, nn.Parameter):
            raise GraftError(
                f"{slot.path}.{name} is part of {', '.join(part.packed)}, packed for the kernel, and cannot be "
                f"replaced. Copy into it under torch.no_grad(), use load_state_dict, or remove the graft first."
            )
        put_tensor(slot.layout, part.packed[0], value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self)._kernelgraft_maker, (), self.__getstate__()  # type: ignore[attr-defined,no-untyped-call]


class AbsorbedSubmodule(nn.Module):
    """Stands under the name of a submodule that a kernel took over, so that who looks for it finds it and is told.

    It has no parameters of its own; reading `weight` gives the view of the packed one.
    """

    def __init__(self, slot: Slot, path: str) -> None:
        super().__init__()
        self.__dict__[KEY] = slot
        self.__dict__["_path"] = path

    def __getattr__(self, name: str) -> Any:
        slot: Slot | None = self.__dict__.get(KEY)
        if slot is None or name.startswith("__"):
            raise AttributeError(name)
        return getattr(slot.tree().get_submodule(self.__dict__["_path"]), name)

    def __setattr__(self, name: str, value: Any) -> None:
        slot: Slot | None = self.__dict__.get(KEY)
        if slot is not None and isinstance(value, torch.Tensor | nn.Module):
            raise GraftError(
                f"{name!r} of {slot.path}.{self.__dict__['_path']} cannot be set to a {type(value).__name__}: its "
                f"weights are packed for the kernel at {slot.site.host!r}. Copy into them under torch.no_grad(), use "
                f"load_state_dict, or remove the graft first."
            )
        super().__setattr__(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the original submodule on views of the packed parameters."""
        slot: Slot = self.__dict__[KEY]
        return slot.tree().get_submodule(self.__dict__["_path"])(*args, **kwargs)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As the original submodule's. Asked from above, the slot answers for all that it took over."""
        slot: Slot = self.__dict__[KEY]
        if slot.site.packed_names:
            return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        path = self.__dict__["_path"]
        return _original_state(slot, path, *args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As the original submodule's. Loaded from above, the slot loads all that it took over."""
        slot: Slot = self.__dict__[KEY]
        if slot.site.packed_names:
            return super().load_state_dict(state_dict, strict, assign)
        return load_submodule(slot, self.__dict__["_path"], state_dict, strict=strict, assign=assign)

    def extra_repr(self) -> str:
        """Says who has the weights."""
        slot: Slot = self.__dict__[KEY]
        return f"absorbed by {slot.site.host}"


def _original_state(
    slot: Slot, path: str, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
) -> Any:
    """The original's `state_dict()`, or that of a submodule of it, with live views of the packed parameters."""
    if destination is None and not args:
        destination = OrderedDict()
        destination._metadata = OrderedDict()
    module = slot.tree().get_submodule(path)
    out = module.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
    at = f"{path}." if path else ""
    for name, part in () if keep_vars else slot.parts.items():
        if not name.startswith(at):
            continue
        key = prefix + name.removeprefix(at)
        tensor = out.get(key)
        if part.kind == "view" and type(tensor) is torch.Tensor and tensor.device.type in ("cpu", "cuda"):
            # The same memory under a storage of its own: savers that look at storages take parts that share one for
            # tied weights and drop all but one of them. A part with others' elements between its own has no storage
            # that holds it alone, and savers refuse it or write the others too: it is given as a copy.
            # A tensor is handed over on its own device alone.
            with torch.cuda.device_of(tensor):  # type: ignore[no-untyped-call]
                own = from_dlpack(tensor)
            fills = own.untyped_storage().nbytes() == own.numel() * own.element_size()
            out[key] = own if fills else own.contiguous()
    return out


def add_stubs(module: nn.Module, slot: Slot) -> None:
    """Give `module` a stub for every child of the original that had parameters and that the layout does not name."""
    for name, child in slot.skeleton._modules.items():
        if child is not None and name not in module._modules and _has_parameters(child):
            module._modules[name] = _stub(slot, name, child)


def _stub(slot: Slot, path: str, original: nn.Module) -> AbsorbedSubmodule:
    stub = AbsorbedSubmodule(slot, path)
    for name, child in original._modules.items():
        if child is not None and _has_parameters(child):
            stub._modules[name] = _stub(slot, f"{path}.{name}", child)
    return stub


def _has_parameters(module: nn.Module) -> bool:
    """Whether `parameters()` gives any; of many modules that is asked, and torch's walk costs more than all else."""
    if any(tensor is not None for tensor in module._parameters.values()):
        return True
    return any(child is not None and _has_parameters(child) for child in module._modules.values())
