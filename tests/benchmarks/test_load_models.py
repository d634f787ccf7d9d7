"""The checkpoints of the benchmark are those that Transformers writes, byte for byte but for the weights."""

import json

import pytest
import torch
from safetensors import safe_open

pytestmark = [pytest.mark.transformers, pytest.mark.usefixtures("benchmarks")]


@pytest.mark.parametrize("kind", ["8b", "dense", "moe"])
def test_names_shards_and_headers_are_those_of_save_pretrained(kind, tmp_path):
    import models
    from transformers import AutoModelForCausalLM

    model = models.SMALL[kind]
    ours = models.write(model, tmp_path, 2)
    loaded = AutoModelForCausalLM.from_pretrained(ours)
    loaded.save_pretrained(tmp_path / "again", max_shard_size=model.shard_bytes)
    files = sorted(file.name for file in (tmp_path / "again").glob("*.safetensors"))
    assert [file.name for file in model.files(tmp_path)] == files
    for name in files:
        assert (ours / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    index = "model.safetensors.index.json"
    if len(files) > 1:
        found, expected = (json.loads((folder / index).read_text()) for folder in (ours, tmp_path / "again"))
        assert found == expected


def test_weights_are_normal_numbers_and_differ(tmp_path):
    import models

    ours = models.write(models.SMALL["dense"], tmp_path, 2)
    with safe_open(ours / "model.safetensors", "pt") as file:
        values = torch.cat([file.get_tensor(name).flatten() for name in models.SMALL["dense"].tensors])
    assert values.abs().min() >= 2.0**-9
    assert values.abs().max() < 2.0**-5
    assert values.unique().numel() > 100


def test_a_checkpoint_that_is_there_is_found_again(tmp_path):
    import models

    model = models.SMALL["tiny"]
    file = models.write(model, tmp_path, 1) / "model.safetensors"
    before = file.stat().st_mtime_ns
    models.write(model, tmp_path, 1)
    assert file.stat().st_mtime_ns == before


def test_the_sizes_of_the_table():
    import models

    assert round(models.LARGE["8b"].nbytes / 1e9, 2) == 16.38
    assert len(models.shards(models.LARGE["8b"])) == 4
    assert len(models.LARGE["many"].tensors) >= 100_000
