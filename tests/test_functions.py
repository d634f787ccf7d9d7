"""Function kernels: for one model's modules, without touching the function that the whole process shares."""

import functools
import inspect
import sys
import threading
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache

import kernelgraft
import tiny
import toys
from kernelgraft import KernelConfig
from kernelgraft.errors import ConfigError, GraftError, PlanError
from kernelgraft.functions import called_functions, find_functions

pytestmark = pytest.mark.transformers

NAMES = ["rotary_pos_emb", "apply_rotary_pos_emb"]
SOURCE = """
import torch
from torch import nn


def turned(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotary(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


class Rotary(nn.Module):
    can_torch_compile = True

    def forward(self, q, k, cos, sin, unsqueeze_dim=1):
        return rotary(q, k, cos, sin, unsqueeze_dim)


class layers:
    rotary = rotary
    Rotary = Rotary
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("rotary") / "rotary.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture(scope="module", params=["function", "class", "reference to a function", "reference to a class"])
def use(request, source):
    made = {}
    exec(SOURCE, made)
    return {
        "function": made["rotary"],
        "class": made["Rotary"],
        "reference to a function": f"{source}:rotary",
        "reference to a class": f"{source}:Rotary",
    }[request.param]


def module_of(model):
    return sys.modules[type(model).__module__]


@contextmanager
def calls_of_the_original(model):
    """How often this thread runs the code of the process-wide function meanwhile."""
    function = module_of(model).apply_rotary_pos_emb
    code = (type(function).forward if isinstance(function, nn.Module) else function).__code__
    calls = []

    def listen(frame, event, _):
        if event == "call" and frame.f_code is code:
            calls.append(1)

    before = sys.getprofile()
    sys.setprofile(listen)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def only_floats(q, k, cos, sin, unsqueeze_dim=1):
    return q, k


@pytest.mark.parametrize(("name", "kind"), [(NAMES[0], "qwen3"), (NAMES[1], "llama")])
def test_a_rotary_kernel_runs_in_the_place_of_the_shared_function(name, kind, use):
    model, other = tiny.model(kind), tiny.model(kind)
    expected, tokens = tiny.logits(model, kind), tiny.generate(model)
    shared, classes = module_of(model).apply_rotary_pos_emb, [type(module) for module in model.modules()]
    with kernelgraft.graft(model, KernelConfig({name: use})) as grafted:
        (function,) = grafted.plan.functions
        assert function.replaces == "apply_rotary_pos_emb"
        assert function.paths == ("model.layers.0.self_attn", "model.layers.1.self_attn")
        assert "in the place of apply_rotary_pos_emb()" in str(grafted.plan)
        with calls_of_the_original(model) as calls:
            assert torch.equal(tiny.logits(model, kind), expected)
            assert torch.equal(tiny.generate(model), tokens)
        assert len(calls) == 0
        assert grafted.calls.kernel == 2 + 2 * 6
        assert module_of(model).apply_rotary_pos_emb is shared
        with calls_of_the_original(other) as calls:
            assert torch.equal(tiny.logits(other, kind), expected)
        assert len(calls) == 2
        with calls_of_the_original(model) as calls, grafted.reference():
            assert torch.equal(tiny.logits(model, kind), expected)
        assert len(calls) == 2
    assert [type(module) for module in model.modules()] == classes
    with calls_of_the_original(model) as calls:
        assert torch.equal(tiny.logits(model, kind), expected)
    assert len(calls) == 2


def test_two_models_have_two_functions_at_the_same_time():
    models = [tiny.model("qwen3") for _ in range(3)]
    counts = [0, 0]

    def kernel(index):
        def rotary(q, k, cos, sin, unsqueeze_dim=1):
            counts[index] += 1
            return q * (index + 2.0), k

        return rotary

    expected = [tiny.logits(models[2])]
    for index in range(2):
        with kernelgraft.graft(models[2], KernelConfig({"rotary_pos_emb": kernel(index)})):
            expected.append(tiny.logits(models[2]))
    grafts = [kernelgraft.graft(models[i], KernelConfig({"rotary_pos_emb": kernel(i)})) for i in range(2)]
    counts[:] = [0, 0]
    threads = [threading.Thread(target=tiny.logits, args=(model,)) for model in models for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [4, 4]
    assert torch.equal(tiny.logits(models[0]), expected[1])
    assert torch.equal(tiny.logits(models[1]), expected[2])
    assert torch.equal(tiny.logits(models[2]), expected[0])
    grafts[0].remove()
    assert torch.equal(tiny.logits(models[0]), expected[0])
    assert torch.equal(tiny.logits(models[1]), expected[2])


def test_a_function_and_modules_around_it_in_one_graft(source):
    model = tiny.model("qwen3")
    expected = tiny.logits(model)
    mapping = {**tiny.guide_mapping(), "rotary_pos_emb": f"{source}:rotary"}
    with kernelgraft.graft(model, KernelConfig(mapping)) as grafted:
        assert torch.equal(tiny.logits(model), expected)
        assert grafted.calls.sites["model.layers.0.self_attn"] == (1, 0)
        assert grafted.calls.sites["model.layers.0.self_attn.q_norm"] == (1, 0)
        assert grafted.plan.summary().endswith("; 0 near misses")
        assert "rotary at 2 sites" in grafted.plan.summary()
        saved = model.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(tiny.logits(model), expected)


def test_a_compiled_model_has_no_break_and_no_more_frames(source):
    def frames(model):
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        found = []
        for mode in (model.eval, model.train) * 2:
            mode()
            found.append(tiny.logits(compiled))
        return counter.frame_count, found

    plain, expected = frames(tiny.model("qwen3"))
    model = tiny.model("qwen3")
    with kernelgraft.graft(model, KernelConfig({"rotary_pos_emb": f"{source}:rotary"})) as grafted:
        count, found = frames(model)
        assert count == plain
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert grafted.calls.traced >= 2
        assert grafted.calls.reference == 0


def test_the_gradients_are_the_originals(source):
    model = tiny.model("qwen3").train()
    expected = tiny.gradients(model)
    with kernelgraft.graft(model, KernelConfig({"rotary_pos_emb": f"{source}:rotary"})):
        found = tiny.gradients(model)
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


def test_a_function_may_be_for_one_mode_only(source):
    model = tiny.model("qwen3")
    mapping = {"rotary_pos_emb": {"cpu": {"inference": f"{source}:rotary"}}}
    with kernelgraft.graft(model, KernelConfig(mapping)):
        tiny.logits(model)
        with pytest.raises(GraftError, match=r"'model\.layers\.0\.self_attn' there is no kernel for training"):
            tiny.logits(model.train())
    for config in (
        KernelConfig(mapping, fallback="reference"),
        KernelConfig({"rotary_pos_emb": {"cpu": {"inference": f"{source}:rotary", "training": ""}}}),
    ):
        with kernelgraft.graft(model, config) as grafted, calls_of_the_original(model) as calls:
            tiny.logits(model.train())
            tiny.logits(model.eval())
        assert len(calls) == 2
        assert grafted.plan.functions


def other_function(module, *args, **kwargs):
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def test_two_functions_of_one_module_keep_their_kernels_when_the_device_changes(source):
    model = tiny.model("qwen3", attn_implementation="eager")
    expected = tiny.logits(model)
    mapping = {
        "rotary_pos_emb": {"cpu": f"{source}:rotary", "cuda": f"{source}:Rotary"},
        "eager_attention_forward": {"cpu": {"inference": other_function, "training": ""}, "cuda": ""},
    }
    with kernelgraft.graft(model, KernelConfig(mapping)) as grafted:
        for device in ("cpu", "cuda", "cpu"):
            grafted.moved_to(torch.device(device))
            for mode in (model.train, model.eval):
                mode()
                with calls_of_the_original(model) as calls:
                    assert torch.equal(tiny.logits(model), expected)
                assert len(calls) == 0
        assert grafted.calls.reference == 0


# --- refusals


def test_a_function_with_other_parameters_is_refused_with_both_signatures():
    with pytest.raises(PlanError) as caught:
        kernelgraft.plan(tiny.model("qwen3"), KernelConfig({"rotary_pos_emb": lambda q, k: (q, k)}))
    text = str(caught.value)
    assert "<lambda>(q, k) cannot stand for apply_rotary_pos_emb(q, k, cos, sin" in text


def test_a_name_that_no_function_has_is_refused_with_the_nearest():
    with pytest.raises(PlanError, match="apply_rotary_pos_emb"):
        kernelgraft.plan(tiny.model("qwen3"), KernelConfig({"apply_rotary_emb": only_floats}))
    with pytest.raises(ConfigError):
        KernelConfig({"rotary.pos_emb": only_floats})


def test_functions_inside_what_a_kernel_takes_over_are_listed():
    model = tiny.model("qwen3")
    attention = toys.kernel(type(model.model.layers[0].self_attn).forward)
    plan = kernelgraft.plan(model, KernelConfig({"Attention": attention, "rotary_pos_emb": only_floats}))
    assert plan.functions == ()
    assert [(r.target, r.reason) for r in plan.rejected] == [
        ("rotary_pos_emb", "every module that calls the function runs a kernel of its own")
    ]


# --- finding them


def helper(x):
    return x


class Calls(nn.Module):
    def forward(self, x):
        return [helper(each) for each in x]


class Inherits(Calls):
    pass


def test_functions_are_found_in_inner_code_and_inherited_forwards():
    assert called_functions(Calls) == {"helper": helper}
    model = nn.ModuleDict({"a": Calls(), "b": Inherits(), "c": nn.Linear(1, 1)})
    assert find_functions(dict(model.named_modules()), "helper") == {"a": "helper", "b": "helper"}
    with kernelgraft.graft(model, KernelConfig({"helper": lambda x: -x})):
        assert model["a"]([1, 2]) == model["b"]([1, 2]) == [-1, -2]
        assert Calls()([1]) == [1]
    assert model["a"]([1]) == [1]


def renamed(old, new):
    def decorate(forward):
        @functools.wraps(forward)
        def wrapper(self, *args, **kwargs):
            if old in kwargs:
                kwargs[new] = kwargs.pop(old)
            return forward(self, *args, **kwargs)

        return wrapper

    return decorate


class Decorated(nn.Module):
    @renamed("past", "cache")
    @torch.no_grad()
    def forward(self, x, cache=0):
        return helper(x) + cache


class Hidden(nn.Module):
    forward = functools.update_wrapper(lambda self, *args: Calls.forward(self, *args), Calls.forward)


def test_a_forward_keeps_what_it_is_decorated_with():
    model, x = nn.Sequential(Decorated()), torch.ones(1, requires_grad=True)
    with kernelgraft.graft(model, KernelConfig({"helper": lambda x: -x})):
        out = model[0](x, past=3)
        assert out.tolist() == [2.0]
        assert not out.requires_grad
        assert inspect.signature(model[0].forward) == inspect.signature(Decorated().forward)
    assert model[0](x, past=3).tolist() == [4.0]
    with pytest.raises(PlanError, match="decorated by something that keeps the function out of sight"):
        kernelgraft.plan(nn.Sequential(Hidden()), KernelConfig({"helper": lambda x: -x}))


def test_the_cache_arrives_under_the_name_that_transformers_deprecates(source):
    model = tiny.model("qwen3")
    with kernelgraft.graft(model, KernelConfig({"rotary_pos_emb": f"{source}:rotary"})):
        for name in ("past_key_values", "cache"):
            attention, cache = model.model.layers[0].self_attn, DynamicCache(config=model.config)
            x = torch.randn(1, 3, 32)
            positions = model.model.rotary_emb(x, torch.arange(3)[None])
            if name in inspect.signature(attention.forward).parameters or name == "past_key_values":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    attention(x, position_embeddings=positions, attention_mask=None, **{name: cache})
                assert cache.get_seq_length() == 3
