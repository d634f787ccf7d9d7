"""`load_state_dict()` of a grafted model: what it takes, what it reports, and where the values go."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import kernelgraft
import twins
import zoo
from twins import KINDS, assert_same_state, packed_pointers, pair

PACKED = {"zoo": "blocks.0.norm.w12", "qwen3": "model.layers.0.post_attention_layernorm.gate_up_proj.weight"}


def report(model, state, **options):
    """What `load_state_dict` says: the lists it returns, or its error's text."""
    try:
        return model.load_state_dict(state, **options)
    except RuntimeError as error:
        return str(error)


def merged_names(graft):
    """Original names of parameters that are parts of a packed one."""
    slots = graft._slots().items()
    return [f"{path}.{name}" for path, slot in slots for name, part in slot.parts.items() if part.kind != "whole"]


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_it_in_place(kind):
    twin, model, _ = pair(kind)
    other = twins.untouched(kind, seed=1)
    before = packed_pointers(model)
    assert report(model, other.state_dict()) == report(twin, other.state_dict())
    assert_same_state(model.state_dict(), other.state_dict())
    assert packed_pointers(model) == before
    twin.eval(), model.eval()
    torch.testing.assert_close(twins.run(kind, model), twins.run(kind, twin))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["zoo", pytest.param("qwen3", marks=pytest.mark.transformers)])
