"""`Graft.update` of a model that is no longer as it was: memory of another kind, other modules, no memory at all."""

import contextlib
import copy
import re
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.nn.utils import parametrize, prune

import kernelgraft
import twins
import zoo
from kernelgraft.errors import GraftError
from test_update import saved
from twins import assert_same_state, packed_pointers, pair


def half(model):
    return model.to(torch.bfloat16)


def assigned(model):
    model.load_state_dict(zoo.model(2).state_dict(), assign=True)


def assigned_in_half(model):
    model.load_state_dict(zoo.model(2).to(torch.bfloat16).state_dict(), assign=True)


def onto_meta_and_back(model):
    model.to("meta").to_empty(device="cpu")


def with_a_data_of_its_own(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


@contextlib.contextmanager
def future(flag):
    switch = getattr(torch.__future__, f"set_{flag}_module_params_on_conversion")
    switch(True)
    try:
        yield
    finally:
        switch(False)


CHANGES = (half, assigned, assigned_in_half, onto_meta_and_back, with_a_data_of_its_own)


@pytest.mark.parametrize("flag", [None, "swap", "overwrite"])
@pytest.mark.parametrize("change", CHANGES)
def test_new_memory_is_what_is_written(change, flag):
    _, model, graft = pair("zoo")
    news = [zoo.model(seed).state_dict() for seed in (3, 4)]
    graft.update(news[0])
    with contextlib.nullcontext() if flag is None else future(flag):
        change(model)
        before = packed_pointers(model)
        assert graft.update(news[1]) == []
        assert packed_pointers(model) == before
    found = model.state_dict()
    twins.assert_same_tensors(found, {name: tensor.to(found[name].dtype) for name, tensor in news[1].items()})


def test_memory_that_changes_while_tensors_stream():
    _, model, graft = pair("zoo")
    new = zoo.model(1).state_dict()
    middle = len(new) // 2

    def stream():
        for index, item in enumerate(new.items()):
            if index == middle:
                half(model)
            yield item

    assert graft.update(stream()) == []
    found = model.state_dict()
    twins.assert_same_tensors(found, {name: tensor.to(found[name].dtype) for name, tensor in new.items()})


class Given(dict):
    """A mapping that does something between two of its tensors."""

    def __init__(self, tensors, before, do):
        super().__init__(tensors)
        self.before, self.do = before, do

    def items(self):
        for name, tensor in super().items():
            if name == self.before:
                self.do()
            yield name, tensor


@pytest.mark.parametrize("streamed", [False, True])
def test_a_module_that_is_replaced_between_two_of_its_tensors(streamed):
    _, model, graft = pair("zoo")
    old, other = model.head, nn.Linear(zoo.H, zoo.H)
    new = {name: torch.ones_like(tensor) for name, tensor in old.state_dict(prefix="head.").items()}
    kept = old.bias.clone()
    given = Given(new, "head.bias", lambda: setattr(model, "head", other))
    graft.update(given.items() if streamed else given)
    assert old.weight.eq(1).all()
    assert torch.equal(old.bias, kept)
    assert other.bias.eq(1).all()


def test_memory_that_was_let_go_is_not_held():
    _, model, graft = pair("zoo")
    graft.update(zoo.model(1).state_dict())
    held = [weakref.ref(parameter) for parameter in model.parameters()]
    assigned_in_half(model)
    assert [each() for each in held if each() is not None] == []


def test_a_module_that_was_replaced():
    _, model, graft = pair("zoo")
    graft.update(zoo.model(1).state_dict())
    old = model.head
    model.head = nn.Sequential(nn.Linear(zoo.H, zoo.H), nn.BatchNorm1d(zoo.H))
    kept = copy.deepcopy(old.state_dict())
    with pytest.raises(GraftError, match=r"'head\.weight' is no parameter.*head\.0\.weight"):
        graft.update({"head.weight": torch.ones(zoo.H, zoo.H)})
    left = graft.update({"head.0.weight": torch.ones(zoo.H, zoo.H), "head.1.running_mean": torch.ones(zoo.H)})
    assert left[-3:] == ["head.0.bias", "head.1.weight", "head.1.bias"]
    assert model.head[0].weight.eq(1).all()
    assert model.head[1].running_mean.eq(1).all()
    assert_same_state(old.state_dict(), kept)


def test_parameters_that_were_tied_since():
    _, model, graft = pair("zoo")
    assert "head.weight" in graft.update({"embed.weight": torch.ones(zoo.H, zoo.H)})
    model.head.weight = model.embed.weight
    assert "head.weight" not in graft.update({"embed.weight": torch.ones(zoo.H, zoo.H)})
    assert "embed.weight" not in graft.update({"head.weight": torch.ones(zoo.H, zoo.H)})


class Scaled(nn.Module):
    """Has a bias from the first checkpoint on that has one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(zoo.H))
        self.register_parameter("bias", None)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if f"{prefix}bias" in state_dict:
            self.bias = nn.Parameter(torch.zeros(zoo.H))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x):
        return x * self.weight if self.bias is None else x * self.weight + self.bias


class ScalingLayout(nn.Module):
    packing = {"scale": "weight"}

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(zoo.H))


class Scaling(nn.Module):
    def forward(self, x):
        return x * self.scale


def test_a_parameter_that_an_original_has_since_it_was_loaded():
    with kernelgraft.recorded():
        model = nn.Sequential(Scaled())
    graft = kernelgraft.graft(model, {"Scaled": Scaling}, example_inputs=zoo.inputs())
    assert graft.update({}) == ["0.weight"]
    model.load_state_dict({"0.weight": torch.ones(zoo.H), "0.bias": torch.ones(zoo.H)})
    assert graft.update({}) == ["0.weight", "0.bias"]
    assert graft.update({"0.bias": torch.full((zoo.H,), 2.0)}) == ["0.weight"]
    assert model.state_dict()["0.bias"].eq(2).all()


@pytest.mark.parametrize("name", ["norm.weight", "mix.k.weight"])
def test_a_parameter_that_is_pruned_once_it_was_written(name):
    _, model, graft = pair("zoo")
    module, packed = (model.norm, "scale") if name == "norm.weight" else (model.mix.qkv, "weight")

    def stream():
        yield name, torch.ones_like(model.state_dict()[name])
        prune.identity(module, packed)

    left = graft.update(stream())
    assert left == [each for each, _ in zoo.model().named_parameters() if each != name]


NAMES = ("mix.k.weight", "norm.weight", "wide.both.weight", "embed.weight", "legacy.bias")


@pytest.mark.parametrize("name", NAMES)
def test_a_model_on_meta_has_no_memory_to_write(name):
    twin, model, graft = pair("zoo")
    model.to("meta")
    with pytest.raises(GraftError, match=f"{name} cannot be updated: it is on the meta device"):
        graft.update({name: twin.state_dict()[name]})


@pytest.mark.transformers
def test_offloaded_weights_are_not_missed():
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    _, model, graft = pair("qwen3")
    new = twins.untouched("qwen3", seed=1).state_dict()
    with graft.packed_names():
        cpu_offload(model, torch.device("cpu"))
    with pytest.raises(GraftError, match=r"offloaded to.*remove_hook_from_submodules"):
        graft.update(new)
    remove_hook_from_submodules(model)
    assert graft.update(new) == []
    assert_same_state(model.state_dict(), new)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: parametrize.register_parametrization(linear, "weight", Doubled()),
        lambda linear: prune.identity(linear, "weight"),
    ],
)
def test_a_packed_parameter_that_is_gone(change):
    twin, model, graft = pair("zoo")
    change(model.mix.qkv)
    change(model.mix.o)
    for name, packed in (("k", "qkv"), ("o", "o")):
        with pytest.raises(GraftError, match=rf"mix\.{name}\.weight .*mix\.{packed}\.weight.*parametrized or pruned"):
            graft.update({f"mix.{name}.weight": twin.mix.k.weight})
    assert graft.update({"mix.k.bias": torch.ones(zoo.H)})
    assert model.mix.qkv.bias[zoo.H : 2 * zoo.H].eq(1).all()


@pytest.mark.parametrize(
    "shape", [(12 * zoo.H, 1), (3 * zoo.H, 1), (zoo.H, 3 * zoo.H), (2 * zoo.H - 1, zoo.H), (1,), ()]
)
def test_a_packed_parameter_that_was_packed_again(shape):
    twin, model, graft = pair("zoo")
    packed = nn.Parameter(torch.zeros(shape, dtype=torch.uint8), requires_grad=False)
    model.mix.qkv.weight = packed
    with pytest.raises(GraftError, match=rf"mix\.qkv\.weight.*no longer.*{re.escape(str([*shape]))}.*torch\.uint8"):
        graft.update({"mix.k.weight": twin.mix.k.weight})
    assert packed.eq(0).all()


def test_a_value_that_fits_only_what_is_left_of_the_rows():
    _, model, graft = pair("zoo")
    packed = nn.Parameter(torch.zeros(2 * zoo.H - 1, zoo.H))
    model.mix.qkv.weight = packed
    with pytest.raises(GraftError, match=rf"mix\.k\.weight has shape \[{zoo.H}, .*brings \[{zoo.H - 1}, "):
        graft.update({"mix.k.weight": torch.ones(zoo.H - 1, zoo.H)})
    assert packed.eq(0).all()


class Unindexed(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__:
            raise NotImplementedError("no index")
        return super().__torch_function__(func, types, args, kwargs)


def test_packed_parameters_of_a_subclass():
    _, model, graft = pair("zoo")
    packed = torch.zeros(3 * zoo.H, zoo.H)
    model.mix.qkv.weight = nn.Parameter(packed.as_subclass(Unindexed))
    graft.update({"mix.k.weight": torch.ones(zoo.H, zoo.H)})
    assert packed.sum() == zoo.H**2
    assert packed[zoo.H : 2 * zoo.H].eq(1).all()


# --- distributed


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()])
def test_a_parameter_that_is_distributed_gets_its_part(mesh, placement, tmp_path):
    _, model, graft = pair("zoo")
    model.head.weight = nn.Parameter(distribute_tensor(model.head.weight.detach(), mesh, [placement]))
    new = torch.randn(3, zoo.H, zoo.H)
    graft.update({"head.weight": new[0]})
    assert torch.equal(model.head.weight.full_tensor(), new[0])
    graft.update(saved({"head.weight": new[1]}, tmp_path))
    assert torch.equal(model.head.weight.full_tensor(), new[1])
    graft.update({"head.weight": distribute_tensor(new[2], mesh, [placement])})
    assert torch.equal(model.head.weight.full_tensor(), new[2])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mix.k.weight", r"mix\.k\.weight is part of mix\.qkv\.weight.*DTensor.*full_tensor"),
        ("norm.weight", r"norm\.weight comes as a DTensor.*full_tensor"),
        ("embed.weight", r"embed\.weight comes as a DTensor.*full_tensor"),
    ],
)
def test_distributed_values_for_whole_parameters_are_refused(mesh, name, said):
    twin, model, graft = pair("zoo")
    with pytest.raises(GraftError, match=said):
        graft.update({name: distribute_tensor(twin.state_dict()[name], mesh, [Shard(0)])})
    assert_same_state(model.state_dict(), twin.state_dict())


def test_packed_parameters_that_are_distributed_are_refused(mesh):
    twin, model, graft = pair("zoo")
    model.mix.qkv.weight = nn.Parameter(distribute_tensor(model.mix.qkv.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(GraftError, match=r"mix\.k\.weight is part of mix\.qkv\.weight.*DTensor"):
        graft.update({"mix.k.weight": twin.mix.k.weight})
