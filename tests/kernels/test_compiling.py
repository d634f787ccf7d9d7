"""Operators that a compiler meets for the first time behind many others."""

import pytest
import torch
from drawn import by_inductor
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._inductor import exc, lowering

from kernelgraft.kernels import compiling


def doubled(name):
    """An operator that nobody knows yet."""
    op = torch.library.custom_op(
        f"kernelgraft_test_compiling::{name}", lambda x: 2 * x, mutates_args=(), schema="(Tensor x) -> Tensor"
    )

    @compiling.fake(op)
    def _(x):
        return torch.empty_like(x)

    return op


@pytest.mark.parametrize("writes_out", [pytest.param(each, marks=by_inductor) for each in (True, False)])
def test_one_behind_many_others_is_not_written_out(monkeypatch, writes_out):
    """Where torch would write out all that was before: with 30 residuals, in 2 to the 30 lines."""
    asked = []
    monkeypatch.setattr(exc.OperatorIssue, "operator_str", staticmethod(lambda *_: asked.append(_) or ""))
    monkeypatch.setattr(compiling, "_WRITES_OUT", writes_out)
    early, late = doubled(f"early_{writes_out}"), doubled(f"late_{writes_out}")

    def deep(x):
        for _ in range(30):
            x = early(x) - x
        return late(x)

    x = torch.arange(5.0)
    # What a cache of graphs has is not lowered.
    with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        torch.testing.assert_close(torch.compile(deep, fullgraph=True)(x), 2 * x)
    assert all(each._opoverload in lowering.lowerings for each in (early, late))
    if writes_out:
        assert not asked


def test_functions_are_what_they_were():
    op = doubled("plain")
    assert op(torch.ones(2)).tolist() == [2.0, 2.0]
    torch.library.opcheck(op, (torch.ones(2),))
