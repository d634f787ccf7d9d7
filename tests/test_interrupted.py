"""Ctrl-C while a load or an update reads: what there was before is there, and nothing else is.

Saving has the same in `test_streamed_saving.py`.
"""

import gc
import itertools
import os
import signal
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file

import kernelgraft
import zoo
from interrupting import interrupt_main_thread
from kernelgraft import graft_of
from kernelgraft.checkpoint import fill, positioned, reader
from kernelgraft.checkpoint.files import Checkpoint
from kernelgraft.checkpoint.waiting import Waiting
from leftovers import assert_nothing_left, mappings
from test_load import FUSED, ON_META, on_meta, saved, tower
from twins import assert_same_tensors, identities, packed_pointers, pair

updating = sys.modules["kernelgraft.update"]


@pytest.fixture
def interrupt(monkeypatch):
    """`interrupt(at)`: Ctrl-C comes at a read of a file, which ends after the main thread has stopped the others.

    With `writes` those are not counted that only show that all can be read.
    """
    told, armed, count = threading.Event(), threading.Event(), itertools.count()
    real_stop, real_read, real_check = Waiting.stop, positioned.preadv, reader.check_readable

    def stop(waiting):
        real_stop(waiting)
        told.set()

    def check(jobs):
        real_check(jobs)
        armed.set()

    def interrupt(at, writes=False):
        if not writes:
            armed.set()

        def preadv(*args):
            if armed.is_set() and next(count) == at:
                interrupt_main_thread()
                assert told.wait(60)
            return real_read(*args)

        monkeypatch.setattr(positioned, "preadv", preadv)

    monkeypatch.setattr(Waiting, "stop", stop)
    for module in (fill, updating):
        monkeypatch.setattr(module, "check_readable", check)
    monkeypatch.setattr(reader, "CHUNK", 64)  # so that there are many
    return interrupt


def interrupted(folder, call):
    """See that a call ends by Ctrl-C, and leaves nothing behind."""
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt):
        call()
    gc.collect()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert mappings(folder) == []
    assert_nothing_left(folder)
    assert gc.isenabled()


def versions(model):
    """How often each tensor was written, of those that a checkpoint has."""
    unsaved = {id(block.scale) for block in getattr(model, "blocks", ()) if hasattr(block, "scale")}
    return [each._version for each in (*model.parameters(), *model.buffers()) if id(each) not in unsaved]


