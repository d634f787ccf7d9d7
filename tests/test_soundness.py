"""Which fusions are proved, which are refused and with which words, and that the model stays as it was."""

import random
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kernelgraft.errors import PlanError
from kernelgraft.soundness import FusionSite, check_soundness, example_runner, forward_runner


class Norm(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, hidden_states):
        return self.weight * hidden_states


class Mlp(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, hidden_states, scale=None, detour=None):
        return self.down(F.silu(self.up(hidden_states)))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp, self.other = Norm(), Mlp(), nn.Linear(8, 8)


def parents():
    """Forwards of `Parent`, each with the verdict that it must get: what the refusal says, or None for sound."""

    def plain(self, x):
        return x + self.mlp(self.norm(x))

    def by_keyword(self, x):
        return x + self.mlp(hidden_states=self.norm(x))

    def with_more_inputs(self, x):
        return self.mlp(self.norm(x), scale=x)

    def reads_metadata(self, x):
        y = self.norm(x)
        assert y.dtype == x.dtype
        assert y.device == x.device
        assert y.is_floating_point()
        batch, length = y.shape[:-1]
        return self.mlp(y).reshape(batch, length, y.size(-1)) + len(y)

    def checkpointed(self, x):
        return torch.utils.checkpoint.checkpoint(self.mlp, self.norm(x), use_reentrant=False)

    def checkpointed_together(self, x):
        return torch.utils.checkpoint.checkpoint(lambda y: self.mlp(self.norm(y)), x, use_reentrant=False)

    def calls_forward(self, x):
        return self.mlp.forward(self.norm.forward(x))

    def through_a_list(self, x):
        states = [self.norm(x)]
        return self.mlp(states.pop())

    def writes_in_place(self, x):
        y = self.norm(x)
        y += 1
        return self.mlp(y)

    def is_written_elsewhere(self, x):
        y = self.norm(x)
        return self.mlp(y) + torch.zeros_like(x).copy_(y)

    def clones(self, x):
        return self.mlp(self.norm(x).clone())

    def detaches(self, x):
        return self.mlp(self.norm(x).detach())

    def reads_data(self, x):
        return self.mlp(self.norm(x).data)

    def casts(self, x):
        return self.mlp(self.norm(x).to(x.dtype))

    def views(self, x):
        y = self.norm(x)
        return self.mlp(y.view(-1, y.shape[-1])).view_as(x)

    def indexes(self, x):
        return self.mlp(self.norm(x)[:, -1:])

    def drops_out(self, x):
        return self.mlp(F.dropout(self.norm(x), 0.1, self.training))

    def drops_out_in_training(self, x):
        y = self.norm(x)
        return self.mlp(F.dropout(y, 0.1) if self.training else y)

    def used_in_training(self, x):
        y = self.norm(x)
        return self.mlp(y) + (y.mean() if self.training else 0)

    def reversed_order(self, x):
        return self.norm(self.mlp(x))

    def called_twice(self, x):
        return self.mlp(self.norm(x)) + self.mlp(self.norm(x + 1))

    def second_called_twice(self, x):
        y = self.norm(x)
        return self.mlp(y) + self.mlp(y)

    def given_twice(self, x):
        y = self.norm(x)
        return self.mlp(y, scale=y)

    def given_second(self, x):
        return self.mlp(x, self.norm(x))

    def returned(self, x):
        y = self.norm(x)
        return self.mlp(y), y

    def kept(self, x):
        self.last = self.norm(x)
        return self.mlp(self.last)

    def kept_in_a_list(self, x):
        y = self.norm(x)
        self.__dict__.setdefault("seen", []).append({"y": y})
        return self.mlp(y)

    def parallel(self, x):
        y = self.norm(x)
        return x + self.mlp(y) + self.other(y)

    def residual_after_norm(self, x):
        y = self.norm(x)
        return y + self.mlp(y)

    def added_as_right_operand(self, x):
        y = self.norm(x)
        return self.mlp(y) + torch.stack([x, y]).sum(0)

    def branches_on_values(self, x):
        y = self.norm(x)
        return self.mlp(y) if y.sum() > 0 else -self.mlp(y)

    def through_a_function(self, x):
        y = self.norm(x)
        return self.mlp(y) + Double.apply(y)

    def first_only(self, x):
        return self.norm(x)

    def through_numbers(self, x):
        y = self.norm(x)
        return self.mlp(y) * len(y.tolist())

    sound = [plain, by_keyword, with_more_inputs, reads_metadata, checkpointed, checkpointed_together, calls_forward]
    yield from ((forward, None) for forward in [*sound, through_a_list])
    norm_also = "the output of 'norm' is also used by "
    yield writes_in_place, f"{norm_also}add_ in the forward of Parent"
    yield is_written_elsewhere, f"{norm_also}copy_"
    yield clones, f"{norm_also}clone"
    yield detaches, f"{norm_also}detach"
    yield reads_data, f"{norm_also}data"
    yield casts, f"{norm_also}to in"
    yield views, f"{norm_also}view"
    yield indexes, f"{norm_also}__getitem__"
    yield drops_out, f"{norm_also}dropout"
    yield drops_out_in_training, f"{norm_also}dropout"
    yield used_in_training, f"{norm_also}mean"
    yield reversed_order, "'mlp' does not take the output of 'norm'"
    yield called_twice, "'norm' is called 2 times"
    yield second_called_twice, "'mlp' is called 2 times"
    yield given_twice, "the output of 'norm' is taken by 'mlp' 2 times"
    yield given_second, "'mlp' takes the output of 'norm', but not as its first argument"
    yield returned, "the output of 'norm' is returned by Parent"
    yield kept, "the output of 'norm' is kept somewhere after the forward"
    yield kept_in_a_list, "the output of 'norm' is kept somewhere after the forward"
    yield parallel, f"{norm_also}'other' (linear)"
    yield residual_after_norm, f"{norm_also}add"
    yield added_as_right_operand, f"{norm_also}stack"
    yield branches_on_values, f"{norm_also}sum"
    yield through_a_function, f"{norm_also}mul"
    yield first_only, "'mlp' does not run, while 'norm' does"
    yield through_numbers, f"{norm_also}tolist"


