"""`from_pretrained` and the auto classes: Transformers' own loading, with kernels put in before the bytes are read.

Transformers resolves the config, the files, dtypes and devices, converts names, ties weights and reports what is
missing. We take part at three places, by a subclass that lives for one load: while the skeleton is built its
constructor arguments are recorded, before the checkpoint's tensors are in it the graft is planned, and these are lazy
ones, which the graft then pulls into place. The subclass has a copy of `from_pretrained` that does not make the rules
of other models. Nothing of Transformers is patched.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from kernelgraft import compat, recorded_config
from kernelgraft.ahead import Ahead
from kernelgraft.api import subject_of
from kernelgraft.blueprint import Blueprint
from kernelgraft.checkpoint.files import INDEX, Checkpoint
from kernelgraft.checkpoint.fill import materialize
from kernelgraft.checkpoint.format import ShardIndex, given_shard_index
from kernelgraft.checkpoint.naming import Lazies, load_lazily
from kernelgraft.checkpoint.own_rules import with_own_rules
from kernelgraft.checkpoint.reader import Reading, ready_for_cuda
from kernelgraft.config import KernelConfig
from kernelgraft.entry import Entry
from kernelgraft.graft import Graft, apply_blueprint
from kernelgraft.meta import WithoutDrawing
from kernelgraft.pausing import collector_paused
from kernelgraft.plan import Rejected
from kernelgraft.planner import make_blueprint
from kernelgraft.recording import Recording, recorded
from kernelgraft.root import root_class


@dataclass
class _Load:
    """One call of `from_pretrained`: what was asked for (without a config, no graft), and how far it has come."""

    config: KernelConfig | None = None
    inherited: Sequence[Entry] = ()
    rejected: tuple[Rejected, ...] = ()
    recording: Recording | None = None
    blueprint: Blueprint | None = None
    is_lazy: bool = False
    graft: Graft | None = None
    verify: bool = False
    device_map: Any = None
    original: type[nn.Module] | None = None
    record: recorded_config.Recorded | None = None
    ready: Reading | None = None
    stack: ExitStack = field(default_factory=ExitStack)
    collector: ExitStack = field(default_factory=ExitStack)
    """Closed where the garbage collector may run again."""

    def make_ready(self) -> None:
        """Let the threads that will read to a GPU start, while the rest of the load is found out."""
        devices = (compat.explicit_devices(self.device_map) or {}).values()
        if self.ready is None and any(_is_cuda(device) for device in devices) and torch.cuda.is_available():
            self.ready = ready_for_cuda()
            self.stack.callback(self.ready.stop)

    def plan_skeleton(self, model: nn.Module, load_config: Any, lazies: Lazies) -> None:
        """Plan the graft of a model that will be filled with what `lazies` gives, as `load_config` says."""
        # Transformers has worked out by now which devices "auto" is.
        self.device_map = load_config.device_map
        self.make_ready()
        ahead = None
        if self.ready is not None:
            # Not only when all is over: by then the files are closed.
            self.stack.callback(self.ready.stop)
            ahead = Ahead(model, lazies(), self.ready)
        if self.config is not None:
            self.blueprint = self.plan(model, live=False, load_config=load_config, ahead=ahead)
        if ahead is not None:
            ahead.begin_rest(self.blueprint.sites if self.blueprint is not None else ())

    def plan(
        self,
        model: nn.Module,
        *,
        live: bool,
        load_config: Any = None,
        ahead: Ahead | None = None,
    ) -> Blueprint:
        """Plan the graft of this load's model, which will be filled as `load_config` says if it is not `live`."""
        assert self.config is not None
        subject = subject_of(model, live=live, recording=self.recording)
        if ahead is not None:
            subject.on_claims = ahead.begin_free
        if load_config is not None:
            subject.dtype_of = compat.loaded_dtypes(load_config)
            if load_config.device_map:
                subject.device_of = partial(_device_in, load_config.device_map)
        blueprint = make_blueprint(subject, self.config, self.inherited, self.rejected)
        if self.record is not None:
            self.record.check(blueprint.plan)
        return blueprint


