"""Models saved under their original names: streamed from where the weights are, and put into place in one step.

A grafted model is saved through a shallow tree of what it was before, in which a part of a packed parameter is a lazy
tensor. For a model of Transformers its own `save_pretrained` runs on that tree, so that names, files, conversions back
and everything beside the weights are its work; only the writing is ours. Nothing is copied on the way.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kernelgraft import compat, recorded_config
from kernelgraft.checkpoint.progress import progress_bar
from kernelgraft.checkpoint.replace import Names, replacing
from kernelgraft.checkpoint.writer import FileWriter
from kernelgraft.conversion.lazy import LazyTensor, TensorSource
from kernelgraft.errors import CheckpointError, ConversionError
from kernelgraft.slot import KEY, GraftedModule, Slot
from kernelgraft.tree import put_tensor, shallow_tree

if TYPE_CHECKING:
    from kernelgraft.graft import Graft

_PLAIN = (torch.Tensor, nn.Parameter, LazyTensor)


def save_model(
    model: nn.Module, graft: "Graft | None", folder: str | Path, *, max_shard_size: int | str | None = None
) -> None:
    """Save a module of no library, under the names of its `state_dict()`.

    Of parameters that share memory one is kept, as in `safetensors.torch.save_model`.

    Raises:
        CheckpointError: Something in its state cannot stand in a safetensors file.
        ConversionError: A rule of the graft has no inverse.
        SaveError: The files cannot be written. What was in the folder has not changed.
    """
    state = original_tree(model, graft).state_dict()
    _refuse_odd(state, type(model).__name__)
    kept, named_in = _without_shared(state)
    names = Names()
    files, index = _shards(kept, names, max_shard_size)
    record = recorded_config.record_of(graft, folder)
    with replacing(folder, names, recorded_config.FILES) as new:
        total = sum(tensor.nbytes for tensor in kept.values())
        with progress_bar(total, "Writing weights") as progress, FileWriter() as writer:
            for file, members in files.items():
                metadata = {gone: name for gone, name in named_in.items() if name in members}
                tensors = {name: kept[name] for name in members}
                writer.write(new / file, tensors, metadata or None, progress)
        if index is not None:
            (new / names.index).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        recorded_config.write(new, record)


def save_pretrained(model: Any, graft: "Graft | None", folder: str | Path, *args: Any, **kwargs: Any) -> None:
    """Save a model of Transformers as its own `save_pretrained` does, with its arguments.

    What our way does not serve is done by its own code, straight into the folder: adapters, quantized, offloaded and
    distributed models, `push_to_hub`, and processes that are not the main one.

    Raises:
        ConversionError: A rule of the graft has no inverse.
        SaveError: The files cannot be written. What was in the folder has not changed.
    """
    cls = _original(model)
    said = compat.save_arguments(model, folder, *args, **kwargs)
    record = recorded_config.record_of(graft, folder)
    if said is None or not compat.saves_by_itself(model, said) or not _save_theirs(model, graft, cls, said, record):
        cls.save_pretrained(model, folder, *args, **kwargs)
        if said is None or compat.writes_whole_model(model, said):
            recorded_config.put(Path(folder), record)


def original_tree(model: nn.Module, graft: "Graft | None") -> nn.Module:
    """A shallow tree of what a model was before its graft; what is packed in pieces is lazy there.

    Raises:
        ConversionError: A rule of the graft has no inverse.
    """
    tree = shallow_tree(model)
    if graft is None:
        return tree
    for name in [name for name, value in vars(tree).items() if value is graft]:
        del vars(tree)[name]
    tree.__class__ = _original(model)
    return _ungrafted(tree)


def _original(model: nn.Module) -> Any:
    """The class of a model before it was grafted."""
    return getattr(type(model), "_kernelgraft_original", type(model))


def _ungrafted(module: nn.Module) -> nn.Module:
    if isinstance(module, GraftedModule):
        slot: Slot = vars(module)[KEY]
        if slot.site.packed_names:
            return module
        module = _slot_tree(slot)
    for name, child in module._modules.items():
        module._modules[name] = None if child is None else _ungrafted(child)
    return module


def _slot_tree(slot: Slot) -> nn.Module:
    tree = shallow_tree(slot.skeleton)
    packed: dict[str, torch.Tensor] = {}

    def get(name: str) -> torch.Tensor:
        if name not in packed:
            packed[name] = _lazy(name, slot.packed(name))
        return packed[name]

    for name, part in slot.parts.items():
        try:
            tensor = part.read(slot.packed if part.kind == "whole" else get)
        except ConversionError:  # it has no inverse, or needs a step by strides, which a lazy tensor does not have
            tensor = part.read(slot.packed)
        put_tensor(tree, name, tensor)
    return tree


def _lazy(name: str, tensor: torch.Tensor) -> LazyTensor:
    if isinstance(tensor, LazyTensor):
        return tensor
    # What is only marked as conjugate or negated has other bytes than it stands for.
    return LazyTensor.of(TensorSource(name, tensor.detach().resolve_conj().resolve_neg()))


def _is_odd(value: object) -> bool:
    return type(value) not in _PLAIN or value.layout != torch.strided or value.is_meta  # type: ignore[attr-defined]


# --- modules of no library


def _refuse_odd(state: Mapping[str, Any], model: str) -> None:
    for name, value in state.items():
        if _is_odd(value):
            what = (
                f"a {value.layout} {value.dtype} on {value.device}" if isinstance(value, torch.Tensor) else "no tensor"
            )
            raise CheckpointError(
                f"{name} in the state of {model} is a {type(value).__name__}, {what}. A safetensors file takes dense "
                f"tensors that have values. Give it one by the module's state_dict(), or save with torch.save."
            )


def _without_shared(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of which each has its own memory, and for the names left out the one that stands for them."""
    from safetensors.torch import _remove_duplicate_names  # `import kernelgraft` needs torch alone

    # Original weights that are parts of a packed one share nothing.
    memory = {name: torch.empty(1) if isinstance(t, LazyTensor) else t for name, t in state.items()}
    try:
        removed = _remove_duplicate_names(memory)
    except RuntimeError as error:
        raise CheckpointError(
            f"The module shares memory among its tensors in a way that no file keeps: {error}"
        ) from error
    named_in = {gone: name for name, group in removed.items() for gone in group}
    return {name: tensor for name, tensor in state.items() if name not in named_in}, named_in


