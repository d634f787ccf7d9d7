"""`Graft.update` from checkpoints: a place, or lazy tensors, read straight into the packed parameters."""

import errno

import pytest
import torch

import twins
import zoo
from allocations import Allocations
from kernelgraft.checkpoint import positioned, reader
from kernelgraft.checkpoint.files import Checkpoint
from kernelgraft.errors import CheckpointError, GraftError
from leftovers import open_files
from test_update import FLOATS, saved
from twins import assert_same_state, packed_pointers, pair


@pytest.mark.parametrize("form", ["file", "text", "folder", "mapping", "stream"])
def test_a_checkpoint(form, tmp_path):
    _, model, graft = pair("zoo")
    new = zoo.model(1).state_dict()
    file = saved(new, tmp_path)
    before = packed_pointers(model)

    def stream():
        with Checkpoint([file]) as tensors:
            yield from tensors.items()

    with Checkpoint([file]) as tensors, Allocations() as allocated:
        places = {"file": file, "text": str(file), "folder": file.parent, "mapping": tensors, "stream": stream()}
        assert graft.update(places[form]) == []
    assert allocated.found == {}
    assert_same_state(model.state_dict(), new)
    assert packed_pointers(model) == before


@pytest.mark.parametrize("at", [1, 3, 9])
def test_a_disk_that_fails_changes_nothing(at, tmp_path, monkeypatch):
    twin, model, graft = pair("zoo")
    file = saved(zoo.model(1).state_dict(), tmp_path)
    before, real, calls = packed_pointers(model), positioned.preadv, []

    def preadv(*args):
        calls.append(args)
        if len(calls) >= at:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)

    monkeypatch.setattr(reader, "CHUNK", 64)  # so that there are many
    monkeypatch.setattr(positioned, "preadv", preadv)
    with pytest.raises(CheckpointError, match="cannot be read at byte"):
        graft.update(file)
    assert len(calls) >= at
    assert_same_state(model.state_dict(), twin.state_dict())
    assert packed_pointers(model) == before
    assert open_files(tmp_path) == []


@pytest.mark.transformers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_that_transformers_has_saved(dtype, tmp_path):
    twin, model, graft = pair("qwen3")
    new = twins.untouched("qwen3", seed=1).to(dtype)
    new.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert graft.update(tmp_path) == []
    twin.load_state_dict(new.state_dict())
    assert_same_state(model.state_dict(), twin.state_dict())


def test_part_of_a_checkpoint_in_other_dtypes(tmp_path):
    twin, model, graft = pair("zoo")
    new = zoo.model(1).state_dict()
    names = [name for name, tensor in new.items() if tensor.is_floating_point()][::2]
    some = {name: new[name].to(FLOATS[index % 4]) for index, name in enumerate(names)}
    left = graft.update(saved(some, tmp_path))
    assert left == [name for name, _ in twin.named_parameters() if name not in some]
    twin.load_state_dict(some, strict=False)
    assert_same_state(model.state_dict(), twin.state_dict())


def test_tensors_of_files_beside_others(tmp_path):
    _, model, graft = pair("zoo")
    new = zoo.model(1).state_dict()
    with Checkpoint([saved(new, tmp_path)]) as tensors:
        given = {name: tensors[name] if index % 3 else new[name] for index, name in enumerate(new)}
        assert graft.update(given) == []
    assert_same_state(model.state_dict(), new)


@pytest.mark.transformers
@pytest.mark.parametrize("lazy", [(0, 1), (0,), (1,), ()])
@pytest.mark.parametrize("streamed", [False, True])
def test_of_two_names_of_a_tied_parameter_the_last_one_counts(lazy, streamed, tmp_path):
    _, model, graft = pair("qwen3-tied")
    names = ("model.embed_tokens.weight", "lm_head.weight")
    new = {name: torch.randn_like(model.lm_head.weight) for name in names}
    with Checkpoint([saved(new, tmp_path)]) as tensors:
        given = {name: tensors[name] if index in lazy else new[name] for index, name in enumerate(names)}
        left = graft.update(iter(given.items()) if streamed else given)
    assert not {*names} & {*left}
    assert torch.equal(model.lm_head.weight, new["lm_head.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["mix.k.weight", "norm.weight", "wide.both.weight", "twist.a.weight", "head.weight"])
def test_autograd_notices_what_a_file_brings(name, tmp_path):
    twin, model, graft = pair("zoo")
    file = saved({name: twin.state_dict()[name]}, tmp_path)
    loss = model(zoo.inputs()).square().sum()
    graft.update(file)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"mix.qkv.weight": torch.ones(3 * zoo.H, zoo.H)}, "'mix.qkv.weight' is no parameter"),
        ({"norm.weight": torch.ones(3)}, r"norm\.weight has shape \[8\], and the update brings \[3\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(wrong, said, tmp_path):
    twin, model, graft = pair("zoo")
    with pytest.raises(GraftError, match=said):
        graft.update(saved(zoo.model(1).state_dict() | wrong, tmp_path))
    assert_same_state(model.state_dict(), twin.state_dict())


def test_a_file_that_another_one_has_replaced(tmp_path):
    twin, model, graft = pair("zoo")
    file = saved(zoo.model(1).state_dict(), tmp_path)
    with Checkpoint([file]) as tensors:
        file.unlink()
        saved(zoo.model(2).state_dict(), tmp_path)
        with pytest.raises(CheckpointError, match="was replaced or written to"):
            graft.update(tensors)
    assert_same_state(model.state_dict(), twin.state_dict())


def test_a_place_where_there_is_nothing(tmp_path):
    _, _, graft = pair("zoo")
    with pytest.raises(CheckpointError, match="no safetensors checkpoint"):
        graft.update(tmp_path)
