"""`Graft.update`: new weights under original names, in place, from memory and from files, all of them or some."""

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import kernelgraft
import twins
import zoo
from allocations import Allocations
from kernelgraft.checkpoint.files import Checkpoint
from kernelgraft.conversion.lazy import LazyTensor, TensorSource
from kernelgraft.errors import ConversionError, GraftError
from twins import KINDS, assert_same_state, packed_pointers, pair


def saved(tensors, folder):
    """The file of a checkpoint that has these tensors."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


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
def test_of_nothing_all_is_left_in_the_original_s_order(kind):
    twin, _, graft = pair(kind)
    names = [name for name, _ in twin.named_parameters(remove_duplicate=False)]
    assert graft.update({}) == graft.update(iter([])) == names


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


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([1.0], "comes as a list"),
        (torch.empty(zoo.H, zoo.H, device="meta"), "on the meta device, which has no values"),
    ],
)
@pytest.mark.parametrize("name", ["embed.weight", "mix.q.weight"])
def test_a_value_that_has_none(name, value, said):
    twin, model, graft = pair("zoo")
    with pytest.raises(GraftError, match=f"{name} .*{said}"):
        graft.update({name: value})
    assert_same_state(model.state_dict(), twin.state_dict())


def test_a_parameter_of_which_the_kernel_has_narrower_values():
    model = zoo.model()
    graft = kernelgraft.graft(model, {"Legacy": zoo.NarrowedLegacy}, example_inputs=zoo.inputs())
    with pytest.raises(ConversionError, match=r"legacy\.weight cannot be updated: .* a cast on the way narrows"):
        graft.update({"legacy.weight": torch.ones(zoo.H, zoo.H)})
    assert "legacy.weight" in graft.update({"legacy.bias": torch.ones(zoo.H)})


# --- any part, in any order, from anywhere

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def strided(tensor):
    """The same values in memory that is neither contiguous nor the first of its storage."""
    return torch.stack([torch.zeros_like(tensor), tensor], -1)[..., 1]


@st.composite
def updates(draw, names):
    """Names in some order, a few of them twice, and how the values of each come."""
    chosen = draw(st.lists(st.sampled_from(names), max_size=2 * len(names)))
    ways = st.tuples(st.sampled_from(FLOATS), st.booleans(), st.integers(0, 2**31))
    return [(name, *draw(ways)) for name in chosen]


@pytest.fixture(scope="module")
def grafted():
    return pair("zoo")


@settings(max_examples=60, deadline=None)
@given(data=st.data(), streamed=st.booleans())
def test_some_of_it_is_as_in_the_untouched_model(grafted, data, streamed):
    twin, model, graft = grafted
    shapes = {name: tensor.shape for name, tensor in twin.state_dict().items() if tensor.is_floating_point()}
    given = []
    for name, dtype, is_strided, seed in data.draw(updates(sorted(shapes))):
        value = torch.randn(shapes[name], generator=torch.Generator().manual_seed(seed)).to(dtype)
        given.append((name, strided(value) if is_strided else value))
    before = packed_pointers(model)
    with Allocations() as allocated:
        left = graft.update(iter(given) if streamed else dict(given))
    twin.load_state_dict(dict(given), strict=False)
    assert allocated.found == {}
    assert packed_pointers(model) == before
    assert_same_state(model.state_dict(), twin.state_dict())
    assert left == [name for name, _ in twin.named_parameters() if name not in dict(given)]


class StraddlingLayout(nn.Module):
    """A row of weights and what comes after it, cut where neither ends: left and right (23, 2)."""

    packing = {
        side: {
            "sources": ["a", "b"],
            "operations": [["concatenate"], ["reshape", [23, 4]], ["chunk", index, 2, 1]],
        }
        for index, side in enumerate(("left", "right"))
    }

    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.Parameter(torch.empty(23, 2)) for _ in range(2))


class Straddling(nn.Module):
    def forward(self, x):
        return x + torch.cat([self.left, self.right], 1).view(-1)


class Row(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(90)), nn.Parameter(torch.randn(2))

    def forward(self, x):
        return x + torch.cat([self.a, self.b])


@pytest.mark.parametrize("see", [torch.clone, strided, lambda tensor: torch.stack([tensor, tensor])[1]])
@pytest.mark.parametrize("lazy", [False, True])
def test_pieces_that_no_slice_gives(see, lazy):
    with kernelgraft.recorded():
        model = nn.Sequential(Row())
    graft = kernelgraft.graft(model, {"Row": Straddling}, example_inputs=torch.zeros(92))
    new = {"0.a": torch.randn(90), "0.b": torch.randn(2)}
    given = {name: see(tensor) for name, tensor in new.items()}
    if lazy:
        given = {name: LazyTensor.of(TensorSource(name, tensor)) for name, tensor in given.items()}
    assert graft.update(given) == []
    twins.assert_same_tensors(model.state_dict(), new)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_stream_holds_one_tensor_at_a_time(lazy):
    _, _, graft = pair("zoo")
    new = zoo.model(1).state_dict()
    alive = []

    def stream():
        for name, tensor in new.items():
            assert [each() for each in alive if each() is not None] == []
            made = LazyTensor.of(TensorSource(name, tensor)) if lazy else tensor.clone()
            alive.append(weakref.ref(made))
            yield name, made
            del made

    assert graft.update(stream()) == []
    assert len(alive) == len(new)


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_a_subclass(kind):
    _, model, graft = pair(kind)
    new = twins.untouched(kind, seed=1).state_dict()
    assert graft.update({name: tensor.as_subclass(Subclass) for name, tensor in new.items()}) == []
    assert_same_state(model.state_dict(), new)


def test_values_that_are_parameters_in_use():
    _, model, graft = pair("zoo")
    other = zoo.model(1)
    loss = other(zoo.inputs()).sum()
    graft.update(other.named_parameters())
    loss.backward()  # its own were only read
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_inference_mode(inside, made_inside, tmp_path):
    with torch.inference_mode(made_inside):
        _, model, graft = pair("zoo")
    assert all(parameter.is_inference() is made_inside for parameter in model.parameters())
    news = [zoo.model(seed).state_dict() for seed in (1, 2)]
    before = packed_pointers(model)
    with torch.inference_mode(inside), Checkpoint([saved(news[1], tmp_path)]) as lazy:
        for new, given in zip(news, ({name: each.clone() for name, each in news[0].items()}, lazy), strict=True):
            assert graft.update(given) == []
            assert graft.update({name: given[name] for name in ("mix.k.bias", "norm.weight")})
            twins.assert_same_tensors(model.state_dict(), new)
    assert packed_pointers(model) == before


def test_two_grafts_in_two_threads():
    pairs = [pair("zoo", seed) for seed in range(2)]
    new = [zoo.model(2 + seed).state_dict() for seed in range(2)]
    barrier = threading.Barrier(2)

    def work(index):
        barrier.wait()
        for _ in range(20):
            pairs[index][2].update(pairs[index][0].state_dict())
            assert pairs[index][2].update(iter(new[index].items())) == []

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    for (_, model, _), state in zip(pairs, new, strict=True):
        assert_same_state(model.state_dict(), state)


@pytest.mark.transformers
def test_modules_that_were_only_rebound():
    import tiny

    def rotary(q, k, cos, sin, unsqueeze_dim=1):
        return q, k

    model = tiny.model("llama")
    new = tiny.model("llama", seed=1).state_dict()
    graft = kernelgraft.graft(model, {"RMSNorm": f"{tiny.EXAMPLE}:CustomRMSNorm", "rotary_pos_emb": rotary})
    some = {name: tensor for name, tensor in new.items() if "self_attn" in name}
    assert not {*some} & {*graft.update(some)}
    assert graft.update(new) == []
    assert_same_state(model.state_dict(), new)
