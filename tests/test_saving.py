"""Every way to save a grafted model writes what the untouched model writes, and the Trainer trains and resumes it."""

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

import kernelgraft
import twins
import zoo
from kernelgraft.errors import ConversionError
from twins import KINDS, TRANSFORMERS, assert_same_state, assert_same_tensors, pair

RECORD = "kernelgraft.json"


def written(folder):
    """Every file but our record, which only a grafted model leaves."""
    return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir()) if file.name != RECORD}


@pytest.mark.parametrize("kind", KINDS)
def test_torch_save(kind, tmp_path):
    twin, model, _ = pair(kind)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    assert_same_state(state, twin.state_dict())
    twins.untouched(kind, seed=1).load_state_dict(state)
    # One part of a merged parameter does not take the whole of it along.
    name = "mix.k.weight" if kind == "zoo" else "model.layers.0.mlp.up_proj.weight"
    buffers = [io.BytesIO(), io.BytesIO()]
    for each, buffer in zip((model, twin), buffers, strict=True):
        torch.save({"part": each.state_dict()[name]}, buffer)
    assert len(buffers[0].getvalue()) <= len(buffers[1].getvalue()) + 512


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_safetensors(kind, tmp_path):
    check_safetensors(kind, tmp_path)


def test_safetensors_of_parts_that_lie_strided_in_a_packed_parameter(tmp_path):
    check_safetensors("zoo", tmp_path)


def check_safetensors(kind, tmp_path):
    twin, model, _ = pair(kind)
    for name, each in (("model", model), ("twin", twin)):
        save_model(each, str(tmp_path / f"{name}.safetensors"))
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "twin.safetensors").read_bytes()
    if "tied" not in kind:
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, str(tmp_path / "file.safetensors"))
        assert_same_tensors(load_file(str(tmp_path / "file.safetensors")), twin.state_dict())


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "8KB"}])
@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_save_model(kind, shards, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    twin, model, _ = pair(kind)
    for name, each in (("model", model), ("twin", twin)):
        accelerate.Accelerator(cpu=True).save_model(each, str(tmp_path / name), **shards)
    assert written(tmp_path / "model") == written(tmp_path / "twin")
    assert len(written(tmp_path / "model")) > (1 if shards and kind != "zoo" else 0)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}, {"safe_serialization": True}])
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_save_pretrained(kind, options, tmp_path):
    twin, model, graft = pair(kind)
    model.save_pretrained(tmp_path / "model", **options)
    twin.save_pretrained(tmp_path / "twin", **options)
    assert written(tmp_path / "model") == written(tmp_path / "twin")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architectures"] == [type(twin).__name__]
    for name, each in (("ours", model), ("ours-untouched", twin)):
        kernelgraft.save_pretrained(each, tmp_path / name, **options)
        assert written(tmp_path / name) == written(tmp_path / "twin")
        assert (tmp_path / name / RECORD).exists() == (each is model)
    loaded = type(twin).from_pretrained(tmp_path / "model")
    assert_same_state(loaded.state_dict(), twin.state_dict())
    assert graft.is_applied


@pytest.mark.transformers
def test_save_pretrained_after_training_and_in_another_dtype(tmp_path):
    twin, model, graft = pair("qwen3")
    other = twins.untouched("qwen3", seed=1).state_dict()
    graft.update(other), twin.load_state_dict(other)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    twin.to(torch.bfloat16).save_pretrained(tmp_path / "twin")
    assert written(tmp_path / "model") == written(tmp_path / "twin")


def test_a_plain_module(tmp_path):
    twin, model, _ = pair("zoo")
    kernelgraft.save_pretrained(model, tmp_path / "model")
    kernelgraft.save_pretrained(twin, tmp_path / "twin")
    assert written(tmp_path / "model") == written(tmp_path / "twin")
    loaded = kernelgraft.load(zoo.model(1), tmp_path / "model")
    assert_same_state(loaded.state_dict(), twin.state_dict())