def test_reports_are_those_of_the_untouched_model(kind, strict):
    twin, model, graft = pair(kind)
    state = dict(twin.state_dict())
    merged = merged_names(graft)
    renamed = [name for name, packed in graft.names.items() if name not in merged and packed not in ((name,), ())]
    cases = {
        "nothing": {},
        "a part missing": {name: state[name] for name in state if name != merged[0]},
        "a renamed one missing": {name: state[name] for name in state if name != renamed[0]},
        "an unknown one": state | {merged[0] + "s": torch.ones(1), "x": torch.ones(1), "x.y": torch.ones(1)},
        "a packed name": state | {PACKED[kind]: torch.ones(1)},
        "packed names alone": dict(model.named_parameters()),
        "no tensor": state | {merged[0]: 3},
    }
    for what, given in cases.items():
        assert report(model, given, strict=strict) == report(twin, given, strict=strict), what
        assert_same_state(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("kind", ["zoo", pytest.param("qwen3", marks=pytest.mark.transformers)])
def test_wrong_shapes_are_refused_also_where_their_sum_would_fit(kind):
    twin, model, graft = pair(kind)
    state = dict(twin.state_dict())
    first, second = merged_names(graft)[:2]
    wrong = state | {first: torch.cat([state[first], state[first][:1]]), second: state[second][:-1]}
    text = report(model, wrong)
    assert text == report(twin, wrong)
    assert text.count("size mismatch") == 2
    assert_same_state(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_one_part_at_a_time(kind):
    twin, model, _ = pair(kind)
    other = twins.untouched(kind, seed=1).state_dict()
    before = packed_pointers(model)
    for name, tensor in other.items():
        given = {name: tensor}
        assert report(model, given, strict=False) == report(twin, given, strict=False)
        if name.endswith("weight"):
            assert_same_state(model.state_dict(), twin.state_dict())
    assert_same_state(model.state_dict(), other)
    assert packed_pointers(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_one_module_at_a_time(kind):
    twin, model, graft = pair(kind)
    other = twins.untouched(kind, seed=1)
    paths = twins.slot_paths(graft)
    for path in [*paths, *dict.fromkeys(path.rpartition(".")[0] for path in paths)]:
        state = other.get_submodule(path).state_dict()
        mine, theirs = model.get_submodule(path), twin.get_submodule(path)
        assert report(mine, state) == report(theirs, state)
        assert report(mine, {}) == report(theirs, {})
        assert report(mine, state | {"z.weight": torch.ones(1)}) == report(theirs, state | {"z.weight": torch.ones(1)})
        assert_same_state(model.state_dict(), twin.state_dict())


def test_inside_another_module():
    twin, model, _ = pair("zoo")
    outer, other = nn.ModuleDict({"in": model}), nn.ModuleDict({"in": zoo.model(1)})
    assert report(outer, {}) == report(nn.ModuleDict({"in": twin}), {})
    outer.load_state_dict(other.state_dict())
    assert_same_state(outer.state_dict(), other.state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_assigned(kind, dtype):
    twin, model, graft = pair(kind)
    state = twins.untouched(kind, seed=1).to(dtype).state_dict()
    assert report(model, state, assign=True) == report(twin, state, assign=True)
    assert_same_state(model.state_dict(), twin.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    # Nothing of what was there is kept alive: neither beside the packed ones nor in the originals without bytes.
    for slot in graft._slots().values():
        for name in slot.parts:
            assert slot.skeleton.get_parameter(name).numel() == 0 if "batch" not in name else True
    with graft.packed_names():
        dtypes = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    assert dtypes == {dtype}
    model.to(torch.float32), twin.to(torch.float32)
    assert_same_state(model.state_dict(), twin.state_dict())
    model.eval(), twin.eval()
    torch.testing.assert_close(twins.run(kind, model), twins.run(kind, twin))
    graft.remove()
    assert_same_state(model.state_dict(), twin.state_dict())


def test_a_whole_parameter_that_is_assigned_is_the_one_given():
    _, model, graft = pair("zoo")
    given = nn.Parameter(torch.full((zoo.H,), 2.0))
    model.load_state_dict({"norm.weight": given}, strict=False, assign=True)
    assert dict(model.named_parameters())["norm.scale"] is given
    graft.remove()
    assert model.norm.weight is given


def test_a_part_that_is_assigned_in_its_dtype_goes_into_place():
    twin, model, _ = pair("zoo")
    before = packed_pointers(model)
    given = {"mix.k.weight": torch.full((zoo.H, zoo.H), 2.0)}
    for each in (model, twin):
        each.load_state_dict(given, strict=False, assign=True)
    assert_same_state(model.state_dict(), twin.state_dict())
    assert packed_pointers(model) == before
    given["mix.k.weight"].zero_()  # it is not shared with what was given
    assert model.state_dict()["mix.k.weight"].max() == 2


@pytest.mark.parametrize("first", ["q", "k", "v"])
def test_parts_of_one_packed_parameter_cannot_be_assigned_in_different_dtypes(first):
    twin, model, _ = pair("zoo")
    state = twin.state_dict()
    mixed = {name: t.to(torch.bfloat16) if name == f"mix.{first}.weight" else t for name, t in state.items()}
    with pytest.raises(RuntimeError, match=rf"mix\.{first}\.weight .*torch\.bfloat16.*qkv\.weight"):
        model.load_state_dict(mixed, assign=True)
    assert_same_state(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_assigned_onto_meta(kind):
    twin, model, _ = pair(kind)
    state = twins.untouched(kind, seed=1).state_dict()
    expected = {name: tensor.clone() for name, tensor in state.items()}
    model.to("meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert list(model.state_dict()) == list(twin.state_dict())
    model.load_state_dict(state, assign=True)
    twins.assert_same_tensors(model.state_dict(), expected)
    assert not any(parameter.is_meta for parameter in model.parameters())


@contextlib.contextmanager
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@contextlib.contextmanager
def overwriting():
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.parametrize("flag", [swapping, overwriting])
@pytest.mark.parametrize("kind", KINDS)
def test_under_the_future_flags(kind, flag):
    twin, model, graft = pair(kind)
    other = twins.untouched(kind, seed=1).state_dict()
    half = {name: tensor.to(torch.bfloat16) for name, tensor in other.items()}
    with flag():
        for change in (
            lambda each: each.to(torch.bfloat16),
            lambda each: each.to(torch.float32),
            lambda each: each.load_state_dict(other),
            lambda each: each.load_state_dict(half, assign=True),
            lambda each: each.float(),
        ):
            change(twin), change(model)
            assert_same_state(model.state_dict(), twin.state_dict())
        twin.eval(), model.eval()
        torch.testing.assert_close(twins.run(kind, model), twins.run(kind, twin))
        graft.remove()
    assert_same_state(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("name", ["mix.k.weight", "norm.weight", "wide.both.weight", "twist.a.weight"])
@pytest.mark.parametrize("load", ["load_state_dict", "update"])
def test_autograd_notices(name, load):
    twin, model, graft = pair("zoo")
    given = {name: twin.state_dict()[name].clone()}
    loss = model(zoo.inputs()).sum()
    graft.update(given) if load == "update" else model.load_state_dict(given, strict=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("where", ["mix", "mix.q", "blocks.0.gate"])
def test_hooks_on_loading_run_once_where_they_were(where):
    twin, model = zoo.model(), zoo.model()
    logs = []
    for root in (twin, model):
        log = []
        logs.append(log)
        module = root.get_submodule(where)
        module.register_load_state_dict_pre_hook(lambda m, state, prefix, *_, log=log: log.append(("pre", prefix)))
        module.register_load_state_dict_post_hook(lambda m, keys, log=log: log.append(("post", keys)))
    zoo.graft(model)
    for root in (twin, model):
        root.load_state_dict(zoo.model(1).state_dict())
    assert logs[0] == logs[1] != []


def test_a_hook_that_renames_old_keys_for_its_children():
    twin, model = zoo.model(), zoo.model()

    def rename(module, state, prefix, *_):
        for name in [name for name in state if name.startswith(f"{prefix}gate_")]:
            state[name.replace("gate_", "w")] = state.pop(name)

    for root in (twin, model):
        root.blocks[0].gate.register_load_state_dict_pre_hook(rename)
    zoo.graft(model)
    new = zoo.model(1).state_dict()
    old = {name.replace("blocks.0.gate.w", "blocks.0.gate.gate_"): tensor for name, tensor in new.items()}
    for root in (twin, model):
        assert root.load_state_dict(old) == nn.modules.module._IncompatibleKeys([], [])
    assert_same_state(model.state_dict(), twin.state_dict())
    assert_same_state(model.state_dict(), new)


def test_versions_of_older_checkpoints():
    twin, model, _ = pair("zoo")
    state = zoo.model(1).state_dict()
    for change in (lambda metadata: None, lambda metadata: metadata.clear()):
        given = state.copy()
        given._metadata = state._metadata.copy()
        change(given._metadata)
        del given["stats.batch.num_batches_tracked"]
        assert report(model, given) == report(twin, given)
        assert_same_state(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_submodule_that_was_taken_over(kind):
    twin, model, _ = pair(kind)
    other = twins.untouched(kind, seed=1)
    before = packed_pointers(model)
    for path in (
        ("mix.k", "wide.both", "experts.list", "blocks.1.gate.w2")
        if kind == "zoo"
        else (
            "model.layers.0.mlp.up_proj",
            "model.layers.1.mlp.down_proj",
        )
    ):
        state = other.get_submodule(path).state_dict()
        mine, theirs = model.get_submodule(path), twin.get_submodule(path)
        wrong = {name: tensor[:-1] for name, tensor in state.items()}
        for given in ({}, wrong, {**state, "other": torch.ones(1)}, state):
            assert report(mine, given) == report(theirs, given)
            assert_same_state(model.state_dict(), twin.state_dict())
        assert_same_state(mine.state_dict(prefix="p."), theirs.state_dict(prefix="p."))
    assert packed_pointers(model) == before


class StackedPairLayout(nn.Module):
    """Two members in one packed parameter: weights (2, H, H)."""

    packing = {"weights": {"sources": ["first.weight", "second.weight"], "operations": [["stack", 0]]}}

    def __init__(self, first, second):
        super().__init__()
        self.weights = nn.Parameter(torch.empty(2, *first.weight.shape))


class StackedPair(nn.Module):
    def forward(self, input):
        return input @ self.weights[0].t() @ self.weights[1].t()


def test_a_packed_parameter_of_two_members():
    twin = nn.Sequential(*(nn.Linear(zoo.H, zoo.H, bias=False) for _ in range(2)))
    model = copy.deepcopy(twin)
    config = {(("Linear", "0"), ("Linear", "1")): StackedPair}
    kernelgraft.graft(model, config, example_inputs=zoo.inputs())
    before = packed_pointers(model)
    state = {name: torch.randn(zoo.H, zoo.H) for name in ("0.weight", "1.weight")}
    for options in ({}, {"assign": True}):
        for given in (state, {"1.weight": state["0.weight"]}):
            for each in (model, twin):
                each.load_state_dict(given, strict=False, **options)
            assert_same_state(model.state_dict(), twin.state_dict())
    assert packed_pointers(model) == before
    torch.testing.assert_close(model(zoo.inputs()), twin(zoo.inputs()))
    # Neither member knows whether the other's will come, so that one dtype cannot be left for another by halves.
    with pytest.raises(RuntimeError, match=r"(?s)0\.weight comes as torch\.float64 .*1\.weight comes as"):
        model.load_state_dict({name: tensor.double() for name, tensor in state.items()}, assign=True)
    assert_same_state(model.state_dict(), twin.state_dict())
