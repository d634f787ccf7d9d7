"""Logits that are computed when read: whatever is done with them, they are what the plain ones are."""

import copy
import io
import pickle
import weakref

import numpy as np
import pytest
import torch
from drawn import DEVICE, tensor
from test_cross_entropy import targets
from torch.nn import functional as F

from kernelgraft.kernels import cross_entropy_rows, lazy_logits
from kernelgraft.kernels.lazy_logits import LazyLogits
from kernelgraft.kernels.linear_cross_entropy import LinearCrossEntropy

H, V = 8, 40


def head(dtype=torch.float32, bias=True):
    made = LinearCrossEntropy()
    made.weight = torch.nn.Parameter(tensor(V, H, dtype=dtype, seed=1))
    made.bias = torch.nn.Parameter(tensor(V, dtype=dtype, seed=2)) if bias else None
    return made


def both(dtype=torch.float32, learns=True):
    """Lazy logits and plain ones of the same operands, and the operands."""
    made, hidden = head(dtype), tensor(5, 20, H, dtype=dtype).requires_grad_(learns)
    made.requires_grad_(learns)
    lazy = made(hidden)
    assert type(lazy) is LazyLogits
    return lazy, F.linear(hidden, made.weight, made.bias), [hidden, made.weight, made.bias]


def is_read(lazy):
    return lazy._source.value is not None


def logits_of(value):
    return torch.ops.aten.alias(value) if isinstance(value, LazyLogits) else value


def test_it_knows_what_it_is():
    lazy, plain, _ = both()
    for name in ("shape", "dtype", "device", "requires_grad", "is_leaf", "ndim", "layout", "is_cuda", "nbytes"):
        assert getattr(lazy, name) == getattr(plain, name)
    for name in ("size", "stride", "numel", "dim", "is_contiguous", "storage_offset", "is_floating_point"):
        assert getattr(lazy, name)() == getattr(plain, name)()
    assert len(lazy) == 5
    assert isinstance(lazy, torch.Tensor)
    assert lazy.grad_fn is not None
    assert lazy.to(lazy.device) is lazy.to(torch.float32) is lazy.float() is lazy.contiguous() is lazy
    assert not is_read(lazy)
    assert both(learns=False)[0].grad_fn is None


