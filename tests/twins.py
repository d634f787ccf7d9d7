"""A grafted model beside an untouched one with the same weights, and how the two are compared."""

import copy
import gc
from contextlib import suppress

import pytest
import torch
from torch import nn

import kernelgraft
import zoo

KINDS = ("zoo", *(pytest.param(kind, marks=pytest.mark.transformers) for kind in ("qwen3", "qwen3-tied", "llama-tied")))
"""Models to graft: one with every packing, and some for the guide's two kernels, tied and not."""

TRANSFORMERS = tuple(pytest.param(kind, marks=pytest.mark.transformers) for kind in ("qwen3", "llama", "llama-tied"))


def untouched(kind, seed=0):
    """A model without a graft."""
    if kind == "zoo":
        return zoo.model(seed)
    tiny = pytest.importorskip("tiny")
    name, _, tied = kind.partition("-")
    return tiny.model(name, seed, tie_word_embeddings=bool(tied))


def graft(kind, model):
    """Put the kernels for this kind in."""
    if kind == "zoo":
        return zoo.graft(model)
    tiny = pytest.importorskip("tiny")
    return kernelgraft.graft(model, tiny.guide_config())


def pair(kind, seed=0):
    """An untouched model, the same one grafted, and the graft."""
    twin = untouched(kind, seed)
    model = copy.deepcopy(twin) if kind != "zoo" else zoo.model(seed)
    return twin, model, graft(kind, model)


def run(kind, model):
    """One forward's output."""
    if kind == "zoo":
        return model(zoo.inputs())
    tiny = pytest.importorskip("tiny")
    return model(**tiny.inputs(kind.partition("-")[0])).logits


def slot_paths(graft):
    """Every path of the graft: hosts and what they absorbed."""
    return [path for site in graft.plan.sites for path in site.paths]


def assert_same_state(found, expected):
    """Two state dicts: keys, order, metadata, values bit for bit, dtypes."""
    assert list(found) == list(expected)
    assert getattr(found, "_metadata", None) == getattr(expected, "_metadata", None)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].requires_grad == tensor.requires_grad, name
        assert torch.equal(found[name], tensor), name


def assert_same_tensors(found, expected):
    """Two dicts of tensors with the same names and bits, in any order."""
    assert set(found) == set(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def packed_pointers(model):
    """Every parameter and buffer as an object, and its address."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: (id(tensor), type(tensor), tensor.data_ptr()) for name, tensor in named}


def identities(model):
    """What makes a model the very same: its class, modules and parameters as objects, their flags and bytes."""
    modules = [(path, id(module), type(module), module.training) for path, module in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters(remove_duplicate=False)]
    return modules, parameters


def storages():
    """Address and bytes of all memory that a tensor of this process has; what a compiler keeps of tensors has none."""
    found = set()
    for tensor in gc.get_objects():
        if type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            with suppress(RuntimeError):  # in torch 2.11: "an invalid python storage"
                found.add((storage.data_ptr(), storage.nbytes()))
    return found


def live_bytes():
    """Bytes of all storages that any tensor of this process holds."""
    gc.collect()
    return sum(dict(sorted(storages())).values())  # of several at one address the largest
