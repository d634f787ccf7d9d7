"""The classes of grafted modules: one for each combination, shared by all instances; see also test_standing_in.py."""

import copy
import gc
import weakref

import kernelgraft
import toys
from kernelgraft import KernelConfig
from kernelgraft.binding import bound_class


def graft(model, kernel):
    return kernelgraft.graft(model, KernelConfig({toys.FUSION: kernel}), example_inputs=toys.inputs())


def test_all_layers_of_all_models_share_one_class():
    kernel = toys.kernel(toys.norm_mlp, toys.NormMLPLayout)
    models = [toys.model(3), toys.model(2)]
    for model in models:
        graft(model, kernel)
    hosts = [layer.norm for model in models for layer in model.layers]
    assert len({type(each) for each in hosts}) == 1
    assert len({type(layer.mlp) for model in models for layer in model.layers}) == 1
    assert bound_class(type(hosts[0])._kernelgraft_maker) is type(hosts[0])
    assert type(copy.deepcopy(hosts[0])) is type(hosts[0])


def test_it_is_of_the_originals_class_and_of_the_layouts():
    model = toys.model()
    original = type(model.layers[0].norm)
    with graft(model, toys.kernel(toys.norm_mlp, toys.NormMLPLayout)):
        host = model.layers[0].norm
        assert isinstance(host, original)
        assert isinstance(host, toys.NormMLPLayout)
        assert (type(host).__name__, type(host).__module__) == (original.__name__, original.__module__)
        assert "forward" not in vars(host)  # that place belongs to accelerate
    assert type(host) is not original
    assert type(model.layers[0].norm) is original


def test_another_kernel_makes_another_class_and_one_that_nobody_uses_is_let_go():
    first, second = (toys.kernel(toys.norm_mlp, toys.NormMLPLayout) for _ in range(2))
    model, other = toys.model(), toys.model()
    graft(model, first)
    graft(other, second)
    made = type(model.layers[0].norm)
    assert type(other.layers[0].norm) is not made
    gone = weakref.ref(made)
    del made, model
    gc.collect()
    assert gone() is None