def site(parent, *members, host=None):
    paths = tuple(f"{parent}.{name}" if parent else name for name in members)
    return FusionSite(parent, paths, paths[members.index(host)] if host else paths[0])


def verdict_on(model, *members, host=None, live=False):
    run = example_runner(torch.ones(2, 3, 8))
    (verdict,) = check_soundness(model, [site("", *members, host=host)], run, live=live).values()
    return verdict


@pytest.mark.parametrize(("forward", "refusal"), list(parents()), ids=lambda each: getattr(each, "__name__", ""))
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_hand_made_parents(forward, refusal, device):
    with torch.device(device):
        model = type("Parent", (Parent,), {"forward": forward})()
    verdict = verdict_on(model, "norm", "mlp")
    if refusal is None:
        assert verdict.sound, verdict
    else:
        assert verdict.sound is False
        assert refusal in verdict.reason


def with_forward(forward, **children):
    model = type("Parent", (nn.Module,), {"forward": forward})()
    for name, child in children.items():
        setattr(model, name, child)
    return model


def test_a_host_that_is_not_the_first():
    model = with_forward(lambda self, x: self.norm(self.mlp(x)), norm=Norm(), mlp=Mlp())
    assert verdict_on(model, "mlp", "norm", host="norm").sound


def test_three_members():
    model = with_forward(lambda self, x: self.c(self.b(self.a(x))), a=nn.Linear(8, 16), b=nn.GELU(), c=nn.Linear(16, 8))
    assert verdict_on(model, "a", "b", "c").sound
    assert verdict_on(model, "a", "c").sound is False
    assert "'b' does not take the output of 'c'" in verdict_on(model, "a", "c", "b").reason


def test_a_shape_that_would_be_another_one():
    def forward(self, x):
        y = self.a(x)
        return self.b(y) * y.shape[-1]

    model = with_forward(forward, a=nn.Linear(8, 16), b=nn.Linear(16, 8))
    verdict = verdict_on(model, "a", "b")
    assert verdict.sound is False
    assert "is read: it is (2, 3, 16), and would become (2, 3, 8)" in verdict.reason


def test_a_first_member_that_writes_into_its_input():
    model = with_forward(lambda self, x: x + self.b(self.a(x)), a=nn.ReLU(inplace=True), b=nn.Linear(8, 8))
    assert "'a' writes into its input in place" in verdict_on(model, "a", "b").reason


