"""`Graft.reference`: every site runs its originals, on the same weights and with gradients."""

import threading

import pytest
import torch

import twins
import zoo
from twins import KINDS, assert_same_state, pair, run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_of_the_untouched_model(kind, training):
    twin, model, graft = pair(kind)
    twin.train(training), model.train(training)
    with graft.reference():
        found, expected = run(kind, model), run(kind, twin)
        found.pow(2).mean().backward(), expected.pow(2).mean().backward()
    assert (graft.calls.kernel, graft.calls.reference) == (0, len(graft.plan.sites))
    graft.remove()
    grads = [{name: p.grad for name, p in each.named_parameters() if p.grad is not None} for each in (model, twin)]
    if kind == "zoo":  # a product with a transposed weight is another routine's, which may round otherwise
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*grads)
        torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()))
    else:
        assert torch.equal(found, expected)
        twins.assert_same_tensors(*grads)
        assert_same_state(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_no_second_copy(kind):
    _, model, graft = pair(kind)
    before = twins.live_bytes()
    with graft.reference(), torch.no_grad():
        run(kind, model)
    assert twins.live_bytes() == before


def test_blocks_nest_and_end_with_an_exception():
    _, model, graft = pair("zoo")

    def ran():
        before = graft.calls.sites["norm"]
        model.norm(torch.ones(1, zoo.H))
        return ["kernel", "reference"][graft.calls.sites["norm"][1] - before[1]]

    with graft.reference():
        with graft.reference():
            assert ran() == "reference"
        assert ran() == "reference"
        with pytest.raises(ZeroDivisionError), graft.reference():
            raise ZeroDivisionError
        assert ran() == "reference"
    assert ran() == "kernel"
    with pytest.raises(ZeroDivisionError), graft.reference():
        raise ZeroDivisionError
    assert ran() == "kernel"


def test_blocks_of_two_threads_that_overlap():
    _, model, graft = pair("zoo")
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    seen = []

    def first():
        with graft.reference():
            first_is_in.set()
            assert second_is_in.wait(10)
        first_is_out.set()

    def second():
        assert first_is_in.wait(10)
        with graft.reference():
            second_is_in.set()
            assert first_is_out.wait(10)
            model.norm(torch.ones(1, zoo.H))
            seen.append(graft.calls.reference)

    threads = [threading.Thread(target=each) for each in (first, second)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert seen == [1]
    model.norm(torch.ones(1, zoo.H))
    assert (graft.calls.kernel, graft.calls.reference) == (1, 1)


def test_a_graft_removed_inside_a_block():
    twin, model, graft = pair("zoo")
    with graft.reference():
        graft.remove()
        assert torch.equal(run("zoo", model), run("zoo", twin))
    with zoo.graft(model) as second:
        run("zoo", model)
        assert second.calls.reference == 0
