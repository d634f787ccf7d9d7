"""A plan applied to a model, and removed.

A graft changes one model: module instances at the paths that its plan lists, and the root's class. It is all or
nothing, and `remove()` gives back the same module objects with the current weights.
"""

import contextlib
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kernelgraft.binding import ClassKey, Rebound, bound_class
from kernelgraft.blueprint import Blueprint
from kernelgraft.checkpoint.fill import materialize
from kernelgraft.checkpoint.reader import Reading
from kernelgraft.choosing import Asked, Runs, choose_modes, runs_of
from kernelgraft.config import device_type
from kernelgraft.errors import GraftError
from kernelgraft.forwards import traces_of
from kernelgraft.install import install_site, rebind_function, restore_site
from kernelgraft.kernel import Kernel, load_kernel
from kernelgraft.matching import collapse_paths
from kernelgraft.pausing import collector_paused
from kernelgraft.plan import Plan
from kernelgraft.preparing import preparing
from kernelgraft.recorded_config import described
from kernelgraft.root import ROOT_KEY, root_class
from kernelgraft.slot import KEY, GraftedModule, Site, Slot
from kernelgraft.tree import saved_tensors
from kernelgraft.update import Weights, update

if TYPE_CHECKING:
    from kernelgraft import benchmark as benchmarks
    from kernelgraft.verify import Report

logger = logging.getLogger("kernelgraft")


@dataclass(frozen=True)
class Calls:
    """How often what ran since the graft was made.

    Attributes:
        kernel: Eager calls in which a kernel ran.
        reference: Eager calls in which an original forward ran instead.
        traced: Times that torch.compile traced a kernel of this graft's kinds into a graph.
        sites: `(kernel, reference)` for each host path.
    """

    kernel: int
    reference: int
    traced: int
    sites: dict[str, tuple[int, int]]


@dataclass
class Installed:
    """One site in the model: its slots' modules by path, and what was there before."""

    site: Site
    asked: tuple[Asked, ...]
    keys: tuple[ClassKey, ...]
    modules: dict[str, nn.Module]
    device: str

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """All kernels that may run here, each once."""
        lists = [modes for key in self.keys for modes in (key.modes, *(more for _, more in key.functions))]
        return tuple(dict.fromkeys(kernel for modes in lists for _, _, kernel in modes))

    @property
    def layouts(self) -> list[tuple[type[nn.Module], nn.Module]]:
        """The class of the layout, if there is one, and the module that has its parameters."""
        host = self.modules[self.site.host]
        return [(key.layout, host) for key in self.keys if key.role == "host" and key.layout is not None]