def test_a_second_member_that_writes_into_its_input_is_inside_the_chain():
    model = with_forward(lambda self, x: x + self.b(self.a(x)), a=nn.Linear(8, 8), b=nn.ReLU(inplace=True))
    assert verdict_on(model, "a", "b").sound


def test_an_output_that_the_member_keeps_for_others():
    class Keeping(Norm):
        def forward(self, hidden_states):
            self.last = super().forward(hidden_states)
            return self.last

    model = with_forward(lambda self, x: self.b(self.a(x)) + self.a.last, a=Keeping(), b=nn.Linear(8, 8))
    assert "the output of 'a' is kept somewhere" in verdict_on(model, "a", "b").reason


def test_outputs_in_containers():
    class Pair(Norm):
        def forward(self, hidden_states):
            return super().forward(hidden_states), torch.zeros_like(hidden_states)

    def unpacks(self, x):
        y, _ = self.a(x)
        return self.b(y)

    def uses_the_other(self, x):
        y, z = self.a(x)
        return self.b(y) + z

    assert verdict_on(with_forward(unpacks, a=Pair(), b=Norm()), "a", "b").sound
    assert verdict_on(with_forward(uses_the_other, a=Pair(), b=Norm()), "a", "b").sound is False


def test_members_of_a_sequential_and_of_a_list():
    assert verdict_on(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), "0", "1").sound
    model = with_forward(
        lambda self, x: self.steps[2](self.steps[1](self.steps[0](x))), steps=nn.ModuleList(Norm() for _ in range(3))
    )
    for members, sound in {("0", "1"): True, ("1", "2"): True, ("0", "2"): False}.items():
        (verdict,) = check_soundness(
            model, [site("steps", *members)], example_runner(torch.ones(2, 8)), live=False
        ).values()
        assert verdict.sound == sound


def test_data_dependent_code_needs_real_tensors():
    def forward(self, x):
        y = self.mlp(self.norm(x))
        return y if x.sum() > 0 else 2 * y

    model = with_forward(forward, norm=Norm(), mlp=Mlp())
    verdict = verdict_on(model, "norm", "mlp")
    assert verdict.sound is None
    assert verdict.reason.startswith("not checked: the model does not run on meta tensors: RuntimeError:")
    assert verdict_on(model, "norm", "mlp", live=True).sound


def test_code_that_runs_in_bfloat16_only():
    def forward(self, x):
        if x.dtype != torch.bfloat16:
            raise TypeError("bfloat16 only")
        return self.mlp(self.norm(x))

    verdict = verdict_on(with_forward(forward, norm=Norm(), mlp=Mlp()), "norm", "mlp")
    assert verdict.sound
    assert "bfloat16" in verdict.reason


def test_a_refusal_stands_though_the_model_does_not_run_to_its_end():
    def forward(self, x):
        y = self.norm(x)
        self.mlp(y) + y
        raise RuntimeError("no")

    assert verdict_on(with_forward(forward, norm=Norm(), mlp=Mlp()), "norm", "mlp").sound is False


@pytest.mark.parametrize("mode", [True, False])
def test_what_does_not_run_in_one_mode_is_not_checked(mode):
    def forward(self, x):
        return self.mlp(self.norm(x)) if self.training == mode else x

    verdict = verdict_on(with_forward(forward, norm=Norm(), mlp=Mlp()), "norm", "mlp")
    assert verdict.sound is None
    assert verdict.reason == f"not checked: did not run in {'eval' if mode else 'train'}"


def test_what_does_not_run_and_what_has_no_inputs_is_not_checked():
    model = with_forward(lambda self, x: x, norm=Norm(), mlp=Mlp())
    assert verdict_on(model, "norm", "mlp").reason == "not checked: did not run"
    (verdict,) = check_soundness(model, [site("", "norm", "mlp")], None, live=True).values()
    assert verdict.sound is None
    assert "example inputs" in verdict.reason
    assert forward_runner(model) is None
    inner = with_forward(lambda self, x: self.mlp(self.norm(x)), norm=Norm(), mlp=Mlp())
    outer = with_forward(lambda self, x: self.inner.mlp(self.inner.norm(x)), inner=inner)
    (verdict,) = check_soundness(
        outer, [site("inner", "norm", "mlp")], example_runner(torch.ones(2, 8)), live=False
    ).values()
    assert verdict.reason == "not checked: a member runs outside the forward of 'inner'"


