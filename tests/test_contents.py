"""What is in a module: the names that torch gives, whatever is shared, in whatever order it stands."""

import pytest
import torch
from torch import nn

import toys
from kernelgraft.contents import Contents, joined
from kernelgraft.tree import saved_tensors


def shared():
    """A module that stands at two places, a parameter with two names, buffers that are saved and that are not."""
    model = nn.Module()
    model.first = nn.Linear(2, 3)
    model.inner = nn.Module()
    model.inner.again = model.first
    model.inner.norm = nn.BatchNorm1d(3)
    model.inner.tied = nn.Linear(2, 3)
    model.inner.tied.weight = model.first.weight
    model.nothing = None
    model.register_parameter("none", None)
    model.register_buffer("table", torch.ones(2))
    model.register_buffer("scratch", model.table, persistent=False)
    model.register_buffer("empty", None)
    model.inner.register_buffer("mask", torch.ones(1), persistent=False)
    return model


@pytest.mark.parametrize("model", [shared(), toys.model(), nn.Module(), nn.Linear(2, 2)])
def test_it_is_what_torch_says(model):
    contents = Contents(model)

    def same(ours, theirs):
        theirs = list(theirs)
        return [(name, id(each)) for name, each in ours] == [(name, id(each)) for name, each in theirs]

    assert same(contents.all_modules, model.named_modules(remove_duplicate=False))
    assert same(contents.modules, model.named_modules())
    assert same(contents.all_parameters.items(), model.named_parameters(remove_duplicate=False))
    assert same(contents.parameters.items(), model.named_parameters())
    assert same(contents.buffers.items(), model.named_buffers())
    assert same(contents.saved.items(), saved_tensors(model).items())
    assert list(contents.saved) == list(model.state_dict())
    named = (*model.named_parameters(), *model.named_buffers())
    assert contents.shapes == tuple((name, tuple(tensor.shape)) for name, tensor in named)


def test_names_below_a_path():
    assert [joined("a.b", "c"), joined("", "c"), joined("a.b", ""), joined("", "")] == ["a.b.c", "c", "a.b", ""]