def from_pretrained(
    cls: type, pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
) -> Any:
    """Load a Transformers model with kernels in it.

    Args:
        cls: A model class of Transformers, or one of its auto classes.
        pretrained_model_name_or_path: A Hub id or a folder; `None` beside a `state_dict`, as in Transformers.
        *model_args: As in Transformers.
        **kwargs: As in Transformers' `from_pretrained`, in which `use_kernels` and `kernel_config` are ours:
            `kernel_config` is a `KernelConfig` (or Transformers' own, a mapping, or the path of a TOML file), or
            `"recorded"` for the one that the model was saved with (see `kernelgraft.save_pretrained`), and
            `use_kernels=True` without one takes Transformers' default table. Without either nothing is put in, and the
            checkpoint is read our way; `use_kernels=False` leaves all of it to Transformers. With `verify=True` one
            site of each kind is verified as by `Graft.verify`, and a kernel that fails is refused.

    Returns:
        What Transformers returns; `kernelgraft.graft_of(model)` is the graft.

    Raises:
        KernelGraftError: The config, a kernel or the graft is refused.
        VerificationError: A kernel does not answer as the original does.
    """
    verify = bool(kwargs.pop("verify", False))
    kernel_config = kwargs.pop("kernel_config", None)
    use_kernels = kwargs.pop("use_kernels", None)
    if use_kernels is False:
        return cls.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)  # type: ignore[attr-defined]
    record = None
    if (said := recorded_config.asked(kernel_config)) is not None:
        record = recorded_config.read(pretrained_model_name_or_path, said, **kwargs)
        kernel_config = record.config
    load = _Load(record=record, verify=verify, device_map=kwargs.get("device_map"))
    if kernel_config is not None or use_kernels:
        load.config = KernelConfig({}) if kernel_config is None else KernelConfig.of(kernel_config)
        if load.config.inherits:
            load.inherited, load.rejected = compat.default_table()
    loading: Any = _auto_class(cls, load) if hasattr(cls, "_model_mapping") else _loading_class(cls, load)
    with load.stack:
        load.stack.enter_context(load.collector).enter_context(collector_paused())
        found = loading.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        _finish(load, found[0] if isinstance(found, tuple) else found)
    return found


def _finish(load: _Load, model: nn.Module) -> None:
    """The model gets its own class back; where it was not loaded our way, it is grafted in place."""
    if load.original is not None:
        model.__class__ = load.original
    if load.config is None:
        return
    if load.graft is None:
        load.graft = apply_blueprint(model, load.plan(model, live=True))
    else:
        model.__class__ = root_class(type(model))
    if load.verify:
        load.collector.close()
        from kernelgraft.verify import verify_or_remove

        verify_or_remove(load.graft)


def _device_in(device_map: Mapping[str, Any], name: str) -> torch.device:
    """The device that a device map gives the parameter called `name`: that of its longest listed prefix."""
    path = name
    while path not in device_map and path:
        path = path.rpartition(".")[0]
    where = device_map.get(path, "cpu")
    return torch.device("cpu" if where == "disk" else where)


def _is_cuda(device: Any) -> bool:
    """Whether something in a device map is a GPU: a number, or what `torch.device` takes."""
    return isinstance(device, int) or str(device).startswith("cuda")


def _auto_class(cls: Any, load: _Load) -> type:
    """A subclass of an auto class whose model classes load our way."""
    return type(
        cls.__name__, (cls,), {"__module__": cls.__module__, "_model_mapping": _Mapping(cls._model_mapping, load)}
    )


