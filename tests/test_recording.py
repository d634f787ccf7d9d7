"""Constructor arguments: that they are found exactly, that nothing else changes, and how a layout takes them."""

import cProfile
import functools
import gc
import inspect
import profile
import sys
import threading
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from kernelgraft.errors import GraftError, PlanError
from kernelgraft.recording import Arguments, arguments_of, bind_arguments, recorded


class Plain(nn.Module):
    def __init__(self, dim, eps=1e-6, *, bias=True):
        super().__init__()
        dim = dim * 2  # what was given stays what is recorded


class Star(nn.Module):
    def __init__(self, first, *rest, scale=1, **more):
        super().__init__()


class PositionalOnly(nn.Module):
    def __init__(self, dim, /, eps=1):
        super().__init__()


class SelfInTheArguments(nn.Module):
    def __init__(*args, **kwargs):
        nn.Module.__init__(args[0])


class SelfInACell(nn.Module):
    def __init__(self, dim, eps=2):
        super().__init__()
        self.call = lambda: (self, dim)


class Inherited(Plain):
    pass


class Derived(Plain):
    def __init__(self, name, dim):
        super().__init__(dim, eps=3)
        self.name = name


class LateSuper(nn.Module):
    def __init__(self, a):
        a = [a]
        self.__dict__["early"] = a
        super().__init__()


def decorated(init):
    @functools.wraps(init)
    def wrapper(self, *args, **kwargs):
        return init(self, *args, **{"added": 5, **kwargs})

    return wrapper


class Decorated(nn.Module):
    @decorated
    def __init__(self, dim, added=0):
        super().__init__()


def _make(self, dim):
    nn.Module.__init__(self)


class Renamed(nn.Module):
    __init__ = _make


class NoInit(nn.Module):
    pass


@dataclass
class Data(nn.Module):
    dim: int
    name: str = "x"

    def __post_init__(self):
        super().__init__()


class EqualToAll(nn.Module):
    def __init__(self, other):
        super().__init__()

    def __eq__(self, other):
        raise AssertionError("modules are told apart by identity")


CASES = [
    (Plain, (3,), {}, (3, 1e-6), {"bias": True}),
    (Plain, (), {"eps": 1, "dim": 3, "bias": False}, (3, 1), {"bias": False}),
    (Star, (1, 2, 3), {"a": 4}, (1, 2, 3), {"scale": 1, "a": 4}),
    (Star, (1,), {"scale": 2}, (1,), {"scale": 2}),
    (PositionalOnly, (1,), {}, (1, 1), {}),
    (SelfInTheArguments, (1, 2), {"a": 3}, (1, 2), {"a": 3}),
    (SelfInACell, (1,), {}, (1, 2), {}),
    (Inherited, (4,), {}, (4, 1e-6), {"bias": True}),
    (Derived, ("name", 4), {}, ("name", 4), {}),
    (LateSuper, (1,), {}, (1,), {}),
    (Decorated, (1,), {}, (1,), {}),
    (Renamed, (1,), {}, (1,), {}),
    (NoInit, (), {}, (), {}),
    (Data, (1,), {}, (1, "x"), {}),
    (EqualToAll, (Plain,), {}, (Plain,), {}),
    (nn.Linear, (2, 3), {"bias": False}, (2, 3, False, None, None), {}),
]


@pytest.mark.parametrize(("kind", "args", "kwargs", "found_args", "found_kwargs"), CASES)
def test_what_is_recorded(kind, args, kwargs, found_args, found_kwargs):
    with recorded() as recording:
        module = kind(*args, **kwargs)
    assert recording.of(module) == arguments_of(module) == Arguments(found_args, found_kwargs)
    again = recording.of(module)
    type(module)(*again.args, **again.kwargs)


def test_values_are_the_objects_themselves():
    config, layers = {"a": 1}, [1, 2]
    with recorded():
        module = Star(config, layers, key=layers)
    arguments = arguments_of(module)
    assert arguments.args[0] is config
    assert arguments.args[1] is layers
    assert arguments.kwargs["key"] is layers


