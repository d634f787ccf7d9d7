"""Saved checkpoints of tiny models, made once for a run, and the proof that nothing stays behind in Transformers."""

import os
import signal

import pytest
import torch

# Without a GPU the Triton kernels run in its interpreter, which is asked for before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell that starts the tests in the background has them ignore Ctrl-C, and several send it to themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def without_waiting(monkeypatch):
    """Nothing waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint("qwen3")` is the folder of a saved tiny model of that kind; made at the first call."""
    tiny = pytest.importorskip("tiny")
    folders = {}

    def folder_of(kind, **changes):
        key = (kind, *sorted(changes.items()))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(kind)
            tiny.model(kind, **changes).save_pretrained(folders[key])
        return folders[key]

    return folder_of


@pytest.fixture(scope="session")
def qwen3_folder(checkpoint):
    return checkpoint("qwen3")


@pytest.fixture(scope="session")
def plain(checkpoint):
    """A model that Transformers alone has loaded from `qwen3_folder`, after all that tests do with such a model.

    What Transformers notes down at a first load, a first save or a first training step is there from then on, and in
    `kernels` the repository that it has loaded.
    """
    from kernels import get_local_kernel
    from transformers import AutoModelForCausalLM

    import tiny

    get_local_kernel(tiny.EXAMPLE)
    for kind in ("cohere", "qwen3_moe", "qwen3"):
        model = AutoModelForCausalLM.from_pretrained(checkpoint(kind))
        tiny.generate(model)
        tiny.switch_checkpointing(model, True)
        tiny.gradients(model.train())
        loaded = AutoModelForCausalLM.from_pretrained(checkpoint(kind), device_map="cpu")
    return loaded


def _as_before(plain, qwen3_folder):
    """Afterwards every attribute of every `transformers` module, and a plain load, are as they were before."""
    from transformers import AutoModelForCausalLM

    import tiny
    from transformers_state import Snapshot

    before = Snapshot()
    yield
    assert before.changes() == []
    again = AutoModelForCausalLM.from_pretrained(qwen3_folder)
    assert [type(module) for module in again.modules()] == [type(module) for module in plain.modules()]
    assert [vars(module).keys() for module in again.modules()] == [vars(module).keys() for module in plain.modules()]
    assert torch.equal(tiny.logits(again), tiny.logits(plain))


nothing_stays_behind = pytest.fixture(name="nothing_stays_behind")(_as_before)
nothing_stays_behind_in_the_end = pytest.fixture(scope="module", name="nothing_stays_behind_in_the_end")(_as_before)