def _shards(
    tensors: Mapping[str, torch.Tensor], names: Names, max_shard_size: int | str | None
) -> tuple[dict[str, list[str]], dict[str, Any] | None]:
    """The names in each file, and the index if there are several."""
    if max_shard_size is None:
        return {names.single: list(tensors)}, None
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=names.single.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_shard_size,
    )
    if not split.is_sharded:
        return {names.single: list(tensors)}, None
    return split.filename_to_tensors, {"metadata": split.metadata, "weight_map": split.tensor_to_filename}


# --- models of Transformers


class _NotOursError(Exception):
    """Something that our way does not serve; Transformers' own code does it instead."""


def _save_theirs(
    model: Any, graft: "Graft | None", cls: type, said: Mapping[str, Any], record: Mapping[str, Any] | None
) -> bool:
    """Let Transformers' own code save the original tree with our writing; false if that is not for us."""
    options = dict(said)
    folder = options.pop("save_directory")
    tree: Any = original_tree(model, graft)
    given = options.get("state_dict")
    state = dict(tree.state_dict() if given is None else given)
    if os.path.isfile(folder) or any(_is_odd(value) for value in state.values()):
        return False
    save = _Save(state)
    saving = compat.saving_class(cls, save.replacements)
    if saving is None:
        return False
    tree.__class__ = saving
    options["state_dict"] = {name: _lazy(name, tensor) for name, tensor in state.items()}
    try:
        with replacing(folder, Names.of_variant(options.get("variant")), recorded_config.FILES) as new:
            with FileWriter() as writer:
                save.writer = writer
                tree.save_pretrained(str(new), **options)
            recorded_config.write(new, record)
    except _NotOursError:
        return False
    return True


class _Save:
    """One save, as the functions that stand in for those which Transformers' `save_pretrained` calls.

    It is given lazy tensors, which have no memory of their own, where Transformers looks at memory: at which weights
    are tied, and at how large a file becomes. There stand-ins are shown that answer as the untouched model's would.
    """

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self.writer: FileWriter | None = None
        self._memory = dict(state)
        self._is_split = False

    def replacements(self, theirs: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
        """What stands in for the functions of Transformers that `theirs` has by name."""

        def remove_tied(state: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
            # A part of a packed weight shares no memory with the untouched model's others.
            shown = {n: torch.empty(1) if isinstance(self._memory[n], LazyTensor) else self._memory[n] for n in state}
            kept = theirs["remove_tied_weights_from_state_dict"](dict(shown), model)
            self._memory = {
                # What it has copied would have memory of its own.
                name: self._memory[name] if tensor is shown[name] else torch.empty_like(tensor, device="meta")
                for name, tensor in kept.items()
            }
            return {name: state[name] for name in kept}

        def revert(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            convert = theirs["revert_weight_conversion"]
            found = convert(model, state)
            if found is not state and not self._is_split:
                twins = {name: _twin(self._memory[name]) for name in state}
                try:
                    memory = convert(model, twins)
                except Exception as error:
                    raise _NotOursError from error
                if list(memory) != list(found):
                    raise _NotOursError
                self._memory = memory
            return {name: _lazy(name, tensor) for name, tensor in found.items()}

        def split(state: Mapping[str, torch.Tensor], **options: Any) -> Any:
            from huggingface_hub import split_state_dict_into_shards_factory

            self._is_split = True
            return split_state_dict_into_shards_factory(
                {name: self._memory[name] for name in state},
                get_storage_size=_storage_size,
                get_storage_id=_storage_id,
                **options,
            )

        def save_file(tensors: dict[str, torch.Tensor], path: str, metadata: dict[str, str] | None = None) -> None:
            assert self.writer is not None
            self.writer.write(path, tensors, metadata)

        return {
            "remove_tied_weights_from_state_dict": remove_tied,
            "revert_weight_conversion": revert,
            "split_torch_state_dict_into_shards": split,
            "safe_save_file": save_file,
        }


def _twin(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without values that lies in its memory as `tensor` does; views of it share that memory."""
    if isinstance(tensor, LazyTensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    memory = torch.empty(_storage_size(tensor) // tensor.dtype.itemsize, dtype=tensor.dtype, device="meta")
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _storage_size(tensor: torch.Tensor) -> int:
    return tensor.nbytes if isinstance(tensor, LazyTensor) else tensor.untyped_storage().nbytes()


def _storage_id(tensor: torch.Tensor) -> Any:
    """What tensors have in common that lie in one memory; `None` for one that lies alone."""
    if isinstance(tensor, LazyTensor):
        return None
    storage = tensor.untyped_storage()
    return tensor.device, storage._cdata if tensor.is_meta else storage.data_ptr(), storage.nbytes()
