"""Models and checkpoints that are only names and shapes, loaded our way and Transformers' own, and what came of it.

Nothing is read: lazy tensors are compared by what they would read.
"""

import copy
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kernelgraft.checkpoint.files import FileTensor
from kernelgraft.checkpoint.header import TensorEntry
from kernelgraft.checkpoint.naming import load_lazily
from kernelgraft.conversion import LazyTensor

loading = pytest.importorskip("transformers.core_model_loading")
modeling = pytest.importorskip("transformers.modeling_utils")

KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Config(SimpleNamespace):
    """Has what registered operations ask for."""

    def get_text_config(self):
        return self


def config_for(rules):
    config = Config(num_attention_heads=2, vocab_size=30, unpadded_vocab_size=20)
    config.vision_config = Config(num_attention_heads=3)
    for rule in rules:
        for operation in getattr(rule, "operations", ()):
            if getattr(operation, "num_shards_attribute", None):
                setattr(config, operation.num_shards_attribute, 3)
    return config


class Named(nn.Module):
    """A model with parameters of the given names and shapes, on the meta device."""

    base_model_prefix = "model"
    _load_pretrained_model = staticmethod(modeling.PreTrainedModel._load_pretrained_model)

    def __init__(self, shapes, rules=(), dtypes=None):
        super().__init__()
        self.config = config_for(rules)
        for name, shape in shapes.items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            dtype = (dtypes or {}).get(name, torch.float32)
            module.register_parameter(last, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")))


def names_of_a_model(names):
    """Those that a model can have: no part is empty, and no module has the name of a parameter."""
    names = [name for name in dict.fromkeys(names) if all(name.split("."))]
    modules = {name[:end] for name in names for end in range(len(name)) if name[end] == "."}
    return [name for name in names if name not in modules]


class Opened(Mapping):
    """What `load_lazily` takes for a checkpoint, without files."""

    def __init__(self, shapes, dtypes=None):
        self._tensors = {
            name: FileTensor(
                None, TensorEntry(name, KINDS[(dtypes or {}).get(name, torch.float32)], tuple(shape), 0, 0)
            )
            for name, shape in shapes.items()
        }

    def __getitem__(self, name):
        return LazyTensor.of(self._tensors[name])

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self):
        return len(self._tensors)


def by_transformers(model, checkpoint, load_config):
    return model._load_pretrained_model(model, dict(checkpoint), None, load_config)


def loaded(load, shapes, checkpoint, rules, dtypes=None, **options):
    """What comes of a load by `load`: parameters, report, errors of operations, rules for saving; or what it raises."""
    model = Named(shapes, rules, dtypes)
    options = {"dtype": torch.float32, "weight_mapping": copy.deepcopy(rules)} | options
    try:
        info, _ = load(model, checkpoint, modeling.LoadStateDictConfig(**options))
    except Exception as error:
        return type(error), str(error)
    report = {kind: sorted(map(_plain, found)) for kind, found in vars(info).items() if kind != "conversion_errors"}
    errors = {name: text.strip().splitlines()[-2:] for name, text in info.conversion_errors.items()}
    used = [(type(rule), rule.source_patterns, rule.target_patterns) for rule in model._weight_conversions]
    return {name: _said(parameter) for name, parameter in model.named_parameters()}, report, errors, used


def loaded_both_ways(shapes, checkpoint, rules, dtypes=None, **options):
    """The two outcomes: ours, and Transformers' own."""
    return tuple(loaded(load, shapes, checkpoint, rules, dtypes, **options) for load in (load_lazily, by_transformers))


def fitted(shapes, checkpoint, rules):
    """The shapes of a model for which a checkpoint has what fits, and how many operations fail then."""
    outcome = loaded(by_transformers, shapes, checkpoint, rules)
    if len(outcome) == 2:
        return shapes, 0
    return shapes | {name: found for name, found, _ in outcome[1]["mismatched_keys"]}, len(outcome[2])


def led_to(names, rules):
    """What a model has that rules lead to, by source, and the names without those that lead where others do."""
    copies = copy.deepcopy(rules)
    renamings = [rule for rule in copies if isinstance(rule, loading.WeightRenaming)]
    converters = {pattern: rule for rule in copies if hasattr(rule, "operations") for pattern in rule.source_patterns}
    found, by, kept = {}, {}, []
    for name in sorted(names, key=loading.dot_natural_key):
        renamed, pattern = loading.rename_source_key(name, renamings, list(dict.fromkeys(converters.values())))
        rule = converters.get(pattern, name)
        if by.setdefault(renamed, rule) is rule:
            patterns = [""] if pattern is None else rule.target_patterns
            found[renamed] = [renamed.replace(patterns[0], each) if each else renamed for each in patterns]
            kept.append(name)
    return list(found.values()), kept


def _plain(found):
    """A reported name, or a name and two shapes."""
    return found if isinstance(found, str) else (found[0], tuple(found[1]), tuple(found[2]))


def _said(parameter):
    """All there is to a parameter."""
    about = (type(parameter), tuple(parameter.shape), parameter.dtype, str(parameter.device), parameter.requires_grad)
    if not isinstance(parameter, LazyTensor):
        return about
    moves = [(move.source.name, move.dims, move.into, move.of) for move in parameter.moves]
    return (*about, parameter._is_hf_initialized, moves)
