"""What a grafted module answers beside state dicts: its original's forward, attributes, dtype, device and mode."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import kernelgraft
import tiny
import twins
import zoo
from kernelgraft.errors import GraftError
from twins import assert_same_state, pair

KINDS = (*twins.KINDS, pytest.param("llama", marks=pytest.mark.transformers))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


# --- the original's forward


@pytest.mark.parametrize("path", ["norm", "mix", "experts", "wide", "stats"])
@pytest.mark.parametrize("training", [False, True])
def test_reference_is_equal_bit_for_bit_where_strides_are_the_original_s(path, training):
    twin, model, graft = pair("zoo")
    outs = []
    with graft.reference():
        for root in (twin, model):
            module = root.get_submodule(path).train(training)
            outs.append(module(zoo.inputs()))
            outs[-1].pow(2).sum().backward()
    assert torch.equal(*outs)
    assert_same_state(model.state_dict(), twin.state_dict())  # the statistics that training changes among them
    graft.remove()
    for mine, theirs in zip(model.get_submodule(path).parameters(), twin.get_submodule(path).parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("kind", twins.TRANSFORMERS)
def test_reference_in_bfloat16(kind):
    twin, model, graft = pair(kind)
    twin, model = twin.bfloat16(), model.bfloat16()
    with graft.reference(), torch.no_grad():
        assert torch.equal(twins.run(kind, model), twins.run(kind, twin))


def test_kernel_and_reference_change_statistics_alike():
    twin, model, graft = pair("zoo")
    x = zoo.inputs()
    for root in (twin, model):
        root.stats.train()
        root.stats(x)
    with graft.reference():
        for root in (twin, model):
            root.stats(x)
    assert_same_state(model.stats.state_dict(), twin.stats.state_dict())
    assert model.stats.count == 2


def test_reference_follows_parameters_given_from_outside():
    twin, model, graft = pair("zoo")
    x = zoo.inputs()
    other = zoo.model(1).eval()
    donor = zoo.model(1)
    zoo.graft(donor)
    given = {**dict(donor.named_parameters()), **dict(donor.named_buffers())}
    with graft.reference(), torch.no_grad():
        out = functional_call(model.eval(), given, (x,))
    torch.testing.assert_close(out, other(x))
    assert_same_state(model.state_dict(), twin.state_dict())


class Forward(nn.Module):
    """Depends on its mode, keeps a bound method, and is changed by its own forward."""

    def __init__(self, hidden):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(hidden))
        self.drop = nn.Dropout(0.5)
        self.run = self.scaled
        self.shift = 1.0

    def scaled(self, x):
        return x * self.weight + self.shift

    def forward(self, x):
        return self.drop(self.run(x))


class FastForwardLayout(nn.Module):
    packing = {"scale": "weight"}

    def __init__(self, hidden):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(hidden))


class FastForward(nn.Module):
    def forward(self, x):
        return F.dropout(x * self.scale + self.shift, self.drop.p, self.training)


def forwards():
    with kernelgraft.recorded():
        model = nn.Sequential(nn.Linear(8, 8), Forward(8))
    twin = copy.deepcopy(model)
    twin[1].run = twin[1].scaled
    return twin, model, kernelgraft.graft(model, {"Forward": FastForward})


@pytest.mark.parametrize("reference", [False, True])
def test_the_mode_reaches_the_original(reference):
    twin, model, graft = forwards()
    x = torch.randn(5, 8)
    if reference:
        graft.reference().__enter__()
    for mode in (True, False, True):
        outs = []
        for root in (twin, model):
            root.train(mode)
            torch.manual_seed(0)
            outs.append(root(x))
        assert torch.equal(*outs)
    model[1].eval()
    graft.remove()
    assert not model[1].training
    assert not model[1].drop.training
    assert model.training


# --- attributes


def test_original_attributes(kind):
    twin, model, graft = pair(kind)
    for path in twins.slot_paths(graft):
        mine, theirs = model.get_submodule(path), twin.get_submodule(path)
        assert isinstance(mine, type(theirs))
        assert type(mine).__name__ == type(theirs).__name__
        assert type(mine).__module__ == type(theirs).__module__
        for name, parameter in theirs.named_parameters():
            at, _, last = name.rpartition(".")
            assert torch.equal(getattr(mine.get_submodule(at), last), parameter), name
        for name, value in vars(theirs).items():
            if isinstance(value, int | float | str) and not name.startswith("_"):
                assert getattr(mine, name) == value, name
        with pytest.raises(AttributeError, match="nothing_of_that_name"):
            _ = mine.nothing_of_that_name
        assert not hasattr(mine, "nothing_of_that_name")


def test_reading_an_original_parameter_gives_a_view_with_a_gradient():
    _, model, _ = pair("zoo")
    for path, (name, packing) in zoo.PLACES.items():
        if "running" in name:
            continue
        at, _, last = f"{path}.{name}".rpartition(".")
        read = getattr(model.get_submodule(at), last)
        read.sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert sum(grad.sum().item() for grad in grads) == read.numel(), path
        model.zero_grad()
        with torch.no_grad():
            read.fill_(0.25)
        if packing != "assembled":
            assert model.state_dict()[f"{path}.{name}"].eq(0.25).all(), path


def test_setting_a_parameter_that_is_packed_whole():
    _, model, graft = pair("zoo")
    given = nn.Parameter(torch.full((zoo.H,), 3.0))
    model.norm.weight = given
    assert model.norm.scale is given
    assert dict(model.named_parameters())["norm.scale"] is given
    graft.remove()
    assert model.norm.weight is given


@pytest.mark.parametrize(("path", "name"), [("twist", "weight"), ("stats", "affine"), ("norm", "scale")])
def test_setting_a_packed_parameter(path, name):
    _, model, _ = pair("zoo")
    given = nn.Parameter(torch.zeros_like(getattr(model.get_submodule(path), name)))
    setattr(model.get_submodule(path), name, given)
    assert dict(model.named_parameters())[f"{path}.{name}"] is given


def test_setting_a_part_is_refused():
    twin, model, _ = pair("zoo")
    with pytest.raises(GraftError, match=r"legacy\.weight is part of matrix.*load_state_dict"):
        model.legacy.weight = nn.Parameter(torch.zeros(zoo.H, zoo.H))
    assert_same_state(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize(
    "path", ["mix.q", "mix.qkv", "mix.o", "blocks.0.gate.w1", "experts.list", "wide.both", "twist.a"]
)
def test_replacing_a_child_whose_weights_are_packed_is_refused(path):
    twin, model, _ = pair("zoo")
    parent, _, name = path.rpartition(".")
    with pytest.raises(
        GraftError, match=rf"Linear would replace '{name}' of the graft at '{parent}'.*remove the graft"
    ):
        setattr(model.get_submodule(parent), name, nn.Linear(zoo.H, zoo.H))
    assert_same_state(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize(
    ("path", "parameter"),
    [("mix.q", "weight"), ("mix.q", "bias"), ("blocks.0.gate.w3", "weight"), ("wide.both", "weight")],
)
def test_setting_a_parameter_of_a_submodule_that_was_taken_over_is_refused(path, parameter):
    twin, model, _ = pair("zoo")
    given = nn.Parameter(torch.zeros_like(twin.get_submodule(path).get_parameter(parameter)))
    with pytest.raises(GraftError, match=r"packed for the kernel"):
        setattr(model.get_submodule(path), parameter, given)
    assert_same_state(model.state_dict(), twin.state_dict())
    assert not list(model.get_submodule(path).parameters())


def test_the_repr_says_what_runs_and_who_has_the_weights():
    _, model, _ = pair("zoo")
    text = repr(model)
    assert "Norm(kernel=FastNorm)" in text
    assert "(gate): Gate(\n" in text
    assert "absorbed by blocks.0.norm" in text
    assert "absorbed by mix" in text


def test_a_submodule_that_was_taken_over_runs_alone():
    twin, model, _ = pair("zoo")
    x = zoo.inputs()
    for path in ("mix.q", "wide.both", "experts.list.1"):
        assert torch.equal(model.get_submodule(path)(x), twin.get_submodule(path)(x))


def test_nothing_of_the_originals_is_a_registered_module(kind):
    twin, model, _ = pair(kind)
    total = sum(parameter.numel() for parameter in twin.parameters())
    dropped = zoo.H if kind == "zoo" else 0
    assert sum(parameter.numel() for parameter in model.parameters()) == total - dropped
    assert all(parameter.numel() for parameter in model.parameters())


# --- moving


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half(),
        lambda model: model.double(),
        lambda model: model.to(torch.bfloat16).float(),
        lambda model: model.to("cpu", torch.float64),
    ],
    ids=["bfloat16", "half", "double", "and back", "device and dtype"],
)
def test_dtypes(kind, move):
    twin, model, graft = pair(kind)
    assert move(model) is model
    move(twin)
    assert_same_state(model.state_dict(), twin.state_dict())
    assert {p.dtype for p in model.parameters()} == {p.dtype for p in twin.parameters()}
    with torch.no_grad():
        assert torch.isfinite(twins.run(kind, model.eval()) if kind != "zoo" else model.norm.scale).all()
    before = list(twin.named_parameters())
    graft.remove()
    assert_same_state(model.state_dict(), twin.state_dict())
    assert [(n, p.dtype, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.dtype, p.requires_grad) for n, p in before
    ]


def test_to_meta(kind):
    twin, model, _ = pair(kind)
    found, expected = model.to("meta").state_dict(), twin.to("meta").state_dict()
    assert [(n, t.shape, t.dtype, t.device) for n, t in found.items()] == [
        (n, t.shape, t.dtype, t.device) for n, t in expected.items()
    ]
    assert found._metadata == expected._metadata
    assert all(parameter.is_meta for parameter in model.parameters())


def test_to_empty_and_loaded_again(kind):
    _, model, _ = pair(kind)
    state = twins.untouched(kind, seed=1).state_dict()
    pointers = twins.packed_pointers(model.to("meta").to_empty(device="cpu"))
    model.load_state_dict(state)
    assert twins.packed_pointers(model) == pointers
    twins.assert_same_tensors(model.state_dict(), state)


def test_freezing(kind):
    twin, model, graft = pair(kind)
    model.eval().requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not twins.run(kind, model).requires_grad
    with graft.reference():
        assert not twins.run(kind, model).requires_grad
    graft.remove()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == (["legacy.bias"] if kind == "zoo" else [])
    assert_same_state(model.state_dict(), twin.state_dict())


def test_shared_memory(kind):
    twin, model, _ = pair(kind)
    assert model.share_memory() is model
    assert all(tensor.is_shared() for tensor in (*model.parameters(), *model.buffers()))
    assert_same_state(model.state_dict(), twin.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(twins.run(kind, model.eval()), twins.run(kind, twin.eval()))


def test_freezing_an_absorbed_module_freezes_what_holds_its_weights():
    model = tiny.model("qwen3")
    graft = kernelgraft.graft(model, tiny.guide_config())
    layer = model.model.layers[0]
    layer.mlp.requires_grad_(False)
    host = layer.post_attention_layernorm
    frozen = {name for name, parameter in host.named_parameters() if not parameter.requires_grad}
    assert frozen == {"gate_up_proj.weight", "down_proj.weight"}
    assert host.scale.requires_grad
    graft.remove()
    assert not any(parameter.requires_grad for parameter in layer.mlp.parameters())
    assert layer.post_attention_layernorm.weight.requires_grad