def test_sites_that_are_none():
    model = Parent()
    with pytest.raises(PlanError, match="names 'norn', which Parent does not have"):
        check_soundness(model, [site("", "norn", "mlp")], None, live=False)
    with pytest.raises(PlanError, match="two or more different members"):
        check_soundness(model, [site("", "norm")], None, live=False)
    with pytest.raises(PlanError, match="'mlp' is in two fusions"):
        check_soundness(model, [site("", "norm", "mlp"), site("", "mlp", "other")], None, live=False)
    with pytest.raises(PlanError, match="the host is one of them"):
        check_soundness(model, [FusionSite("", ("norm", "mlp"), "other")], None, live=False)


# Equal layers


class Layer(nn.Module):
    def __init__(self, layer_idx: int, *, leaks: bool = False) -> None:
        super().__init__()
        self.layer_idx, self.leaks, self.norm, self.mlp = layer_idx, leaks, Norm(), Mlp()

    def forward(self, hidden_states, cache=None):
        Layer.num_runs += 1
        y = self.norm(hidden_states)
        return hidden_states + self.mlp(y) + (y if self.leaks else 0), y.new_zeros(()).shape, {"idx": self.layer_idx}


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x, *_ = layer(x, cache=self)
        return x


def stack_verdicts(model):
    Layer.num_runs = 0
    sites = [site(f"layers.{index}", "norm", "mlp") for index in range(len(model.layers))]
    verdicts = check_soundness(model, sites, example_runner(torch.ones(2, 8)), live=False)
    return [verdicts[each].sound for each in sites], Layer.num_runs


def test_two_of_equal_layers_run():
    class Silent(Layer):
        def forward(self, hidden_states, cache=None):
            Layer.num_runs += 1
            return (hidden_states + self.mlp(self.norm(hidden_states)),)

    assert stack_verdicts(Stack(*(Silent(index) for index in range(9)))) == ([True] * 9, 4)


def test_layers_that_differ_run_each():
    class Checked(Layer):
        def forward(self, hidden_states, cache=None):
            Layer.num_runs += 1
            y = self.norm(hidden_states)
            return (hidden_states + self.mlp(y) + (y if self.leaks else 0),)

    layers = [Checked(index, leaks=index == 4) for index in range(9)]
    assert stack_verdicts(Stack(*layers)) == ([index != 4 for index in range(9)], 6)


def test_where_the_two_disagree_all_layers_run():
    class ByIndex(Layer):
        def forward(self, hidden_states, cache=None):
            y = self.norm(hidden_states)
            return (hidden_states + self.mlp(y) + (y if self.layer_idx >= 3 else 0),)

    assert stack_verdicts(Stack(*(ByIndex(index) for index in range(5))))[0] == [True, True, True, False, False]


def test_where_a_shortened_run_fails_all_layers_run():
    class Demanding(Stack):
        def forward(self, x):
            for layer in self.layers:
                x = layer(x)[0] + layer.mlp.up.weight.sum()  # a layer that is left out has no children
            return x

    class Silent(Layer):
        def forward(self, hidden_states):
            return (hidden_states + self.mlp(self.norm(hidden_states)),)

    assert stack_verdicts(Demanding(*(Silent(index) for index in range(5))))[0] == [True] * 5


def test_the_layer_list_of_a_config_tells_layers_apart():
    class Config:
        def __init__(self) -> None:
            self.kinds = ["plain", "plain", "leaky", "plain", "plain"]

    class Looks(Layer):
        def __init__(self, layer_idx, config):
            super().__init__(layer_idx)
            self.config = config

        def forward(self, hidden_states, cache=None):
            y = self.norm(hidden_states)
            leak = y if self.config.kinds[self.layer_idx] == "leaky" else 0
            return (hidden_states + self.mlp(y) + leak,)

    config = Config()
    assert stack_verdicts(Stack(*(Looks(index, config) for index in range(5))))[0] == [True, True, False, True, True]


def test_a_config_list_of_one_entry_does_not():
    class Config:
        def __init__(self) -> None:
            self.architectures = ["Stack"]

    class Silent(Layer):
        def __init__(self, layer_idx, config):
            super().__init__(layer_idx)
            self.config = config

        def forward(self, hidden_states, cache=None):
            Layer.num_runs += 1
            return (hidden_states + self.mlp(self.norm(hidden_states)),)

    config = Config()
    assert stack_verdicts(Stack(*(Silent(index, config) for index in range(9)))) == ([True] * 9, 4)