READS = {
    "argmax": lambda x: x.argmax(-1),
    "added to": lambda x: x + 1,
    "in a sum": lambda x: x.sum(),
    "of one row": lambda x: x[0],
    "a slice and a row": lambda x: x[0, 1:3],
    "some classes": lambda x: x[..., :5],
    "the last token": lambda x: x[:, -1, :],
    "masked": lambda x: x[torch.arange(100, device=DEVICE).view(5, 20) % 3 == 0],
    "every other row": lambda x: x[:, ::2],
    "reversed slices": lambda x: x[1:][:, :-2][..., 3:, :],
    "detached": lambda x: x.detach(),
    "its data": lambda x: x.data,
    "joined": lambda x: torch.cat([x, x]),
    "stacked": lambda x: torch.stack([x, x * 2]),
    "an array": lambda x: x.numpy(force=True),
    "a list": lambda x: x.tolist(),
    "transposed": lambda x: x.transpose(1, 2),
    "mT": lambda x: x.mT,
    "another dtype": lambda x: x.double(),
    "half": lambda x: x.half(),
    "a copy": lambda x: x.clone(),
    "softmax": lambda x: F.softmax(x, dim=-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "viewed": lambda x: x.view(-1, V),
    "viewed otherwise": lambda x: x.view(5, -1),
    "viewed as more": lambda x: x.reshape(5, 4, 5, V),
    "viewed as bits": lambda x: x.detach().view(torch.int32),
    "flat": lambda x: x.flatten(),
    "sliced and flat": lambda x: x[:, :-1].reshape(-1, V),
    "scaled and capped": lambda x: torch.tanh(x.float() * 0.5 / 30) * 30,
    "divided by a tensor": lambda x: x / torch.tensor(3.0),
    "divided by nothing": lambda x: x / 0,
    "scaled by itself": lambda x: 2 * x * x,
    "unsqueezed": lambda x: x.unsqueeze(0),
    "chunks": lambda x: x.chunk(2)[1],
    "rows": lambda x: list(x)[3],
    "compared": lambda x: x > 0,
    "topk": lambda x: x.topk(3, dim=-1).values,
    "gathered": lambda x: x.gather(-1, torch.zeros(5, 20, 1, dtype=torch.int64, device=DEVICE)),
    "like it": lambda x: torch.zeros_like(x),
    "printed": lambda x: repr(x.detach()),
    "formatted": lambda x: f"{x.sum().item():.3f}",
    "saved": lambda x: through(torch.save, torch.load, x),
    "pickled": lambda x: pickle.loads(pickle.dumps(x)),
    "deep copied": lambda x: copy.deepcopy(x.detach()),
    "copied": lambda x: copy.copy(x.detach()),
    "as an array": lambda x: np.asarray(x.detach().cpu()),
    "in float64 elsewhere": lambda x: x.to("cpu", torch.float64),
    "typed": lambda x: x.type_as(torch.zeros(1, dtype=torch.float64)),
    "through dlpack": lambda x: torch.from_dlpack(x.detach()),
    "a product": lambda x: torch.einsum("btv,btw->vw", x, x),
    "a mapped gradient": lambda x: torch.vmap(lambda row: row.sum(-1))(x),
    "the classes second": lambda x: F.cross_entropy(x.transpose(1, 2), targets((5, 20), V), reduction="none"),
    "with probabilities": lambda x: F.cross_entropy(x.view(-1, V), torch.full((100, V), 1 / V, device=DEVICE)),
    "nll": lambda x: F.nll_loss(x.view(-1, V).log_softmax(-1), targets((100,), V)),
}


def through(save, load, value):
    buffer = io.BytesIO()
    save(value, buffer)
    buffer.seek(0)
    return load(buffer)


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("learns", [False, True])
def test_read_by(name, learns):
    lazy, plain, operands = both(learns=learns)
    found, wanted = logits_of(READS[name](lazy)), READS[name](plain)
    if not isinstance(wanted, torch.Tensor):
        np.testing.assert_array_equal(found, wanted)
        return
    assert (found.dtype, found.shape, found.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
    assert found.requires_grad == wanted.requires_grad
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    if wanted.grad_fn is not None and name != "divided by nothing":
        upstream = tensor(*wanted.shape, seed=3).to(wanted)
        for one, other in zip(
            *(torch.autograd.grad(each, operands, upstream) for each in (found, wanted)), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


WRITES = {
    "in place": lambda x: x.mul_(2),
    "by an operator": lambda x: x.__iadd__(1),
    "a row": lambda x: x.__setitem__(0, 0),
    "some classes": lambda x: x.__setitem__((..., slice(0, 3)), -float("inf")),
    "a row that was taken before": lambda x: x[1].zero_(),
    "a view": lambda x: x.view(-1, V).mul_(3),
    "a slice of a view": lambda x: x.view(-1, V)[3:7].zero_(),
    "masked": lambda x: x.masked_fill_(torch.arange(V, device=DEVICE) > 30, -1e4),
    "copied into": lambda x: x.copy_(torch.ones(V)),
    "its data": lambda x: x.data.add_(1),
    "as an output": lambda x: None if x.requires_grad else torch.add(torch.ones(5, 20, V, device=DEVICE), 1, out=x),
    "clamped": lambda x: x.clamp_(min=0),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("learns", [False, True])
def test_written_by(name, learns):
    """What is written is there for all who look afterwards, through whatever they hold, and for the gradient."""
    found = [seen_after(both(learns=learns)[which], WRITES[name]) for which in (0, 1)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    lazy, _, _ = both(learns=learns)
    out = WRITES[name](lazy)
    assert out is None or out is lazy or not name.startswith(("in place", "by an", "masked", "copied", "clamped"))


def seen_after(logits, write):
    before, view, later = logits.float() * 1.0, logits.view(-1, V), logits[:, :-1]
    write(logits)
    seen = [before, view, later, logits, F.cross_entropy(view, targets((100,), V))]
    seen = [logits_of(each) for each in seen]
    if logits.requires_grad:
        total = sum(each.clamp(-5, 5).pow(2).sum() for each in seen)
        seen.append(torch.autograd.grad(total, leaves_of(total))[0])
    return [each.detach() for each in seen]


def leaves_of(tensor):
    """The hidden states that `tensor` comes from."""
    found, open_nodes = [], [tensor.grad_fn]
    seen = set()
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and node.variable.shape == (5, 20, H):
            found.append(node.variable)
        open_nodes += [each for each, _ in node.next_functions]
    return found


LOSSES = {
    "flat": lambda x, t: F.cross_entropy(x.view(-1, V), t.view(-1)),
    "as Transformers does": lambda x, t: F.cross_entropy(x.float().view(-1, V), t.view(-1), reduction="sum") / 17,
    "shifted": lambda x, t: F.cross_entropy(x[..., :-1, :].contiguous().view(-1, V), t[..., 1:].reshape(-1)),
    "shifted and reshaped": lambda x, t: F.cross_entropy(x[:, 1:].reshape(-1, V), t[:, :-1].flatten()),
    "as a module": lambda x, t: torch.nn.CrossEntropyLoss(label_smoothing=0.1)(x.flatten(0, 1), t.flatten()),
    "each": lambda x, t: F.cross_entropy(x.view(-1, V), t.view(-1), reduction="none").square().sum(),
    "weighed": lambda x, t: F.cross_entropy(
        x.float().view(-1, V), t.view(-1), weight=torch.linspace(0, 1, V, device=DEVICE)
    ),
    "scaled": lambda x, t: F.cross_entropy((x * 0.25).view(-1, V), t.view(-1)),
    "divided": lambda x, t: F.cross_entropy((x / 8).float().view(-1, V), t.view(-1)),
    "capped": lambda x, t: F.cross_entropy((torch.tanh(x / 5.0) * 5.0).view(-1, V), t.view(-1)),
    "all at once": lambda x, t: F.cross_entropy(
        ((x.float() * 0.5 / 5).tanh() * 5).view(-1, V)[3:90],
        t.view(-1)[3:90].clamp(2),
        ignore_index=2,
        label_smoothing=0.3,
    ),
    "of some rows": lambda x, t: F.cross_entropy(x[1:3].float()[:, 4:].reshape(-1, V), t[1:3, 4:].reshape(-1)),
    "two": lambda x, t: F.cross_entropy(x.view(-1, V), t.view(-1)) + F.cross_entropy(x[0], t[0]),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses(name, dtype):
    lazy, plain, operands = both(dtype)
    target = targets((5, 20), V)
    if name == "weighed" and dtype != torch.float32:
        plain = plain.float()
    loss, wanted = LOSSES[name](lazy, target), LOSSES[name](plain, target)
    assert is_read(lazy) == (name == "two")
    assert loss.dtype == wanted.dtype
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(loss, wanted, **close)
    found, exact = (torch.autograd.grad(each, operands, retain_graph=True) for each in (loss, wanted))
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **{**close, "atol": close["atol"] * other.abs().max().item()})
    torch.testing.assert_close(logits_of(lazy), plain.to(dtype), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(LOSSES[name](both(dtype)[0], target), wanted, **close)


NOT_FOLLOWED = {
    "scaled twice": lambda x: x * 2 * 3,
    "capped by another": lambda x: torch.tanh(x / 5) * 4,
    "capped by less than nothing": lambda x: torch.tanh(x / -5) * -5,
    "rounded between": lambda x: torch.tanh((x * 2).float() / 5) * 5,
    "tanh alone": lambda x: torch.tanh(x),
    "shifted by a number": lambda x: x + 1,
    "scaled by what learns": lambda x: x * torch.nn.Parameter(torch.tensor(2.0)),
    "no classes of the vocabulary": lambda x: x[..., :30],
}


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_losses_of_the_logits(name):
    for dtype in (torch.float32, torch.bfloat16):
        lazy, plain, operands = both(dtype)
        target = targets((100,), 30)
        loss, wanted = (
            F.cross_entropy((made := NOT_FOLLOWED[name](each)).reshape(-1, made.shape[-1]), target)
            for each in (lazy, plain)
        )
        assert torch.equal(loss, wanted)
        for one, other in zip(*(torch.autograd.grad(each, operands) for each in (loss, wanted)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_arguments_that_torch_refuses_are_refused():
    for change in ({"reduction": "max"}, {"label_smoothing": 2.0}, {"weight": torch.ones(V - 1, device=DEVICE)}):
        lazy, _, _ = both()
        with pytest.raises((ValueError, RuntimeError)):
            F.cross_entropy(lazy.view(-1, V), targets((100,), V), **change)
    with pytest.raises(ValueError, match="batch_size"):
        F.cross_entropy(both()[0].view(-1, V), targets((99,), V))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        both()[0][:, :-1].view(-1, V)
    # On a GPU torch would not raise, and the process would be lost.
    on_cpu = head().cpu()(tensor(5, 20, H).cpu())
    assert type(on_cpu) is LazyLogits
    with pytest.raises(IndexError, match="out of bounds"):
        F.cross_entropy(on_cpu.view(-1, V), targets((100,), V).cpu() + V)


def test_changed_weights_are_told():
    for change in ("step", "hidden", "data", "storage"):
        made, hidden = head(), tensor(5, 20, H).requires_grad_()
        states = hidden * 1
        lazy, read = made(states), made(states)
        kept = read.detach().clone()
        loss = F.cross_entropy(lazy.view(-1, V), targets((100,), V))
        loss.backward()
        if change == "step":
            torch.optim.AdamW(made.parameters()).step()
        elif change == "hidden":
            with torch.no_grad():
                states.zero_()
        elif change == "data":
            made.weight.data = made.weight.data.clone()
        else:
            made.weight.untyped_storage().resize_(0)
        for use in (
            lambda x: x.sum(),
            lambda x: x.argmax(-1),
            lambda x: F.cross_entropy(x.view(-1, V), targets((100,), V)),
        ):
            with pytest.raises(RuntimeError, match="has changed since: by a step of the optimizer"):
                use(lazy)
        assert torch.equal(read.detach(), kept)  # what was read before stays


def test_who_waits_for_the_logits_own_gradient_gets_it():
    for wait in ("retain_grad", "register_hook"):
        found = []
        for logits in both()[:2]:
            flat = logits.float().view(-1, V) * 2
            if wait == "retain_grad":
                logits.retain_grad()
            else:
                logits.register_hook(found.append)
            F.cross_entropy(flat, targets((100,), V)).backward()
            if wait == "retain_grad":
                found.append(logits.grad)
        torch.testing.assert_close(*found)
    lazy, _, _ = both(learns=False)
    lazy.requires_grad_()
    F.cross_entropy(lazy.view(-1, V), targets((100,), V)).backward()
    assert lazy.grad.shape == lazy.shape
    assert lazy.grad.abs().sum() > 0


def test_who_comes_too_late_for_it_is_told():
    lazy, _, _ = both()
    loss = F.cross_entropy(lazy.view(-1, V), targets((100,), V))
    with pytest.raises(RuntimeError, match="Call retain_grad before the loss is computed"):
        lazy.retain_grad()
    with pytest.warns(UserWarning, match="Call register_hook before the loss is computed"):
        lazy.register_hook(lambda grad: None)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(loss, lazy)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_what_goes_by_python_is_right_too():
    lazy, plain, operands = both()
    found, wanted = (
        torch.autograd.grad(Square.apply(each).sum(), operands, retain_graph=True) for each in (lazy, plain)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    lazy, plain, operands = both()
    torch.autograd.backward([lazy], [torch.ones_like(plain)])
    torch.testing.assert_close(operands[0].grad, torch.autograd.grad(plain.sum(), operands[0])[0])


def test_a_second_derivative_of_the_logits():
    found = []
    for which in (0, 1):
        *logits, operands = both()
        (first,) = torch.autograd.grad(logits[which].pow(3).sum(), operands[0], create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), operands))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-1)


def test_modes_of_autograd():
    made, hidden, target = head(), tensor(5, 20, H), targets((100,), V)
    wanted = F.linear(hidden, made.weight, made.bias)
    with torch.inference_mode():
        lazy = made(hidden * 1)
        loss = F.cross_entropy(lazy.view(-1, V), target)
    assert type(lazy) is LazyLogits
    torch.testing.assert_close(loss, F.cross_entropy(wanted.view(-1, V), target))
    torch.testing.assert_close(lazy.clone(), wanted, check_device=False)
    lazy = made(hidden)
    with torch.inference_mode():
        lazy.argmax(-1)
    lazy.sum().backward()  # was first read in inference mode, and belongs to training
    assert made.weight.grad is not None
    lazy = made(hidden)
    with torch.no_grad():
        flat = lazy.view(-1, V) * 2
    assert not F.cross_entropy(flat, target).requires_grad
    assert F.cross_entropy(lazy.view(-1, V), target).requires_grad


@pytest.mark.parametrize("outside", [False, True])
def test_under_autocast(outside):
    """The logits and the loss are what autocast makes of them, whoever reads them where."""
    made, hidden, target = head(), tensor(5, 20, H).requires_grad_(), targets((100,), V)
    results = []
    for run in (made, lambda x: F.linear(x, made.weight, made.bias)):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            logits = run(hidden)
            if not outside:
                loss = F.cross_entropy(logits.view(-1, V), target)
        if outside:
            loss = F.cross_entropy(logits.float().view(-1, V), target)
        grads = torch.autograd.grad(loss, [hidden, made.weight, made.bias])
        results.append([loss, logits_of(logits), *grads])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)
    assert results[0][1].dtype == torch.bfloat16


def test_plain_logits_where_they_cannot_wait():
    made = head()
    assert type(made(tensor(64, H))) is torch.Tensor  # few rows
    assert type(made(tensor(65, H))) is LazyLogits
    assert type(torch.vmap(made)(tensor(3, 65, H))) is torch.Tensor
    assert made.to("meta")(torch.empty(65, H, device="meta")).device.type == "meta"
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        assert type(head()(torch.empty(65, H, device=DEVICE))) is not LazyLogits
    traced = torch.fx.experimental.proxy_tensor.make_fx(head())(tensor(65, H))
    assert "addmm" in traced.code
    with pytest.raises(RuntimeError, match="dtype"):
        head()(tensor(65, H).double())


def test_compiled_it_is_the_linear_layer():
    made, hidden, target = head(), tensor(5, 20, H).requires_grad_(), targets((100,), V)

    def loss_of(hidden):
        logits = made(hidden)
        return F.cross_entropy(logits.float().view(-1, V), target), logits

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    (loss, logits), (wanted, lazy) = compiled(hidden), loss_of(hidden)
    assert type(logits) is torch.Tensor
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(each, hidden)[0] for each in (loss, wanted)))
    assert type(lazy) is LazyLogits


def test_lazy_logits_into_compiled_code():
    lazy, plain, operands = both()
    compiled = torch.compile(lambda x: (x.float() * 2).sum(), backend="aot_eager")
    found, wanted = compiled(lazy), (plain * 2).sum()
    torch.testing.assert_close(found, wanted)
    for one, other in zip(*(torch.autograd.grad(each, operands) for each in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_is_kept_longer_than_the_logits():
    lazy, _, _ = both()
    loss = F.cross_entropy(lazy.view(-1, V), targets((100,), V))
    seen, source = lazy.detach(), weakref.ref(lazy._source)
    del lazy
    loss.backward()
    assert source() is None
    assert seen.shape == (5, 20, V)


def test_formulas():
    formula, to = lazy_logits.formula_of, ("to", torch.float32)
    assert formula(()) == cross_entropy_rows.Formula()
    assert formula((to,)) == cross_entropy_rows.Formula(rounds=False)
    assert formula((("mul", 2), to)) == cross_entropy_rows.Formula(scale=2.0)
    capped = (("div", 2.0), ("div", 30), ("tanh",), ("mul", 30))
    assert formula(capped) == cross_entropy_rows.Formula(scale=2.0, divides=True, softcap=30.0)
    assert formula((to, *capped[1:])) == cross_entropy_rows.Formula(softcap=30.0, rounds=False)
    for steps in ((("tanh",),), (("mul", 2), to, ("mul", 3)), (("mul", 2), ("mul", 3)), (("div", 0),), capped[:3]):
        assert formula(steps) is None
