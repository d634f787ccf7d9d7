"""For any re-layout: lazy equals eager bit for bit, the way back is exact, parts read and write what they should."""

import json
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft.conversion import LazyTensor, Program, eager_steps
from relayouts import layout, sources

EXAMPLES = settings(max_examples=150, deadline=None)


@st.composite
def cases(draw):
    tensors, lazies = sources(draw)
    run = layout(draw, list(tensors.values()))
    eager = {f"t{i}": t.contiguous() for i, t in enumerate(run(list(tensors.values())))}
    lazy = {f"t{i}": t for i, t in enumerate(run(list(lazies.values())))}
    return tensors, lazies, eager, lazy, run


@EXAMPLES
@given(cases())
def test_lazy_equals_eager_without_reading(case):
    _, lazies, eager, _, run = case
    with eager_steps() as steps:
        results = run(list(lazies.values()))
    assert steps.total == 0
    for name, result in zip(eager, results, strict=True):
        assert isinstance(result, LazyTensor)
        assert result.shape == eager[name].shape
        assert torch.equal(result.materialize(), eager[name])
        assert torch.equal(result.materialize(out=torch.empty(result.shape)), eager[name])


@EXAMPLES
@given(cases(), st.data())
def test_a_narrowed_read_is_the_narrowed_whole(case, data):
    _, _, eager, lazy, _ = case
    name = data.draw(st.sampled_from(sorted(eager)))
    whole, part = eager[name], lazy[name]
    for dim in range(whole.ndim):
        start = data.draw(st.integers(0, whole.shape[dim]))
        stop = data.draw(st.integers(start, whole.shape[dim]))
        step = data.draw(st.integers(1, 3))
        index = (slice(None),) * dim + (slice(start, stop, step),)
        whole, part = whole[index], part[index]
    assert torch.equal(part.materialize(copy=True), whole)
    assert sum(math.prod(view.shape) for view, _ in part.pieces()) == whole.numel()


@EXAMPLES
@given(cases(), st.data())
def test_programs_fill_any_tensor_and_invert(case, data):
    tensors, lazies, eager, lazy, _ = case
    program = Program.trace(lazy, lazies)
    program.check_filled()
    assert Program.from_json(json.loads(json.dumps(program.to_json()))) == program
    odd = data.draw(st.booleans())
    filled = {name: _empty(t, odd) for name, t in eager.items()}
    for name, out in filled.items():
        program.fill(name, out, lambda source: _strided(tensors[source], odd))
        assert torch.equal(out, eager[name])
        assert program.describe(name)
    assert program.irreversible == ()
    back = program.inverse()
    back.check_filled()
    for name, tensor in tensors.items():
        out = torch.empty_like(tensor)
        back.fill(name, out, filled.__getitem__)
        assert torch.equal(out, tensor)
    again = back.inverse()
    for name, tensor in eager.items():
        out = torch.empty_like(tensor)
        again.fill(name, out, tensors.__getitem__)
        assert torch.equal(out, tensor)


@EXAMPLES
@given(cases(), st.data())
def test_parts_read_write_and_carry_gradients(case, data):
    tensors, lazies, eager, lazy, run = case
    program = Program.trace(lazy, lazies)
    packed = {name: t.clone().requires_grad_() for name, t in eager.items()}
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    weights = {name: torch.rand_like(t) for name, t in tensors.items()}
    parts = {name: program.part(name) for name in tensors}
    read = {name: part.read(packed.__getitem__) for name, part in parts.items()}
    for name, tensor in tensors.items():
        part = parts[name]
        assert torch.equal(read[name], tensor)
        assert not any(step[0] == "as_strided" for reading in part.readings for step in reading.place)
        if part.kind in ("whole", "view"):
            assert read[name].untyped_storage().data_ptr() == packed[part.packed[0]].untyped_storage().data_ptr()
        assert part.describe()
    # The gradient of a packed tensor is the packed gradient of the originals.
    sum((read[name] * weights[name]).sum() for name in tensors).backward()
    sum((leaves[name] * weights[name]).sum() for name in tensors).backward()
    for name, gradient in zip(eager, run([leaf.grad for leaf in leaves.values()]), strict=True):
        assert torch.equal(packed[name].grad, gradient)
    news = {name: torch.rand_like(t) for name, t in tensors.items()}
    for name, part in parts.items():
        part.write(packed.__getitem__, news[name])
    for name, new in zip(eager, run(list(news.values())), strict=True):
        assert torch.equal(packed[name], new)


def _empty(like, odd):
    """A tensor of the same shape; an odd one is transposed and has gaps."""
    if not odd:
        return torch.empty_like(like)
    return torch.empty([*reversed(like.shape), 2])[..., 0].permute(*reversed(range(like.ndim)))


def _strided(tensor, odd):
    out = _empty(tensor, odd)
    out.copy_(tensor)
    return out