# The model stays as it was


class Stateful(nn.Module):
    """Everything that a forward can leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp, self.batch_norm = Norm(), Mlp(), nn.BatchNorm1d(8)
        self.lstm, self.history, self.count = nn.LSTM(8, 8), [], 0
        self.call = self.finish
        self.table = torch.ones(8)

    def finish(self, x):
        return x + self.table

    def forward(self, x):
        self.count += 1
        self.history.append(x.shape)
        self.cached = x
        random.random(), np.random.rand(), torch.rand(1)
        y = self.mlp(self.norm(x))
        return self.lstm(self.batch_norm(self.call(F.dropout(y, 0.5, self.training))))[0]


def flat_state(model):
    state = []
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            value = list(value.items()) if isinstance(value, dict) else value
            state.append((name, key, list(value) if isinstance(value, list) else value))
    return state


def same(one, two):
    if isinstance(one, torch.Tensor):
        return one is two and one._version == two._version
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    return one is two or one == two


@pytest.mark.parametrize("live", [False, True])
def test_the_model_is_left_as_it_was(live):
    model = Stateful().eval()
    model.norm.train()
    calls = []
    model.norm.register_forward_hook(lambda *_: calls.append(1))
    model.mlp.forward = model.mlp.forward
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    versions = {name: tensor._version for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    before, states = flat_state(model), (random.getstate(), np.random.get_state(), torch.get_rng_state())

    def run(model):
        if live and next(model.parameters()).is_meta:
            raise RuntimeError("real tensors only")
        return example_runner(torch.ones(3, 8))(model)

    (verdict,) = check_soundness(model, [site("", "norm", "mlp")], run, live=live).values()
    assert verdict.sound, verdict
    assert ("own tensors" in verdict.reason) == live
    assert same(before, flat_state(model))
    assert states[0] == random.getstate()
    assert all(np.array_equal(old, new) for old, new in zip(states[1], np.random.get_state(), strict=True))
    assert torch.equal(states[2], torch.get_rng_state())
    assert not calls
    assert torch.is_grad_enabled()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor._version == versions[name], name
        assert torch.equal(tensor, tensors[name]), name


def test_a_forward_put_into_an_instance_is_followed_if_it_can_be():
    model = Parent()
    model.forward = type(model).mro()[0].__dict__.get("forward", lambda x: x)
    assert verdict_on(model, "norm", "mlp").reason == "not checked: did not run"
    model = Parent()
    model.forward = (lambda self, x: self.mlp(self.norm(x))).__get__(model)
    assert verdict_on(model, "norm", "mlp").sound


def test_threads():
    def leaky(self, x):
        y = self.norm(x)
        return self.mlp(y) + y

    forwards = [lambda self, x: self.mlp(self.norm(x)), leaky] * 2
    found = {}

    def check(index):
        model = with_forward(forwards[index], norm=Norm(), mlp=Mlp())
        found[index] = [verdict_on(model, "norm", "mlp").sound for _ in range(10)]

    threads = [threading.Thread(target=check, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: [True] * 10, 1: [False] * 10, 2: [True] * 10, 3: [False] * 10}


def test_inside_inference_mode():
    model = with_forward(lambda self, x: self.mlp(self.norm(x)), norm=Norm(), mlp=Mlp())
    with torch.inference_mode():
        assert verdict_on(model, "norm", "mlp").sound


def test_compiled_functions_run_eagerly():
    compiled = torch.compile(lambda x: x * 2, backend="eager")

    def forward(self, x):
        y = self.norm(x)
        return self.mlp(y) + compiled(y)

    verdict = verdict_on(with_forward(forward, norm=Norm(), mlp=Mlp()), "norm", "mlp")
    assert "also used by mul" in verdict.reason


# Transformers


def tiny(name, **more):
    """A model of two to three tiny layers, on meta."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, **tokens}
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "vocab_size": 64}
    gpt = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64, "rotary_dim": 8, **tokens}
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    image = {"image_size": 16, "patch_size": 8}
    audio = {"num_mel_bins": 8, "max_source_positions": 16, "encoder_layers": 3, "decoder_layers": 3, "vocab_size": 64}
    whisper = {**audio, "d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, **tokens}
    config_class, model_class, sizes = {
        "llama": ("LlamaConfig", "LlamaForCausalLM", sizes | heads),
        "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", sizes | heads),
        "mistral": ("MistralConfig", "MistralModel", sizes | heads),
        "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", sizes | heads),
        "phi3": ("Phi3Config", "Phi3ForCausalLM", sizes | heads),
        "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", sizes | heads),
        "cohere": ("CohereConfig", "CohereForCausalLM", sizes | heads),
        "phi": ("PhiConfig", "PhiForCausalLM", sizes | heads),
        "falcon": ("FalconConfig", "FalconForCausalLM", sizes | heads),
        "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", sizes | heads),
        "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", sizes | heads | experts),
        "mixtral": ("MixtralConfig", "MixtralForCausalLM", sizes | heads | experts),
        "gpt2": ("GPT2Config", "GPT2LMHeadModel", gpt),
        "gptj": ("GPTJConfig", "GPTJForCausalLM", gpt),
        "t5": ("T5Config", "T5ForConditionalGeneration", t5),
        "bert": ("BertConfig", "BertForSequenceClassification", sizes | heads),
        "vit": ("ViTConfig", "ViTForImageClassification", sizes | image),
        "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", whisper),
    }[name]
    if name == "falcon":
        del sizes["head_dim"]  # a property there
    config = getattr(transformers, config_class)(**sizes, **more)
    with torch.device("meta"):
        return getattr(transformers, model_class)(config).eval()