class Graft:
    """An applied plan. Use it as a context manager to have it removed at the end of a block.

    Attributes:
        model: The grafted model.
        plan: What was done.
        asked: The config that asked for it, as plain data.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model = model
        self.plan = plan
        self._installed: list[Installed] = []
        self._original_class = type(model)
        self._traces_before: dict[ClassKey, int] = {}
        self.asked: dict[str, Any] = {}

    def __enter__(self) -> "Graft":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<Graft of {self.plan.summary()}{'' if self.is_applied else ' (removed)'}>"

    @property
    def is_applied(self) -> bool:
        """Whether the graft is in the model."""
        return vars(self.model).get(ROOT_KEY) is self

    def remove(self) -> None:
        """Put the original modules back, with the weights as they are now. A graft that is removed stays so.

        Raises:
            GraftError: A rule of the graft has no inverse, or a grafted module was replaced by something else. Nothing
                has changed then.
        """
        if not self.is_applied:
            return
        for installed in self._installed:
            self._check_removable(installed)
        for installed in reversed(self._installed):
            restore_site(self.model, installed.modules)
        self._installed = []
        del vars(self.model)[ROOT_KEY]
        self.model.__class__ = self._original_class

    def _check_removable(self, installed: Installed) -> None:
        for path, module in installed.modules.items():
            found = self.model.get_submodule(path)
            if found is not module:
                raise GraftError(
                    f"{path!r} no longer holds what the graft put there but a {type(found).__name__}. Undo that "
                    f"change, then remove the graft."
                )
            slot: Slot = vars(module)[KEY]
            lost = [f"{path}.{name} ({part.why})" for name, part in slot.parts.items() if part.kind == "lost"]
            if lost:
                raise GraftError(
                    f"The graft cannot be removed: {'; '.join(lost)}. The kernel's rule has no inverse. Load the model "
                    f"again without the kernel."
                )
            packed = dict.fromkeys(name for part in slot.parts.values() for name in part.packed)
            gone = [f"{slot.site.host}.{name}" for name in packed if not _is_there(slot, name)]
            if gone:
                raise GraftError(
                    f"The graft cannot be removed: {', '.join(gone)}, which it put there, has been offloaded, "
                    f"parametrized or pruned. Undo that first; offloading by "
                    f"accelerate.hooks.remove_hook_from_submodules(model)."
                )

    @property
    def calls(self) -> Calls:
        """How often kernels and originals ran: the proof that what was asked for happened."""
        sites: dict[str, tuple[int, int]] = {}
        for installed in self._installed:
            site = installed.site
            sites[site.host] = (site.kernel_calls, site.reference_calls)
        traced = sum(traces_of.get(key, 0) - before for key, before in self._traces_before.items())
        return Calls(sum(k for k, _ in sites.values()), sum(r for _, r in sites.values()), traced, sites)

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """For each original parameter name, the names under which its values are in `named_parameters()` now.

        Empty for what the graft does not train: parameters that a layout dropped.
        """
        # A tied parameter stands there once, under the first of its names.
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {
            name: tuple(names[id(parameter)] for parameter in parameters if id(parameter) in names)
            for name, parameters in self._parameters().items()
        }

    def _parameters(self) -> dict[str, list[torch.Tensor]]:
        """For each original parameter name, the tensors that hold its values now."""
        slots = self._slots()
        found: dict[str, list[torch.Tensor]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if _split(name, slots)[0] is None:
                found[name] = [parameter]
        for path, slot in slots.items():
            for name, parameter in slot.skeleton.named_parameters(remove_duplicate=False):
                part = slot.parts.get(name)
                found[f"{path}.{name}"] = [slot.packed(each) for each in part.packed] if part else [parameter]
        return found

    def _slots(self) -> dict[str, Slot]:
        return {
            path: vars(module)[KEY]
            for installed in self._installed
            for path, module in installed.modules.items()
            if isinstance(module, GraftedModule)
        }

    @contextlib.contextmanager
    def reference(self, sites: Iterable[str] | None = None) -> Iterator[None]:
        """Inside the block every site runs its originals, on the same weights and with gradients.

        Args:
            sites: Host paths, as `calls.sites` has them, for a block in which these sites alone run theirs.

        Raises:
            GraftError: No site of the graft has that path.
        """
        yield from self._switched("use_reference", sites)

    @contextlib.contextmanager
    def packed_names(self) -> Iterator[None]:
        """Inside the block `state_dict()` and `load_state_dict()` use packed names, as `named_parameters()` does.

        For tools that pair the two, such as accelerate's `cpu_offload`.
        """
        yield from self._switched("packed_names")

    def _switched(self, name: str, hosts: Iterable[str] | None = None) -> Iterator[None]:
        sites = [installed.site for installed in self._installed]
        if hosts is not None:
            wanted = set(hosts)
            unknown = sorted(wanted.difference(site.host for site in sites))
            if unknown:
                raise GraftError(
                    f"{unknown[0]!r} is no site of this graft, whose sites are at "
                    f"{collapse_paths([site.host for site in sites]) or 'no place'}. Write paths of graft.calls.sites."
                )
            sites = [site for site in sites if site.host in wanted]
        _switch(sites, name, 1)
        try:
            yield
        finally:
            _switch(sites, name, -1)

    def update(self, tensors: Weights) -> list[str]:
        """Write new weights, given under original names, into their places: all of them, or some.

        Nothing is allocated and nothing is held: every packed parameter keeps its `data_ptr`, a captured CUDA graph
        goes on, and an iterator is taken one tensor at a time. Copies run on the current stream.

        Args:
            tensors: Original names and tensors, of any dtype and device; or a checkpoint that has them: a safetensors
                file, an index of shards, a folder with either, or a Hub id. Lazy tensors in a mapping are read once to
                see that they can be, and then in one pass, straight into their places.

        Returns:
            The original parameter names that were not among them.

        Raises:
            GraftError: A name is none of the model's, a shape does not fit, or the parameter cannot be written where it
                is now. What came before it has been written; of a checkpoint, which is looked through first, nothing.
            ConversionError: The kernel's rule has no inverse, so that the packed parameters do not hold the original.
            CheckpointError: The checkpoint is none, or cannot be read to its end; then nothing of it was written.
        """
        if not self.is_applied:
            raise GraftError("The graft was removed, so it has nothing to update. Use the model's load_state_dict.")
        return update(self.model, tensors)

    def verify(
        self,
        inputs: Any = None,
        *,
        every_site: bool = True,
        whole_model: bool = True,
        gradients: bool = True,
        dtypes: Sequence[torch.dtype] | None = None,
        seed: int = 0,
    ) -> "Report":
        """Compare kernels and originals on the model's own activations and on odd inputs made of them.

        Args:
            inputs: Inputs of one forward (a tensor, a tuple, or a dict of keywords). Models of Transformers need none.
            every_site: Whether each site runs on the activations, and not only one of each kind.
            whole_model: Whether the whole model's outputs, greedy tokens and loss are compared too.
            gradients: Whether gradients are compared, also of a model in eval mode.
            dtypes: Dtypes to try besides the one in use; by default float32, and bfloat16 and float16 where a
                kernel's `supports` takes them.
            seed: What is drawn is drawn with it.

        Returns:
            The report, with `passed`, `failures`, `raise_for_failures()`, `to_json()`; `print` it. The model is as it
            was.

        Raises:
            VerificationError: Inputs are needed, or the model does not run on them.
        """
        from kernelgraft.verify import verify

        return verify(
            self,
            inputs,
            every_site=every_site,
            whole_model=whole_model,
            gradients=gradients,
            dtypes=dtypes,
            seed=seed,
        )

    def benchmark(
        self,
        inputs: Any = None,
        *,
        tokens: Sequence[int] = (1, 32, 512),
        whole_model: bool = True,
        repeats: int = 20,
        seed: int = 0,
        verified: "Report | None" = None,
    ) -> "benchmarks.Report":
        """Time kernels and originals in turn: one site of each kind, and the whole model.

        Sites run outside of the model, on its activations, in as many tokens as asked for; the whole model runs a
        prefill, the decoding of one token after a cache of so many, and a training step. On CUDA caches are cold.

        Args:
            inputs: Inputs of one forward (a tensor, a tuple, or a dict of keywords). Models of Transformers need none.
            tokens: Numbers of tokens, in a batch of one.
            whole_model: Whether the whole model is timed too.
            repeats: Timed runs of each side.
            seed: What is drawn is drawn with it.
            verified: What `verify` found of this graft with these weights, if it need not run again.

        Returns:
            The report, with `rows`, `machine`, `notes`, `to_json()`; `print` it. The model is as it was, its gradients,
            random states and `calls` too; torch's record of peak memory starts anew.

        Raises:
            VerificationError: A kernel does not pass verification, or `verified` is of another graft.
            GraftError: The graft was removed, or the device is neither CUDA nor the CPU.
        """
        from kernelgraft.benchmark import benchmark

        return benchmark(
            self,
            inputs,
            tokens=tokens,
            whole_model=whole_model,
            repeats=repeats,
            seed=seed,
            verified=verified,
        )

    def moved_to(self, device: torch.device) -> None:
        """Choose the kernels for another device type; called before the model's tensors go there.

        Raises:
            GraftError: The config has no kernel for the device, or one with another layout. Nothing has changed.
        """
        kind = device_type(device)
        changes = []
        for installed in self._installed:
            if installed.device != kind:
                runs = _runs_on(device, installed.asked)
                changes.append((installed, runs, [_key_for(runs, key, installed, kind) for key in installed.keys]))
        for installed, runs, keys in changes:
            installed.keys, installed.device = tuple(keys), kind
            installed.site.modes, installed.site.originals = runs.modes, runs.originals
            for module, key in zip(installed.modules.values(), keys, strict=True):
                module.__class__ = bound_class(key)
                self._traces_before.setdefault(key, traces_of.get(key, 0))


_switching = threading.Lock()


def _switch(sites: Iterable[Site], name: str, by: int) -> None:
    """Blocks nest, and those of several threads overlap: the last one that is left switches back."""
    with _switching:
        for site in sites:
            site.blocks[name] += by
            setattr(site, name, site.blocks[name] > 0)


def _runs_on(device: torch.device, asked: Sequence[Asked]) -> Runs:
    kernels = []
    for each in asked:
        modes = choose_modes(each.entry, device, load_kernel)
        if modes == () and not each.optional:
            raise GraftError(
                f"{each.entry.label}: the config has no kernel for {device_type(device)!r}, where the model is about "
                f"to go. Add one, pass KernelConfig(..., fallback='reference'), or remove the graft first."
            )
        kernels.append(modes or ())
    return runs_of(asked, kernels, device)


def _key_for(runs: Runs, key: ClassKey, installed: Installed, device: str) -> ClassKey:
    """The class of one slot with the kernels for another device; it keeps its own where there are none."""
    if key.role == "function":
        names = [name for name, _ in key.functions]
        return replace(key, functions=tuple(zip(names, runs.kernels, strict=True)))
    (modes,) = runs.kernels
    if not key.modes or not modes:
        return key
    if any(kernel.layout is not key.layout for _, _, kernel in modes):
        raise GraftError(
            f"{installed.asked[0].entry.label}: its kernel for {device!r} has another layout than the one that is "
            f"packed. Remove the graft, move the model, and graft it there."
        )
    return replace(key, modes=modes)


def _split(name: str, slots: Mapping[str, Slot]) -> tuple[str | None, str]:
    """The slot in which an original name lies, and the rest of the name."""
    path = name
    while "." in path:
        path = path.rpartition(".")[0]
        if path in slots:
            return path, name[len(path) + 1 :]
    return None, name


def _is_there(slot: Slot, packed: str) -> bool:
    """Whether a packed tensor has a value where the graft put it, or is on meta because the model was moved there."""
    tensor = saved_tensors(slot.layout).get(packed)
    skeleton = (*slot.skeleton.parameters(), *slot.skeleton.buffers())
    return tensor is not None and (not tensor.is_meta or any(each.is_meta for each in skeleton))


# --- applying


def apply_blueprint(
    model: nn.Module, blueprint: Blueprint, ready: Reading | None = None, *, trains: bool | None = None
) -> Graft:
    """Carry a blueprint out, all or nothing, and log one line about it; `ready` as in `materialize`.

    With `trains` kernels are prepared for that mode, and not for the one that each module is in.
    """
    graft = Graft(model, blueprint.plan)
    graft.asked = described(blueprint.config)
    grafted_class = root_class(type(model))
    device, installed = blueprint.plan.device, graft._installed
    try:
        with collector_paused():
            for prepared in blueprint.sites:
                site, modules = install_site(model, prepared)
                installed.append(Installed(site, (prepared.asked,), prepared.keys, modules, device))
            for function in blueprint.functions:
                site, modules = rebind_function(model, function)
                installed.append(Installed(site, function.asked, (function.key,), modules, device))
        with preparing((layout for each in installed for layout in each.layouts), trains):
            materialize(model, ready)
    except BaseException:
        for each in reversed(installed):
            restore_site(model, each.modules)
        raise
    for slot in graft._slots().values():
        slot.lost = {}
    keys = dict.fromkeys(key for each in installed for key in each.keys)
    graft._traces_before = {key: traces_of.get(key, 0) for key in keys}
    vars(model)[ROOT_KEY] = graft
    model.__class__ = grafted_class
    logger.info("%s", blueprint.plan.summary())
    return graft


def graft_of(model: nn.Module) -> Graft | None:
    """The graft that is in `model`, also after `from_pretrained`; `None` if there is none."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    found: Graft | None = vars(model).get(ROOT_KEY)
    return found


def slots_of(model: nn.Module) -> Sequence[nn.Module]:
    """The modules of `model` that a graft put there or rebound."""
    return [module for module in model.modules() if isinstance(module, GraftedModule | Rebound)]
