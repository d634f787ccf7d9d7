"""Threads start, and read what is sure to be wanted, while the rest of a load is found out; here there is no GPU."""

import pytest
import torch
import transformers

import kernelgraft
import tiny
from kernelgraft import KernelConfig, ahead, auto
from kernelgraft.checkpoint import fill, reader
from kernelgraft.checkpoint.files import Checkpoint
from kernelgraft.checkpoint.reader import CpuLane, Reading
from kernelgraft.errors import KernelGraftError, PlanError
from kernelgraft.sites import SitePlanner
from leftovers import assert_nothing_left, our_threads

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


# --- what is read before it is known what becomes of the rest


@pytest.fixture
def begun(to_a_gpu, monkeypatch):
    """The names of the parameters that were begun, in loads to the CPU that seem to go to a GPU."""
    found = []

    def begin(lazies, ready):
        fill.begin(lazies, ready)
        found[:] = sorted(source.name for lazy, _ in ready.begun.values() for source in lazy.sources)

    monkeypatch.setattr(ahead, "begin", begin)
    for module in (fill, reader):
        monkeypatch.setattr(module, "goes_to_cuda", lambda _: True)
    monkeypatch.setattr(reader, "current_streams", dict.fromkeys)
    return found


FUSED = KernelConfig({tiny.FUSION: f"{tiny.EXAMPLE}:RMSNormMLP"}, inherit_mapping=False)


def same_as_transformers(model, folder):
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    found = model.state_dict()
    assert list(found) == list(plain)
    assert all(torch.equal(found[name].cpu(), tensor) for name, tensor in plain.items())


def test_without_kernels_all_are_begun(qwen3_folder, started, begun):
    model = load(qwen3_folder, device_map="cpu")
    assert begun == sorted(name for name, _ in model.named_parameters())
    same_as_transformers(model, qwen3_folder)
    assert_nothing_left(qwen3_folder)


def test_with_kernels_all_are_begun_too(qwen3_folder, started, begun):
    model = load(qwen3_folder, kernel_config=FUSED, device_map="cpu")
    assert len(kernelgraft.graft_of(model).plan.sites) == 2
    assert begun == sorted(model.state_dict())
    assert [each.begun for each in started] == [{}]  # else they would outlive the model
    same_as_transformers(model, qwen3_folder)
    assert_nothing_left(qwen3_folder)


def test_what_is_laid_out_anew_is_begun_before_the_graft_is_put_in(qwen3_folder, started, begun, monkeypatch):
    seen = []
    real = auto.apply_blueprint

    def apply_blueprint(*args, **kwargs):
        seen.extend(begun)
        return real(*args, **kwargs)

    monkeypatch.setattr(auto, "apply_blueprint", apply_blueprint)
    model = load(qwen3_folder, kernel_config=FUSED, device_map="cpu")
    assert seen == sorted(model.state_dict())


def test_what_is_put_into_the_model_meanwhile_is_what_is_packed(qwen3_folder, started, begun, monkeypatch):
    real = auto.apply_blueprint

    def apply_blueprint(model, *args, **kwargs):
        mlp = model.model.layers[0].mlp
        mlp.gate_proj.weight = torch.nn.Parameter(mlp.up_proj.weight.flip(0))
        return real(model, *args, **kwargs)

    plain = load(qwen3_folder, device_map="cpu").state_dict()
    monkeypatch.setattr(auto, "apply_blueprint", apply_blueprint)
    found = load(qwen3_folder, kernel_config=FUSED, device_map="cpu").state_dict()
    plain["model.layers.0.mlp.gate_proj.weight"] = plain["model.layers.0.mlp.up_proj.weight"].flip(0)
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


def test_each_byte_is_read_once(qwen3_folder, started, begun):
    model = load(qwen3_folder, kernel_config=FUSED, device_map="cpu")
    assert [each._nbytes for each in started] == [sum(tensor.nbytes for tensor in model.state_dict().values())]


@pytest.mark.parametrize("config", [None, FUSED], ids=["plain", "fused"])
def test_memory_is_reserved_for_all_and_then_for_no_more(qwen3_folder, started, begun, monkeypatch, config):
    """What torch has unused is not known here: the second call must not ask for what the first had asked for."""
    asked = []
    monkeypatch.setattr(fill, "reserve", lambda nbytes: asked.append(sum(nbytes.values())))
    model = load(qwen3_folder, kernel_config=config, device_map="cpu")
    sizes = {name: tensor.nbytes for name, tensor in model.state_dict().items()}
    assert asked == [sum(sizes.values()), 0]


def test_so_it_is_where_transformers_works_the_devices_out(qwen3_folder, started, begun):
    model = load(qwen3_folder, device_map="auto")
    assert len(started) == 1
    assert begun == sorted(name for name, _ in model.named_parameters())
    same_as_transformers(model, qwen3_folder)
    assert_nothing_left(qwen3_folder)


def test_what_only_another_forward_uses_is_begun_as_well(qwen3_folder, started, begun):
    config = KernelConfig({"RMSNorm": f"{tiny.EXAMPLE}:CustomRMSNorm"}, inherit_mapping=False)
    model = load(qwen3_folder, kernel_config=config, device_map="cpu")
    assert kernelgraft.graft_of(model).plan.sites
    assert begun == sorted(model.state_dict())
    same_as_transformers(model, qwen3_folder)


def test_what_no_kernel_asks_for_is_begun_before_the_plan_is_made(qwen3_folder, started, begun, monkeypatch):
    seen = []
    real = SitePlanner.prepare

    def prepare(self, want):
        seen.append(list(begun))
        return real(self, want)

    monkeypatch.setattr(SitePlanner, "prepare", prepare)
    model = load(qwen3_folder, kernel_config=FUSED, device_map="cpu")
    names = [name for name in model.state_dict() if ".mlp." not in name and "post_attention" not in name]
    assert seen == [sorted(names)] * 2


def test_what_will_be_tied_to_another_is_not_begun(tmp_path, started, begun):
    tiny.model("qwen3", tie_word_embeddings=True).save_pretrained(tmp_path)
    model = load(tmp_path, device_map="cpu")
    assert "model.embed_tokens.weight" in begun
    assert "lm_head.weight" not in begun
    assert model.lm_head.weight is model.model.embed_tokens.weight
    same_as_transformers(model, tmp_path)


def test_a_plan_that_is_refused_stops_what_was_begun_before_the_files_are_closed(
    qwen3_folder, started, begun, monkeypatch
):
    closed = []
    real = Checkpoint.close

    def close(self):
        closed.append([thread.name for thread in our_threads()])
        real(self)

    monkeypatch.setattr(Checkpoint, "close", close)
    monkeypatch.setattr(SitePlanner, "prepare", refused)
    with pytest.raises(PlanError, match="not this one"):
        load(qwen3_folder, kernel_config=FUSED, device_map="cpu")
    assert begun
    assert closed == [[]]
    assert [each.begun for each in started] == [{}]
    assert_nothing_left(qwen3_folder)


def refused(*_):
    raise PlanError("not this one")


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