POST = ("post_attention_layernorm", "mlp")
SOUND = [
    ("llama", "model.layers.{}", POST),
    ("llama", "model.layers.{}", ("input_layernorm", "self_attn")),
    ("qwen3", "model.layers.{}", POST),
    ("mistral", "layers.{}", POST),
    ("gemma3", "model.layers.{}", ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm")),
    ("phi3", "model.layers.{}", POST),
    ("olmo2", "model.layers.{}", ("mlp", "post_feedforward_layernorm")),
    ("olmo2", "model.layers.{}", ("self_attn", "post_attention_layernorm")),
    ("gpt_neox", "gpt_neox.layers.{}", POST),
    ("qwen3_moe", "model.layers.{}", POST),
    ("mixtral", "model.layers.{}", POST),
    ("gpt2", "transformer.h.{}", ("ln_2", "mlp")),
    ("t5", "encoder.block.{}.layer.1", ("layer_norm", "DenseReluDense")),
    ("t5", "decoder.block.{}.layer.2", ("layer_norm", "DenseReluDense")),
    ("bert", "bert.encoder.layer.{}", ("intermediate", "output")),
    ("bert", "bert.encoder.layer.{}.attention.output", ("dense", "dropout")),
    ("vit", "vit.layers.{}", ("layernorm_after", "mlp")),
    ("whisper", "model.encoder.layers.{}", ("fc1", "activation_fn")),
    ("whisper", "model.decoder.layers.{}", ("final_layer_norm", "fc1")),
]
REFUSED = [
    ("llama", "model.layers.{}", ("input_layernorm", "mlp"), "'input_layernorm' is also used by 'self_attn.q_proj'"),
    ("llama", "model.layers.{}", ("post_attention_layernorm", "self_attn"), "also used by 'mlp.gate_proj' (linear)"),
    ("llama", "model.layers.{}.mlp", ("gate_proj", "down_proj"), "'gate_proj' is also used by 'act_fn'"),
    ("qwen3", "model.layers.{}.self_attn", ("q_proj", "q_norm"), "'q_proj' is also used by view"),
    ("gemma3", "model.layers.{}", POST, "'post_attention_layernorm' is also used by add in the forward of Gemma3"),
    ("cohere", "model.layers.{}", ("input_layernorm", "mlp"), "'input_layernorm' is also used by 'self_attn.q_proj'"),
    ("cohere", "model.layers.{}", ("input_layernorm", "self_attn"), "also used by 'mlp.gate_proj'"),
    ("gptj", "transformer.h.{}", ("ln_1", "mlp"), "the output of 'ln_1' is also used by 'attn.q_proj'"),
    ("phi", "model.layers.{}", ("input_layernorm", "mlp"), "'input_layernorm' is also used by 'self_attn.q_proj'"),
    ("falcon", "transformer.h.{}", ("input_layernorm", "mlp"), "'input_layernorm' is also used by 'self_attention."),
    ("bert", "bert.encoder.layer.{}.output", ("dense", "LayerNorm"), "'dense' is also used by 'dropout' (dropout)"),
    ("vit", "vit.layers.{}", ("layernorm_before", "mlp"), "'layernorm_before' is also used by 'attention.q_proj'"),
    (
        "t5",
        "encoder.block.{}.layer.0",
        ("SelfAttention", "dropout"),
        "'SelfAttention' is returned by T5LayerSelfAttention",
    ),
]


def verdicts_on(name, parent, members, *, live=False, **more):
    model = tiny(name, **more)
    if live:
        model = model.to_empty(device="cpu")
    run = forward_runner(model)
    sites = [site(parent.format(index), *members) for index in range(3)]
    return check_soundness(model, sites, run, live=live)


@pytest.mark.transformers
@pytest.mark.parametrize(("name", "parent", "members"), SOUND)
def test_sound_fusions_of_transformers(name, parent, members):
    verdicts = verdicts_on(name, parent, members)
    assert [verdict.sound for verdict in verdicts.values()] == [True] * 3, verdicts


@pytest.mark.transformers
@pytest.mark.parametrize(("name", "parent", "members", "refusal"), REFUSED)
def test_refused_fusions_of_transformers(name, parent, members, refusal):
    for verdict in verdicts_on(name, parent, members).values():
        assert verdict.sound is False
        assert refusal in verdict.reason


@pytest.mark.transformers
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "t5"])
def test_live_models_are_checked_on_meta_too(name):
    parent, members = next((parent, members) for each, parent, members in SOUND if each == name)
    for verdict in verdicts_on(name, parent, members, live=True).values():
        assert verdict.sound
        assert "meta" in verdict.reason