class _Mapping:
    """An auto class's mapping from configs to model classes, with loading classes in the place of the latter."""

    def __init__(self, original: Any, load: _Load) -> None:
        self._original = original
        self._load = load

    def __getitem__(self, config: type) -> Any:
        found = self._original[config]
        if isinstance(found, list | tuple):
            return type(found)(_loading_class(each, self._load) for each in found)
        return _loading_class(found, self._load)

    def __contains__(self, config: object) -> bool:
        return config in self._original

    def __iter__(self) -> Any:
        return iter(self._original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def _loading_class(cls: Any, load: _Load) -> Any:
    """A subclass of a model class that plans, and fills, a graft while Transformers loads it."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        load.original = cls
        load.make_ready()
        with WithoutDrawing(), ExitStack() as stack:
            if load.config is not None and (load.config.entries or load.inherited):
                load.recording = stack.enter_context(recorded())
            cls.__init__(self, *args, **kwargs)

    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> Any:
        shards = None if state_dict is not None else _named_by_an_index(checkpoint_files, load_config)
        if state_dict is None and _is_ours(checkpoint_files, load_config):
            model.__class__ = cls
            load.is_lazy = True
            checkpoint = load.stack.enter_context(Checkpoint(checkpoint_files, shards))
            before = partial(load.plan_skeleton, model, load_config)
            return load_lazily(model, checkpoint, load_config, expected_keys, before)
        load.collector.close()
        return cls._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        info = cls._finalize_model_loading(model, load_config, loading_info)
        if load.blueprint is not None:
            # Transformers leaves it in eval mode, but later.
            load.graft = apply_blueprint(model, load.blueprint, load.ready, trains=False)
            # While Transformers goes on, it must not find our `use_kernels`, which it would switch off.
            model.__class__ = loading
            load.stack.enter_context(load.graft.packed_names())
        elif load.is_lazy:
            materialize(model, load.ready)
        return info

    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        """An adapter goes onto the original modules; what it leaves free is grafted when it is there."""
        if load.graft is not None:
            load.graft.remove()
            load.graft = None
        self.__class__ = cls
        return cls.load_adapter(self, *args, **kwargs)

    def set_use_kernels(self: Any, *_: Any, **__: Any) -> None:
        """Kernels are ours here."""

    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__init__": __init__,
        "_load_pretrained_model": staticmethod(_load_pretrained_model),
        "_finalize_model_loading": staticmethod(_finalize_model_loading),
        "load_adapter": load_adapter,
        "set_use_kernels": set_use_kernels,
    }
    if (quicker := with_own_rules(cls)) is not None:
        namespace["from_pretrained"] = classmethod(quicker)
    loading = type(cls.__name__, (cls,), namespace)
    return loading


def _named_by_an_index(checkpoint_files: Sequence[str] | None, load_config: Any) -> ShardIndex | None:
    """The index that named a checkpoint's files; Transformers goes wherever it leads.

    Raises:
        CheckpointError: It names a file outside its folder.
    """
    weight_map = compat.weight_map_of(load_config)
    if weight_map is None or not checkpoint_files:
        return None
    return given_shard_index(weight_map, checkpoint_files, Path(load_config.pretrained_model_name_or_path) / INDEX)


def _is_ours(checkpoint_files: Sequence[str] | None, load_config: Any) -> bool:
    """Whether a load is one that lazy tensors serve; others Transformers does, and the graft is put in afterwards."""
    return (
        bool(checkpoint_files)
        and all(str(file).endswith(".safetensors") for file in checkpoint_files or ())
        and not compat.reads_whole_files(load_config, checkpoint_files or ())
        and load_config.hf_quantizer is None
        and load_config.device_mesh is None
        and "disk" not in (load_config.device_map or {}).values()
    )


class _FromPretrained:
    """What our auto classes add to Transformers' own."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *model_args: Any, **kwargs: Any
    ) -> Any:
        """As `kernelgraft.from_pretrained`, for the class that fits the checkpoint's config."""
        return from_pretrained(cls._theirs, pretrained_model_name_or_path, *model_args, **kwargs)  # type: ignore[attr-defined]


def _ours(name: str) -> Any:
    theirs = getattr(transformers, name)
    return type(name, (_FromPretrained, theirs), {"__module__": __name__, "__doc__": theirs.__doc__, "_theirs": theirs})


AutoModel = _ours("AutoModel")
AutoModelForCausalLM = _ours("AutoModelForCausalLM")
AutoModelForImageClassification = _ours("AutoModelForImageClassification")
AutoModelForImageTextToText = _ours("AutoModelForImageTextToText")
AutoModelForMaskedLM = _ours("AutoModelForMaskedLM")
AutoModelForQuestionAnswering = _ours("AutoModelForQuestionAnswering")
AutoModelForSeq2SeqLM = _ours("AutoModelForSeq2SeqLM")
AutoModelForSequenceClassification = _ours("AutoModelForSequenceClassification")
AutoModelForSpeechSeq2Seq = _ours("AutoModelForSpeechSeq2Seq")
AutoModelForTokenClassification = _ours("AutoModelForTokenClassification")
