"""Threads that will read to a GPU start while the rest of a load is found out; here there is none, and none reads."""

import pytest
import torch
import transformers

import kernelgraft
import tiny
from kernelgraft import KernelConfig, auto
from kernelgraft.checkpoint.reader import CpuLane, Reading
from kernelgraft.errors import KernelGraftError
from leftovers import assert_nothing_left

pytestmark = pytest.mark.transformers


@pytest.fixture
def started(monkeypatch):
    """The readings that were started, by a process that seems to have a GPU."""
    found = []

    def ready():
        found.append(Reading())
        found[-1].start([CpuLane] * 2)
        return found[-1]

    monkeypatch.setattr(auto, "ready_for_cuda", ready)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return found


def load(folder, **kwargs):
    return kernelgraft.from_pretrained(transformers.AutoModelForCausalLM, folder, **kwargs)


@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}, torch.device("cpu"), {"": torch.device("cpu")}])
def test_a_load_to_the_cpu_starts_none(device_map, qwen3_folder, started):
    load(qwen3_folder, device_map=device_map)
    assert started == []


@pytest.fixture
def to_a_gpu(started, monkeypatch):
    """Loads to the CPU that seem to go to a GPU until they come to their bytes."""
    monkeypatch.setattr(auto, "_is_cuda", lambda _: True)


def test_a_load_that_needs_none_after_all_stops_them(qwen3_folder, started, to_a_gpu):
    load(qwen3_folder, device_map="cpu")
    assert len(started) == 1
    assert_nothing_left(qwen3_folder)


def test_a_load_that_fails_stops_them(qwen3_folder, started, to_a_gpu):
    config = KernelConfig({"NoSuchClass": f"{tiny.EXAMPLE}:CustomRMSNorm"}, inherit_mapping=False)
    with pytest.raises(KernelGraftError):
        load(qwen3_folder, kernel_config=config, device_map="cpu")
    assert len(started) == 1
    assert_nothing_left(qwen3_folder)


def test_ctrl_c_while_the_plan_is_made_stops_them(qwen3_folder, started, to_a_gpu, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(auto, "make_blueprint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(qwen3_folder, kernel_config=KernelConfig({}, inherit_mapping=False), device_map="cpu")
    assert len(started) == 1
    assert_nothing_left(qwen3_folder)


@pytest.mark.parametrize("device_map", ["cuda", "cuda:0", 0, torch.device("cuda", 0), {"": 0}, {"": "cuda:0"}])
def test_every_way_to_name_a_gpu_counts(device_map, started):
    load = auto._Load(device_map=device_map)
    with load.stack:
        load.make_ready()
        load.make_ready()
        assert len(started) == 1


@pytest.mark.parametrize("device_map", ["auto", "nonsense", -1])
def test_what_transformers_has_to_work_out_or_refuse_is_left_to_it(device_map, started):
    auto._Load(device_map=device_map).make_ready()
    assert started == []