def copied(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_each_is_one_of(found, old, new):
    """Every element of every tensor, old or new."""
    assert list(found) == list(old)
    for name, tensor in found.items():
        assert ((tensor == old[name]) | (tensor == new[name])).all(), name


# --- kernelgraft.load


LOADS = {
    "on meta, fused": (on_meta, FUSED),
    "on meta, cast": (lambda: on_meta().to(torch.float64), None),
    "with values": (lambda: tower(seed=1), None),
    "with values, fused": (lambda: tower(seed=1), FUSED),
}


@pytest.mark.parametrize("at", [0, 5])
@pytest.mark.parametrize(("make", "config"), LOADS.values(), ids=LOADS)
def test_a_load_leaves_the_module_as_it_was(make, config, at, interrupt, tmp_path):
    file, model = saved(tower(), tmp_path), make()
    before, values = (identities(model), packed_pointers(model), versions(model)), copied(model.state_dict())
    interrupt(at)
    interrupted(tmp_path, lambda: kernelgraft.load(model, file, config, **ON_META))
    assert (identities(model), packed_pointers(model), versions(model)) == before
    assert all(now.is_meta or torch.equal(now, values[name]) for name, now in model.state_dict().items())
    assert graft_of(model) is None
    kernelgraft.load(model, file, config, **ON_META)  # as if nothing had been
    assert_same_tensors(model.state_dict(), tower().to(next(model.parameters()).dtype).state_dict())


@pytest.mark.parametrize("config", [None, FUSED], ids=["none", "fused"])
def test_a_load_that_was_writing_leaves_the_modules_own_tensors(config, interrupt, tmp_path):
    file, model = saved(tower(), tmp_path), tower(seed=1)
    before, values, seen = (identities(model), packed_pointers(model)), copied(model.state_dict()), versions(model)
    interrupt(5, writes=True)
    interrupted(tmp_path, lambda: kernelgraft.load(model, file, config, **ON_META))
    assert (identities(model), packed_pointers(model)) == before
    assert graft_of(model) is None
    assert_each_is_one_of(model.state_dict(), values, tower().state_dict())
    assert any(not torch.equal(now, values[name]) for name, now in model.state_dict().items())
    # A backward of what was computed before must not take them for what they were.
    assert all(now > was for now, was in zip(versions(model), seen, strict=True))
    kernelgraft.load(model, file, config, **ON_META)
    assert_same_tensors(model.state_dict(), tower().state_dict())


@pytest.mark.transformers
@pytest.mark.usefixtures("nothing_stays_behind")
@pytest.mark.parametrize("at", [0, 40])
def test_from_pretrained_with_what_is_merged(at, interrupt, tmp_path):
    tiny = pytest.importorskip("tiny")
    tiny.model("qwen3").save_pretrained(tmp_path, max_shard_size="20KB")

    def load():
        return kernelgraft.AutoModelForCausalLM.from_pretrained(tmp_path, kernel_config=tiny.guide_config())

    expected = copied(load().state_dict())  # which are no views of the files
    interrupt(at)
    interrupted(tmp_path, load)
    assert_same_tensors(load().state_dict(), expected)


# --- Graft.update


@pytest.mark.parametrize("at", [0, 5])
def test_an_update_that_was_looking_a_checkpoint_through_has_changed_nothing(at, interrupt, tmp_path):
    twin, model, graft = pair("zoo")
    new = zoo.model(1).state_dict()
    before = packed_pointers(model), versions(model)
    save_file(new, tmp_path / "model.safetensors")
    interrupt(at)
    interrupted(tmp_path, lambda: graft.update(tmp_path))
    assert (packed_pointers(model), versions(model)) == before
    assert_same_tensors(model.state_dict(), twin.state_dict())
    assert graft.update(tmp_path) == []
    assert_same_tensors(model.state_dict(), zoo.model(1).state_dict())


def test_an_update_that_was_writing_goes_through_at_the_second_time(interrupt, tmp_path):
    twin, model, graft = pair("zoo")
    new = zoo.model(1).state_dict()
    before, seen = packed_pointers(model), versions(model)
    save_file(new, tmp_path / "model.safetensors")
    interrupt(5, writes=True)
    interrupted(tmp_path, lambda: graft.update(tmp_path))
    assert packed_pointers(model) == before
    assert graft_of(model) is graft
    assert graft.is_applied
    assert_each_is_one_of(model.state_dict(), twin.state_dict(), new)
    assert any(not torch.equal(now, twin.state_dict()[name]) for name, now in model.state_dict().items())
    assert all(now > was for now, was in zip(versions(model), seen, strict=True))
    assert graft.update(tmp_path) == []
    assert_same_tensors(model.state_dict(), zoo.model(1).state_dict())


def test_an_update_from_an_iterator_has_written_what_had_come(tmp_path):
    twin, model, graft = pair("zoo")
    new = zoo.model(1).state_dict()
    before = packed_pointers(model)

    def until(number):
        yield from itertools.islice(new.items(), number)
        signal.raise_signal(signal.SIGINT)

    interrupted(tmp_path, lambda: graft.update(until(7)))
    assert packed_pointers(model) == before
    twin.load_state_dict(dict(itertools.islice(new.items(), 7)), strict=False)
    assert_same_tensors(model.state_dict(), twin.state_dict())
    assert graft.update(iter(new.items())) == []
    assert_same_tensors(model.state_dict(), zoo.model(1).state_dict())


def test_an_update_from_an_iterator_that_reads(interrupt, tmp_path):
    twin, model, graft = pair("zoo")
    new = zoo.model(1).state_dict()
    before, given = packed_pointers(model), []
    save_file(new, tmp_path / "model.safetensors")

    def stream():
        with Checkpoint.at(tmp_path) as tensors:
            for name, tensor in tensors.items():
                given.append(name)
                yield name, tensor

    interrupt(20)
    interrupted(tmp_path, lambda: graft.update(stream()))
    assert packed_pointers(model) == before
    *written, last = given
    assert written
    assert len(given) < len(new)
    twin.load_state_dict({name: new[name] for name in written}, strict=False)
    found, old = model.state_dict(), twin.state_dict()
    assert_each_is_one_of({last: found[last]}, {last: old[last]}, new)
    assert all(torch.equal(found[name], tensor) for name, tensor in old.items() if name != last)
    assert graft.update(tmp_path) == []
    assert_same_tensors(model.state_dict(), zoo.model(1).state_dict())