@pytest.mark.transformers
def test_gradient_checkpointing_and_eager_attention_do_not_matter():
    model = tiny("llama", attn_implementation="eager", use_cache=False)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    before = flat_state(model)
    pairs = [site(f"model.layers.{index}", *POST) for index in range(3)]
    verdicts = check_soundness(model, pairs, forward_runner(model), live=False)
    assert all(verdict.sound for verdict in verdicts.values())
    assert same(before, flat_state(model))


@pytest.mark.transformers
def test_a_vision_tower_is_run_on_its_own():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = transformers.LlamaConfig(**sizes, vocab_size=64)
    vision = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=32)
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=3)
        )
    layers = {
        path: ("layer_norm2", "mlp") if hasattr(module, "layer_norm2") else POST
        for path, module in model.named_modules()
        if path.rpartition(".")[2].isdigit() and hasattr(module, "mlp")
    }
    assert len(layers) == 6
    verdicts = check_soundness(
        model, [site(path, *members) for path, members in layers.items()], forward_runner(model), live=False
    )
    assert all(verdict.sound for verdict in verdicts.values()), verdicts


@pytest.mark.transformers
def test_accelerate_hooks_do_not_run():
    accelerate = pytest.importorskip("accelerate")

    class Loud(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            raise AssertionError("the hook of the user's model ran")

    model = tiny("llama")
    for module in model.modules():
        accelerate.hooks.add_hook_to_module(module, Loud())
    before = flat_state(model)
    pairs = [site(f"model.layers.{index}", *POST) for index in range(3)]
    assert all(v.sound for v in check_soundness(model, pairs, forward_runner(model), live=False).values())
    assert same(before, flat_state(model))


class WithResidual(nn.Module):
    """The second member takes the parent's input besides the first one's output."""

    def __init__(self):
        super().__init__()
        self.norm, self.add = nn.LayerNorm(4), Add()

    def forward(self, x):
        return self.add(self.norm(x), x)


class Add(nn.Module):
    def forward(self, hidden, residual):
        return hidden + residual


def test_what_a_kernel_would_not_see_is_said():
    model = nn.Sequential(WithResidual())
    run = example_runner(torch.zeros(2, 4, device="meta"))
    members = ("0.norm", "0.add")
    at_first, at_second = (FusionSite("0", members, host) for host in members)
    found = check_soundness(model, [at_first], run, live=False)[at_first]
    assert found.sound
    assert "'add' takes more tensors, which a kernel at 'norm' does not see" in found.reason
    found = check_soundness(model, [at_second], run, live=False)[at_second]
    assert found.sound
    assert "does not see" not in found.reason