def test_a_rule_without_inverse_writes_nothing(tmp_path):
    model = zoo.model()
    kernelgraft.graft(model, {"Legacy": zoo.NarrowedLegacy})
    with pytest.raises(ConversionError, match=r"legacy\.weight.*narrows"):
        kernelgraft.save_pretrained(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- the Trainer


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.randint(2, 60, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids.clone()}


def trainer(model, folder, **options):
    transformers = pytest.importorskip("transformers")
    arguments = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,  # with less, a gradient that is nothing but rounding makes as large a step as any
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    settings = transformers.TrainingArguments(output_dir=str(folder), **{**arguments, **options})
    return transformers.Trainer(model=model, args=settings, train_dataset=Sentences(), eval_dataset=Sentences())


@pytest.mark.filterwarnings("default")  # of Transformers' own, about its own arguments
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.transformers) for kind in ("qwen3", "llama-tied")]
)
def test_the_trainer_trains_saves_and_resumes(kind, tmp_path):
    twin, model, graft = pair(kind)
    trainer(twin, tmp_path / "twin").train()
    trainer(model, tmp_path / "model").train()
    assert graft.calls.kernel > 0
    assert graft.calls.reference == 0
    # The same training, but for the order in which a merged product sums its gradient.
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()), rtol=1e-3, atol=1e-4)
    checkpoint = tmp_path / "model" / "checkpoint-2"
    theirs = tmp_path / "twin" / "checkpoint-2"
    assert {file.name for file in checkpoint.iterdir()} == {file.name for file in theirs.iterdir()} | {RECORD}
    saved, expected = (load_file(str(folder / "model.safetensors")) for folder in (checkpoint, theirs))
    assert list(saved) == list(expected)
    assert {name: tensor.shape for name, tensor in saved.items()} == {n: t.shape for n, t in expected.items()}

    # Resumed in a fresh grafted model it ends where the uninterrupted run did, bit for bit.
    _, resumed, _ = pair(kind, seed=1)
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))
    assert_same_state(resumed.state_dict(), model.state_dict())

    # An untouched model takes its weights, bit for bit, ...
    plain = type(twin).from_pretrained(checkpoint)
    assert_same_tensors(saved, {name: plain.state_dict()[name] for name in saved})
    # ... and goes on from its own checkpoint as a grafted one would from there.
    fresh, grafted, _ = pair(kind, seed=2)
    for each, name in ((fresh, "fresh"), (grafted, "grafted")):
        part = trainer(each, tmp_path / name, max_steps=2, save_strategy="no")
        part._load_from_checkpoint(str(theirs))
        part.train()
    torch.testing.assert_close(dict(grafted.state_dict()), dict(fresh.state_dict()), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("default")
@pytest.mark.transformers
def test_the_trainer_decays_what_groups_by_original_names_say(tmp_path):
    """Left alone it goes by names, and a packed one may have "norm" in it where the original had not."""
    twin, model, graft = pair("qwen3")
    settings = {"max_steps": 2, "save_strategy": "no", "weight_decay": 0.5}
    theirs = trainer(twin, tmp_path, **settings)
    decayed = set(theirs.get_decay_parameter_names(twin))
    named = dict(model.named_parameters())
    groups = [
        {"params": list(dict.fromkeys(named[packed] for name in names for packed in graft.names[name])), **decay}
        for names, decay in ((decayed, {"weight_decay": 0.5}), (set(graft.names) - decayed, {"weight_decay": 0.0}))
    ]
    assert sum(len(group["params"]) for group in groups) == len(named)
    mine = trainer(model, tmp_path, **settings)
    mine.optimizer = torch.optim.AdamW(groups, lr=mine.args.learning_rate, eps=mine.args.adam_epsilon)
    for each in (theirs, mine):
        each.train()
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("default")
@pytest.mark.transformers
def test_the_trainer_s_optimizer_state_does_not_fit_another_kind_of_model_and_says_so(tmp_path):
    twin, model, _ = pair("qwen3")
    trainer(twin, tmp_path / "twin", max_steps=2).train()
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        trainer(model, tmp_path / "model").train(resume_from_checkpoint=str(tmp_path / "twin" / "checkpoint-2"))


@pytest.mark.filterwarnings("default")
@pytest.mark.transformers
def test_the_trainer_loads_its_best_checkpoint(tmp_path):
    _, model, graft = pair("qwen3")
    before = twins.packed_pointers(model)
    options = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "loss",
    }
    run = trainer(model, tmp_path, **options)
    run.train()
    best = load_file(str(Path(run.state.best_model_checkpoint) / "model.safetensors"))
    assert_same_tensors({name: model.state_dict()[name] for name in best}, best)
    assert twins.packed_pointers(model) == before
    assert graft.is_applied
