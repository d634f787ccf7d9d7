"""Random re-layouts for the property tests: each is a function on tensors, drawn step by step."""

import math

import torch
from hypothesis import strategies as st

from kernelgraft.conversion import LazyTensor, TensorSource


def sources(draw, count=None):
    """Tensors of distinct values, by name, and the lazy tensors of them."""
    count = draw(st.integers(1, 4)) if count is None else count
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    same = draw(st.booleans())
    tensors, first = {}, 0
    for i in range(count):
        its = list(shape)
        if not same:
            its[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(1, 4))
        numel = math.prod(its)
        tensors[f"s{i}"] = torch.arange(first, first + numel, dtype=torch.float32).reshape(its)
        first += numel
    return tensors, {name: LazyTensor.of(TensorSource(name, tensor)) for name, tensor in tensors.items()}


def step(draw, tensors):
    """One random operation on a list of tensors, as a function of such a list; all of it only moves bytes."""
    kind = draw(st.sampled_from(["merge", "split", "transpose", "reshape", "permute", "squeeze", "rotate"]))
    which = draw(st.integers(0, len(tensors) - 1))
    one = tensors[which]
    if kind == "merge" and len(tensors) > 1:
        return _merge(draw, tensors)
    if kind == "split" and one.ndim:
        dim = draw(st.integers(0, one.ndim - 1))
        cut = draw(st.integers(1, max(1, one.shape[dim] - 1)))
        return lambda ts: ts[:which] + list(ts[which].split(cut, dim)) + ts[which + 1 :]
    if kind == "transpose" and one.ndim > 1:
        a, b = draw(st.integers(0, one.ndim - 1)), draw(st.integers(-one.ndim, -1))
        return _on(which, lambda t: t.transpose(a, b))
    if kind == "permute" and one.ndim > 1:
        order = draw(st.permutations(range(one.ndim)))
        return _on(which, lambda t: t.permute(order).contiguous())
    if kind == "reshape":
        shape = _factors(draw, one.numel())
        return _on(which, lambda t: t.reshape(shape))
    if kind == "squeeze":
        return _on(which, lambda t: t.squeeze().unsqueeze(0))
    return lambda ts: ts[1:] + ts[:1]


def _on(which, function):
    return lambda ts: [*ts[:which], function(ts[which]), *ts[which + 1 :]]


def _merge(draw, tensors):
    shapes = {tuple(t.shape) for t in tensors}
    if len(shapes) == 1 and draw(st.booleans()):
        dim = draw(st.integers(0, tensors[0].ndim))
        if draw(st.booleans()) and dim:
            return lambda ts: [torch.stack(ts, dim).flatten(dim - 1, dim)]
        return lambda ts: [torch.stack(ts, dim)]
    if len({t.ndim for t in tensors}) == 1 and tensors[0].ndim:
        for dim in range(tensors[0].ndim):
            if len({tuple(t.shape[:dim]) + tuple(t.shape[dim + 1 :]) for t in tensors}) == 1:
                return lambda ts: [torch.cat(ts, dim)]
    return lambda ts: [torch.cat([t.reshape(-1) for t in ts])]


def _factors(draw, numel):
    shape = []
    while numel > 1 and len(shape) < 3:
        divisors = [d for d in range(1, numel + 1) if numel % d == 0]
        shape.append(draw(st.sampled_from(divisors)))
        numel //= shape[-1]
    return [*shape, numel]


def layout(draw, start, max_steps=6):
    """A random re-layout of a list of tensors: the results, and the function that made them."""
    steps, tensors = [], start
    for _ in range(draw(st.integers(0, max_steps))):
        steps.append(step(draw, tensors))
        tensors = steps[-1](tensors)

    def run(given):
        for one in steps:
            given = one(given)
        return given

    return run
