"""What is begun early, and in what portions; `test_auto_ready.py` has whole loads."""

import pytest
import torch

import tiny
from kernelgraft import ahead
from kernelgraft.ahead import Ahead
from kernelgraft.checkpoint.reader import Reading

pytestmark = pytest.mark.transformers

NBYTES = 40  # of each tensor


@pytest.fixture
def portions(monkeypatch):
    """The names that are handed over together."""
    found = []
    monkeypatch.setattr(ahead, "begin", lambda lazies, _: found.append([NAMES[id(lazy)] for lazy in lazies]))
    return found


TENSORS = {f"{place}.{index}.weight": torch.zeros(10) for place in ("layers", "others") for index in range(5)}
NAMES = {id(tensor): name for name, tensor in TENSORS.items()}


def early(**options):
    return Ahead(tiny.model("qwen3", **options), TENSORS, Reading())


@pytest.mark.parametrize(
    ("at_once", "sizes"),
    [(1, [1] * 10 + [0]), (3 * NBYTES, [3, 3, 3, 1]), (3 * NBYTES + 1, [4, 4, 2]), (1 << 30, [10])],
)
def test_it_hands_over_as_soon_as_there_is_enough_and_what_is_left_at_the_end(portions, monkeypatch, at_once, sizes):
    monkeypatch.setattr(ahead, "AT_ONCE", at_once)
    early().begin_free(())
    assert [len(each) for each in portions] == sizes
    assert [name for each in portions for name in each] == list(TENSORS)


@pytest.mark.parametrize("claimed", ["layers", "layers.1", "others.4", "others.4.weight", "layer"])
def test_what_is_in_a_claimed_module_is_not_free(portions, claimed):
    early().begin_free({claimed})
    assert portions == [[name for name in TENSORS if not f"{name}.".startswith(f"{claimed}.") or name == claimed]]


def test_of_a_claimed_model_nothing_is_free(portions):
    early().begin_free({""})
    assert portions == [[]]


def test_what_will_be_tied_to_another_is_not_begun(portions, monkeypatch):
    monkeypatch.setattr(ahead.compat, "tied_weights", lambda _: {"layers.1.weight": "layers.0.weight"})
    early().begin_free(())
    assert portions == [[name for name in TENSORS if name != "layers.1.weight"]]