def test_the_first_init_of_an_object_counts():
    with recorded():
        module = Plain(3)
        module.__init__(4)
        arguments = arguments_of(module)
    assert arguments.args == (3, 1e-6)


def test_outside_of_a_block_nothing_is_recorded():
    before = Plain(1)
    with recorded() as recording:
        pass
    after = Plain(2)
    assert arguments_of(before) is arguments_of(after) is recording.of(after) is None
    assert len(recording) == 0
    assert sys.getprofile() is None


def test_modules_leave_no_trace_and_gain_none():
    with recorded():
        module = nn.Linear(2, 2)
    assert module.__dict__.keys() == nn.Linear(2, 2).__dict__.keys()
    assert nn.Linear.__init__ is vars(nn.Linear)["__init__"]


def test_nothing_is_kept_alive():
    class Config:
        pass

    class Child(nn.Module):
        def __init__(self, parent, siblings, config):
            super().__init__()

    class Tree(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.first = nn.Linear(1, 1)
            self.child = Child(self, [self.first], config)
            self.both = nn.Sequential(self.first, self.child)

    with recorded() as recording:
        config, tree = Config(), Tree(None)
        config_ref = weakref.ref(config)
        with_config = Child(tree, (), config)
        del config
    arguments = recording.of(tree.child)
    assert arguments.args[0] is tree
    assert arguments.args[1] == [tree.first]
    assert recording.of(tree.both).args == (tree.first, tree.child)
    del arguments
    refs = [weakref.ref(module) for module in tree.modules()]
    assert len(recording) == 5
    assert config_ref() is not None
    del tree
    gc.collect()
    assert [ref() for ref in refs] == [None] * 4
    assert len(recording) == 1
    assert arguments_of(with_config) is None  # one of its arguments is gone
    del with_config
    assert config_ref() is None
    assert len(recording) == 0


def test_an_exception_ends_the_recording():
    class Raises(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Plain(1)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), recorded():
        Raises()
    assert sys.getprofile() is None


def test_nested_blocks():
    class Nests(nn.Module):
        def __init__(self, dim):
            with recorded() as inner:
                super().__init__()
                self.inner = Plain(dim)
            self.found = inner.of(self), inner.of(self.inner)

    with recorded() as outer:
        first = Plain(1)
        with recorded() as inner:
            second = Plain(2)
        third = Nests(3)
    assert [outer.of(each).args[0] for each in (first, second, third, third.inner)] == [1, 2, 3, 3]
    assert inner.of(first) is inner.of(third) is None
    assert inner.of(second).args == (2, 1e-6)
    assert third.found == (Arguments((3,), {}), Arguments((3, 1e-6), {"bias": True}))
    assert sys.getprofile() is None


def test_threads_see_their_own():
    found, barrier = {}, threading.Barrier(4)

    def build(number):
        barrier.wait()
        with recorded() as recording:
            modules = [Plain(number) for _ in range(200)]
            barrier.wait()
        found[number] = recording, modules

    threads = [threading.Thread(target=build, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, (recording, modules) in found.items():
        assert len(recording) == 200
        assert all(recording.of(module).args[0] == number for module in modules)
    assert found[0][0].of(found[1][1][0]) is None


def test_a_profile_function_goes_on():
    events = []

    def mine(frame, event, argument):
        if event in ("call", "return") and frame.f_code.co_name == "__init__" and frame.f_globals is globals():
            events.append(event)

    sys.setprofile(mine)
    try:
        with recorded() as recording:
            module = Plain(1)
        assert sys.getprofile() is mine
    finally:
        sys.setprofile(None)
    assert events == ["call", "return"]
    assert recording.of(module).args == (1, 1e-6)


def test_the_profilers_of_the_standard_library_go_on():
    def build():
        with recorded() as recording:
            return Plain(1), recording

    for profiler in (profile.Profile(), cProfile.Profile()):
        module, recording = profiler.runcall(build)
        assert recording.of(module).args == (1, 1e-6)
        profiler.create_stats()
        assert any(name == "__init__" and __file__ == file for file, _, name in profiler.stats)
    assert sys.getprofile() is sys.gettrace() is None


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="cProfile has its own place in sys.monitoring")
def test_a_c_profiler_beside_a_tracer_is_refused():
    tracer, profiler = sys.gettrace(), cProfile.Profile()
    profiler.enable()
    sys.settrace(lambda *_: None)
    try:
        with pytest.raises(GraftError, match="Stop one of them"), recorded():
            pass
    finally:
        sys.settrace(tracer)
        profiler.disable()


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="sys.monitoring is not the profiler's place")
def test_a_profiler_that_takes_the_place_is_told():
    def mine(*_):
        return None

    try:
        with pytest.raises(GraftError, match="the record has holes"), recorded():
            sys.setprofile(mine)
        assert sys.getprofile() is mine
        with pytest.raises(KeyError), recorded():  # an error of the block's own is not hidden
            {}[sys.setprofile(None)]
    finally:
        sys.setprofile(None)


# Rebuilding


# Binding


def takes(init):
    """A layout class with this `__init__`, which keeps what it gets."""
    return type("Layout", (nn.Module,), {"__init__": init})


def bound(layout_init, kind, *args, **kwargs):
    with recorded():
        module = kind(*args, **kwargs)
    layout = takes(layout_init)
    args, kwargs = bind_arguments(layout, arguments_of(module), kind)
    call = inspect.signature(layout_init).bind(None, *args, **kwargs)
    call.apply_defaults()
    return {name: value for name, value in call.arguments.items() if name != "self"}


class Attention(nn.Module):
    def __init__(self, config, layer_idx=None, **kwargs):
        super().__init__()


class Norm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()


def test_binding_by_name_and_position():
    assert bound(lambda self, hidden_size, eps: None, Norm, 4, 1e-5) == {"hidden_size": 4, "eps": 1e-5}
    assert bound(lambda self, eps, hidden_size: None, Norm, 4, 1e-5) == {"hidden_size": 4, "eps": 1e-5}
    assert bound(lambda self, dim, eps=1: None, Norm, 4, 1e-5) == {"dim": 4, "eps": 1e-5}
    assert bound(lambda self, dim, epsilon: None, Norm, 4, 1e-5) == {"dim": 4, "epsilon": 1e-5}
    assert bound(lambda self, dim, *, eps: None, Norm, 4) == {"dim": 4, "eps": 1e-6}
    assert bound(lambda self, dim, /, *, eps=8: None, Norm, 4) == {"dim": 4, "eps": 1e-6}


def test_binding_leaves_out_what_equals_the_default():
    assert bound(lambda self, hidden_size: None, Norm, 4, 1e-6) == {"hidden_size": 4}
    assert bound(lambda self, hidden_size, *, block=64: None, Norm, 4) == {"hidden_size": 4, "block": 64}
    assert bound(lambda self, in_features, out_features: None, nn.Linear, 2, 3) == {"in_features": 2, "out_features": 3}
    assert bound(lambda self, config: None, Attention, "c") == {"config": "c"}
    assert bound(lambda self: None, nn.SiLU) == {}
    assert bind_arguments(type("Empty", (nn.Module,), {}), Arguments((False,), {}), nn.SiLU) == ((), {})


def test_binding_to_more_args_and_kwargs():
    assert bound(lambda self, *args, **kwargs: None, Attention, "c", 3, a=1) == {
        "args": ("c", 3),
        "kwargs": {"a": 1},
    }
    assert bound(lambda self, config, **kwargs: None, Attention, "c", 3) == {"config": "c", "kwargs": {"layer_idx": 3}}
    assert bound(lambda self, config, *args: None, Attention, "c", 3) == {"config": "c", "args": (3,)}
    assert bound(lambda self, first, second, third=0: None, Star, 1, 2, scale=1) == {
        "first": 1,
        "second": 2,
        "third": 0,
    }
    assert bound(lambda self, dim, block=64, **kwargs: None, Norm, 4, 1e-5) == {
        "dim": 4,
        "block": 64,
        "kwargs": {"eps": 1e-5},
    }
    assert bound(lambda self, config, a: None, Attention, "c", a=1) == {"config": "c", "a": 1}


@pytest.mark.parametrize(
    ("init", "kind", "args", "said"),
    [
        (lambda self, config: None, Attention, ("c", 3), "does not take 'layer_idx' = 3"),
        (lambda self, hidden_size: None, Norm, (4, 1e-5), "does not take 'eps' = 1e-05"),
        (lambda self, hidden_size, eps, heads: None, Norm, (4,), "needs 'heads', which Norm does not have"),
        (lambda self, hidden_size, *, heads: None, Norm, (4,), "needs 'heads'"),
        (lambda self, dim, epsilon=1: None, Norm, (4,), "has no 'eps', and whether its 'epsilon' is the same cannot"),
        (lambda self, a: None, nn.Sequential, (nn.SiLU(), nn.SiLU()), "does not take an argument = SiLU()"),
    ],
)
def test_refusals_show_both_signatures(init, kind, args, said):
    with pytest.raises(PlanError) as caught:
        bound(init, kind, *args)
    message = str(caught.value)
    assert said in message
    assert f"The layout: Layout{inspect.signature(init)}".replace("self, ", "") in message
    assert f"the original: {kind.__name__}(" in message
    assert "from_module" in message


def test_values_without_a_truth_value():
    class WithTensor(nn.Module):
        def __init__(self, dim, table=torch.ones(2)):  # noqa: B008
            super().__init__()

    assert bound(lambda self, dim: None, WithTensor, 1) == {"dim": 1}
    with pytest.raises(PlanError, match="does not take 'table'"):
        bound(lambda self, dim: None, WithTensor, 1, torch.ones(2))


# Transformers


MODELS = {
    "Llama": ("ForCausalLM", {}),
    "Qwen3": ("ForCausalLM", {}),
    "Mistral": ("Model", {}),
    "Phi3": ("ForCausalLM", {}),
    "Olmo2": ("ForCausalLM", {}),
    "Cohere": ("ForCausalLM", {}),
    "Mixtral": ("ForCausalLM", {"num_local_experts": 2}),
    "Qwen3Moe": ("ForCausalLM", {"num_experts": 2, "moe_intermediate_size": 16}),
    "GPTNeoX": ("ForCausalLM", {}),
    "GPT2": ("LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "T5": ("ForConditionalGeneration", {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}),
    "Bert": ("ForMaskedLM", {}),
    "ViT": ("ForImageClassification", {"image_size": 16, "patch_size": 8}),
}


@pytest.mark.transformers
@pytest.mark.parametrize("name", MODELS)
def test_real_modules_are_built_again_from_their_record(name):
    transformers = pytest.importorskip("transformers")
    suffix, sizes = MODELS[name]
    if not any(key.startswith(("n_", "d_")) for key in sizes):
        sizes |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, **(tokens if name != "ViT" else {}))
    model_class = getattr(transformers, f"{name}{suffix}")
    live = model_class(config)
    with torch.device("meta"), recorded() as recording:
        skeleton = model_class(config)
    found = {path: recording.of(module) for path, module in skeleton.named_modules(remove_duplicate=False)}
    assert all(found.values())
    assert found.keys() == {path for path, _ in live.named_modules(remove_duplicate=False)}
    num_built = 0
    for path, module in live.named_modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):  # filled after they were built
            continue
        with torch.device("meta"):
            again = type(module)(*found[path].args, **found[path].kwargs)
        shapes = {key: value.shape for key, value in again.state_dict().items()}
        assert shapes.keys() == module.state_dict().keys(), path
        assert all(shapes[key] == value.shape for key, value in module.state_dict().items()), path
        num_built += 1
    assert num_built > 15
