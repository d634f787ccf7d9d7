"""`Graft.update`: new weights under original names, in place, part by part."""

import pytest
import torch

import twins
import zoo
from allocations import Allocations
from kernelgraft.errors import GraftError
from twins import KINDS, assert_same_state, packed_pointers, pair


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_in_place_without_a_second_copy(kind):
    _, model, graft = pair(kind)
    new = twins.untouched(kind, seed=1).state_dict()
    before = packed_pointers(model)
    with Allocations() as allocated:
        assert graft.update((name, tensor) for name, tensor in new.items()) == []
    assert allocated.found == {}
    assert_same_state(model.state_dict(), new)
    assert packed_pointers(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_that_of_a_model_with_those_weights(kind):
    _, model, graft = pair(kind)
    other = twins.untouched(kind, seed=1).eval()
    graft.update(other.state_dict())
    torch.testing.assert_close(twins.run(kind, model.eval()), twins.run(kind, other))


@pytest.mark.parametrize("kind", KINDS)
def test_part_of_it_reports_what_is_left(kind):
    twin, model, graft = pair(kind)
    new = twins.untouched(kind, seed=1).state_dict()
    names = dict(twin.named_parameters(remove_duplicate=False))
    for name, parameter in names.items():
        left = graft.update({name: new[name]})
        assert set(left) == {other for other, each in names.items() if each is not parameter}
        twin.state_dict()[name].copy_(new[name])
        assert_same_state(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_named_parameters_of_an_untouched_model_are_all_of_it(kind):
    _, model, graft = pair(kind)
    other = twins.untouched(kind, seed=1)
    assert graft.update(other.named_parameters()) == []
    twins.assert_same_tensors(
        {name: tensor for name, tensor in model.state_dict().items() if "batch." not in name},
        {name: tensor for name, tensor in other.state_dict().items() if "batch." not in name},
    )


@pytest.mark.transformers
def test_either_name_of_a_tied_parameter():
    twin, model, graft = pair("qwen3-tied")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        new = torch.randn_like(twin.lm_head.weight)
        left = graft.update({name: new})
        assert not {"lm_head.weight", "model.embed_tokens.weight"} & set(left)
        assert torch.equal(model.lm_head.weight, new)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_buffers_and_what_a_layout_dropped():
    _, model, graft = pair("zoo")
    new = {
        "stats.batch.running_mean": torch.full((zoo.H,), 3.0),
        "stats.batch.num_batches_tracked": torch.tensor(7),
        "legacy.bias": torch.full((zoo.H,), 4.0),
    }
    graft.update(new)
    state = model.state_dict()
    twins.assert_same_tensors({name: state[name] for name in new}, new)
    assert torch.equal(model.stats.mean, new["stats.batch.running_mean"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_of_another_dtype_are_cast(dtype):
    twin, model, graft = pair("zoo")
    new = {name: t.to(dtype) if t.is_floating_point() else t for name, t in zoo.model(1).state_dict().items()}
    graft.update(new)
    twin.load_state_dict(new)
    assert_same_state(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("mix.qq.weight", "mix.q.weight"),
        ("mix.qkv.weight", "mix.q.weight"),
        ("blocks.0.norm.scale", "blocks.0.norm.weight"),
        ("blocks.1.gate.w4.weight", "blocks.1.gate.w3.weight"),
        ("embed.wait", "embed.weight"),
        ("legacy.bia", "legacy.bias"),
    ],
)
def test_a_name_that_is_none_of_the_model(name, near):
    twin, model, graft = pair("zoo")
    with pytest.raises(GraftError, match=f"'{name}' is no parameter of the model.*{near}.*original names"):
        graft.update({name: torch.ones(zoo.H)})
    assert_same_state(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("name", ["mix.q.weight", "wide.both.weight", "norm.weight", "embed.weight", "legacy.bias"])
def test_a_shape_that_does_not_fit(name):
    twin, model, graft = pair("zoo")
    shape = list(twin.state_dict()[name].shape)
    with pytest.raises(GraftError, match=rf"{name} has shape \[{shape[0]}.*update brings \[3, 1\]"):
        graft.update({name: torch.ones(3, 1)})
    assert_same_state(model.state_dict(), twin.state_dict())


def test_what_came_before_an_error_has_been_written():
    _, model, graft = pair("zoo")
    with pytest.raises(GraftError, match="'nothing'"):
        graft.update([("norm.weight", torch.full((zoo.H,), 5.0)), ("nothing", torch.ones(1))])
    assert torch.equal(model.norm.scale, torch.full((zoo.H,), 5.0))


def test_a_graft_that_was_removed_updates_nothing():
    twin, model, graft = pair("zoo")
    graft.remove()
    with pytest.raises(GraftError, match="removed"):
        graft.update(zoo.model(1).state_dict())
    assert_same_state(model.state_dict(), twin.state_dict())
