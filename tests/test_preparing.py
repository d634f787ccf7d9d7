"""Kernels get ready on a thread while weights are read: each kind once, for a GPU alone, and nothing depends on it."""

import logging
import sys
import threading

import pytest
import torch
from torch import nn

import kernelgraft
import tiny
import toys
from interrupting import interrupt_main_thread
from kernelgraft import Kernel, KernelConfig, preparing
from leftovers import assert_nothing_left, our_threads

BF16 = torch.bfloat16


class ScaledNormLayout(nn.Module):
    asked = None
    packing = {"scale": "weight"}

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def prepare_kernels(self, device):
        ScaledNormLayout.asked(self, device)


class ScaledNorm(nn.Module):
    def forward(self, hidden_states):
        return nn.functional.rms_norm(hidden_states, self.scale.shape, self.scale, self.eps)


NORM = {"Norm": Kernel(ScaledNorm, ScaledNormLayout)}


def grafted(model=None):
    with kernelgraft.recorded():
        made = toys.Model() if model is None else model()
    return kernelgraft.graft(made, NORM)


@pytest.fixture
def asked(monkeypatch):
    """What layouts were asked to prepare: their parameters, mode, device, and the thread."""
    found = []

    def note(layout, device):
        state = {name: (each.device.type, each.dtype, tuple(each.shape)) for name, each in layout.named_parameters()}
        found.append((state, layout.training, device, threading.current_thread().name))

    monkeypatch.setattr(ScaledNormLayout, "asked", staticmethod(note))
    return found


@pytest.fixture
def on_gpus(monkeypatch):
    """The CPU passes for a GPU."""
    monkeypatch.setattr(preparing, "_is_gpu", lambda device: device.type == "cpu")


def test_a_cpu_has_nothing_to_prepare(asked):
    grafted()
    assert asked == []


def test_each_kind_once_on_meta_by_a_thread_of_its_own(asked, on_gpus):
    def of_two_kinds():
        made = toys.Model(num_layers=3)
        made.layers[2].to(BF16)
        return made

    made = grafted(of_two_kinds)
    assert len(made.plan.sites) == 4
    cpu = torch.device("cpu")
    assert asked == [
        ({"scale": ("meta", dtype, (toys.H,))}, True, cpu, "kernelgraft-prepare") for dtype in (torch.float32, BF16)
    ]
    assert our_threads() == []
    assert not any(parameter.is_meta for parameter in made.model.parameters())


def test_what_is_not_trained_and_what_is_are_two_kinds(asked, on_gpus):
    def of_two_kinds():
        made = toys.Model()
        made.norm.eval()
        return made

    grafted(of_two_kinds)
    assert [training for _, training, _, _ in asked] == [True, False]


def test_a_method_of_the_original_with_that_name_is_its_own(on_gpus):
    class Norm(toys.Norm):
        def prepare_kernels(self):
            raise AssertionError("this is the model's")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = Norm(toys.H)

    class PlainLayout(nn.Module):
        def __init__(self, dim, eps=1e-6):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(dim))
            self.eps = eps

    class Plain(nn.Module):
        def forward(self, hidden_states):
            return hidden_states * self.weight

    with kernelgraft.recorded():
        model = Model()
    kernelgraft.graft(model, {"Norm": Kernel(Plain, PlainLayout)})


def test_one_that_fails_is_told_and_the_graft_is_made(monkeypatch, on_gpus, caplog):
    def fail(*_):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(ScaledNormLayout, "asked", staticmethod(fail))
    with caplog.at_level(logging.WARNING, "kernelgraft"):
        made = grafted()
    assert made.is_applied
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        "ScaledNormLayout.prepare_kernels failed, so the kernel's first call takes longer: no such instruction"
    )
    assert our_threads() == []


@pytest.fixture
def is_over(monkeypatch):
    """Waits until the thread has been told to end: `preparing` makes that event before any other."""
    made = []

    class Recorded(threading.Event):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr(preparing.threading, "Event", Recorded)
    return lambda: made[0].wait(60)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_it_ends_after_what_it_is_at_when_the_graft_fails(monkeypatch, on_gpus, is_over, error):
    """The first of two kinds is prepared when reading fails; the second is not begun."""
    begun, found = threading.Semaphore(0), []

    def wait(layout, _):
        found.append(layout.scale.dtype)
        begun.release()
        assert is_over()

    def failing(*_):
        assert begun.acquire(timeout=60)
        raise error("while weights are read")

    monkeypatch.setattr(ScaledNormLayout, "asked", staticmethod(wait))
    monkeypatch.setattr(sys.modules["kernelgraft.graft"], "materialize", failing)

    def of_two_kinds():
        made = toys.Model()
        made.norm.to(BF16)
        return made

    with pytest.raises(error, match="while weights are read"):
        grafted(of_two_kinds)
    assert found == [torch.float32]
    assert our_threads() == []


@pytest.mark.transformers
def test_a_load_prepares_what_it_will_run_before_it_has_a_weight(monkeypatch, on_gpus, qwen3_folder):
    """In the dtype that is loaded, from lazy parameters."""
    from kernelgraft.kernels import rms_norm_mlp

    found = []

    def note(layout, device):
        assert all(parameter.is_meta for parameter in layout.parameters())
        found.append((layout.gate_up_proj.weight.dtype, tuple(layout.gate_up_proj.weight.shape), layout.training))

    monkeypatch.setattr(rms_norm_mlp.RMSNormMLPLayout, "prepare_kernels", note)
    pair = (("RMSNorm", "model.layers.*.post_attention_layernorm"), ("MLP", "model.layers.*.mlp"))
    config = KernelConfig({pair: "kernelgraft.kernels:RMSNormMLP"}, inherit_mapping=False)
    loaded = kernelgraft.AutoModelForCausalLM.from_pretrained(qwen3_folder, kernel_config=config, dtype=BF16)
    sizes = tiny.DECODER
    assert found == [(BF16, (2 * sizes["intermediate_size"], sizes["hidden_size"]), False)]
    assert kernelgraft.graft_of(loaded).is_applied
    assert_nothing_left(qwen3_folder)


def test_ctrl_c_while_it_is_waited_for_lets_it_end(monkeypatch, on_gpus, is_over):
    """All weights are there, and kernels are still compiled: the second kind is not begun."""
    found = []

    def interrupt(layout, _):
        found.append(layout.scale.dtype)
        interrupt_main_thread()
        assert is_over()

    monkeypatch.setattr(ScaledNormLayout, "asked", staticmethod(interrupt))

    def of_two_kinds():
        made = toys.Model()
        made.norm.to(BF16)
        return made

    with kernelgraft.recorded():
        model = of_two_kinds()
    with pytest.raises(KeyboardInterrupt):
        kernelgraft.graft(model, NORM)
    assert found == [torch.float32]
    assert our_threads() == []
    assert kernelgraft.graft_of(model) is None
    assert [type(module) for module in model.layers[0].children()] == [toys.Norm, toys.MLP]
