"""Models grafted, run and removed in several threads at the same time."""

import contextlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

import kernelgraft
import tiny
import toys
from kernelgraft import KernelConfig

pytestmark = pytest.mark.transformers

NUM_THREADS, NUM_ROUNDS = 4, 4


@pytest.fixture(autouse=True)
def switch_often():
    """Lets threads take turns a thousand times more often than they would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(autouse=True)
def tie_weights(monkeypatch):
    """Transformers takes this method away while it loads, and loads in several threads may leave it so."""
    monkeypatch.setattr(PreTrainedModel, "tie_weights", PreTrainedModel.tie_weights)


def in_threads(work, num_threads=NUM_THREADS):
    """Runs `work(index)` in threads that start at the same moment; raises what any of them raises."""
    barrier = threading.Barrier(num_threads)

    def start(index):
        barrier.wait()
        return work(index)

    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(start, range(num_threads)))


def rotary(q, k, cos, sin, unsqueeze_dim=1):
    def turned(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


CONFIGS = {
    "qwen3": tiny.guide_config(),
    "llama": KernelConfig({"RMSNorm": f"{tiny.EXAMPLE}:CustomRMSNorm", "rotary_pos_emb": rotary}),
}
COUNTS = {"qwen3": 9, "llama": 5 + 2}


def test_two_models_with_two_configs_come_and_go_in_four_threads():
    kinds = ["qwen3", "llama"] * (NUM_THREADS // 2)
    models = [tiny.model(kind, seed=index) for index, kind in enumerate(kinds)]
    expected = [tiny.logits(model, kind) for model, kind in zip(models, kinds, strict=True)]
    expected_grads = [tiny.gradients(model, kind) for model, kind in zip(models, kinds, strict=True)]
    classes = [[type(module) for module in model.modules()] for model in models]
    modules = [list(model.modules()) for model in models]

    def work(index):
        model, kind = models[index], kinds[index]
        for _ in range(NUM_ROUNDS):
            with kernelgraft.graft(model, CONFIGS[kind]) as graft:
                assert torch.equal(tiny.logits(model, kind), expected[index])
                assert (graft.calls.kernel, graft.calls.reference) == (COUNTS[kind], 0)
                saved = model.state_dict()
                with graft.reference():
                    assert torch.equal(tiny.logits(model, kind), expected[index])
            assert torch.equal(tiny.logits(model, kind), expected[index])
            assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())

    state = torch.get_rng_state()
    in_threads(work)
    assert torch.equal(torch.get_rng_state(), state)
    for index, (model, kind) in enumerate(zip(models, kinds, strict=True)):
        assert all(one is other for one, other in zip(model.modules(), modules[index], strict=True))
        assert [type(module) for module in model.modules()] == classes[index]
        grads = tiny.gradients(model, kind)
        assert all(torch.equal(grads[name], grad) for name, grad in expected_grads[index].items())


def test_models_are_loaded_with_and_without_kernels_in_four_threads(checkpoint):
    folders = {kind: checkpoint(kind) for kind in CONFIGS}
    kinds = ["qwen3", "llama"] * (NUM_THREADS // 2)
    plain = {kind: tiny.model_class(kind).from_pretrained(folders[kind]) for kind in CONFIGS}
    expected = {kind: tiny.logits(model, kind) for kind, model in plain.items()}

    def work(index):
        kind = kinds[index]
        for _ in range(2):
            with_kernels = kernelgraft.from_pretrained(
                tiny.model_class(kind), folders[kind], kernel_config=KernelConfig.of(CONFIGS[kind])
            )
            assert torch.equal(tiny.logits(with_kernels, kind), expected[kind])
            assert kernelgraft.graft_of(with_kernels).calls.kernel == COUNTS[kind]
            without = tiny.model_class(kind).from_pretrained(folders[kind])
            assert kernelgraft.graft_of(without) is None
            assert torch.equal(tiny.logits(without, kind), expected[kind])

    in_threads(work)


@pytest.mark.parametrize("reference", [False, True])
def test_one_grafted_model_runs_in_four_threads(reference):
    model = tiny.model("qwen3")
    expected = [tiny.logits(model, seed=seed) for seed in range(NUM_THREADS)]
    with kernelgraft.graft(model, tiny.guide_config()) as graft:
        with graft.reference() if reference else contextlib.nullcontext():
            results = in_threads(lambda seed: [tiny.logits(model, seed=seed) for _ in range(NUM_ROUNDS)])
        for found, logits in zip(results, expected, strict=True):
            assert all(torch.equal(each, logits) for each in found)


def short_only(hidden_states):
    return hidden_states.shape[1] <= 5 or "too many tokens"


class LaterHostLayout(toys.NormMLPLayout):
    host = "mlp"


@pytest.mark.parametrize("layout", [toys.NormMLPLayout, LaterHostLayout])
def test_a_call_that_is_refused_in_one_thread_is_not_refused_in_another(layout):
    model = toys.model()
    inputs = [toys.inputs(seed).repeat(1, 1 + seed % 2, 1) for seed in range(NUM_THREADS)]
    expected = [model(x) for x in inputs]
    kernel = toys.kernel(toys.norm_mlp, layout, supports=staticmethod(short_only))
    config = KernelConfig({toys.FUSION: kernel}, fallback="reference")
    with kernelgraft.graft(model, config, example_inputs=inputs[0]):
        results = in_threads(lambda index: [model(inputs[index]) for _ in range(5 * NUM_ROUNDS)])
    for found, out in zip(results, expected, strict=True):
        assert all(torch.allclose(each, out, atol=1e-6) for each in found)


def test_classes_are_made_once_for_all_threads():
    def forward(self, hidden_states):
        return 2 * F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)

    models = [toys.model() for _ in range(NUM_THREADS)]
    kernel = toys.kernel(forward)
    in_threads(lambda index: kernelgraft.graft(models[index], KernelConfig({"Norm": kernel})))
    assert len({type(model.norm) for model in models}) == 1
    assert len({type(model) for model in models}) == 1
