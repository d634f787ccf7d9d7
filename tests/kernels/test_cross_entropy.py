"""Cross entropy of a head against torch in float64: in Triton (its interpreter on a CPU), and in plain torch."""

import pytest
import torch
from drawn import DEVICE, DTYPES, close, few, tensor
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernelgraft.kernels import cross_entropy as op
from kernelgraft.kernels import cross_entropy_rows as rows

pytest.importorskip("triton")

shapes = st.tuples(
    st.lists(st.integers(0, 4), max_size=2).map(tuple),
    st.sampled_from([1, 8, 20]),
    st.sampled_from([1, 2, 37, 64, 130]),
)
options = st.fixed_dictionaries(
    {
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "softcap": st.sampled_from([None, 3.0]),
        "scale": st.sampled_from([1.0, 0.3]),
        "ignore_index": st.sampled_from([-100, 1]),
    }
)


def targets(leading, num_classes, seed=7):
    drawn = torch.randint(0, num_classes, leading, generator=torch.Generator().manual_seed(seed))
    flat = drawn.view(-1)
    flat[::3] = -100
    return drawn.to(DEVICE)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(op, "BUFFER", 8 * 5 * 64 * 4)


def check(shape, dtype, has_bias=False, weighs=False, **given):
    """Loss and gradients, and that the same comes without a gradient to make."""
    leading, hidden_size, num_classes = shape
    target = targets(leading, num_classes)
    if given.get("ignore_index", -100) != -100:
        target = target.clamp_min(0)
    inputs = [
        tensor(*leading, hidden_size, dtype=dtype),
        tensor(num_classes, hidden_size, dtype=dtype, seed=1, scale=hidden_size**-0.5),
        tensor(num_classes, dtype=dtype, seed=2) if has_bias else None,
    ]
    class_weight = tensor(num_classes, seed=3).abs() if weighs else None
    here = [None if each is None else each.clone().requires_grad_() for each in inputs]
    wide = [None if each is None else each.double().requires_grad_() for each in inputs]
    loss = op.linear_cross_entropy(here[0], here[1], target, here[2], class_weight=class_weight, **given)
    exact = op.reference(
        wide[0], wide[1], target, wide[2], class_weight=class_weight.double() if weighs else None, **given
    )
    assert loss.dtype == torch.float32
    assert loss.shape == exact.shape
    with torch.no_grad():
        again = op.linear_cross_entropy(*inputs[:2], target, inputs[2], class_weight=class_weight, **given)
    assert torch.equal(again, loss.detach()) or loss.isnan().any()
    upstream = tensor(*loss.shape, seed=4).abs()
    loss.backward(upstream)
    exact.backward(upstream.double())
    logits = torch.nn.functional.linear(wide[0], wide[1], wide[2]).abs().amax().item() if target.numel() else 0.0
    counted = exact.isfinite()
    assert torch.equal(counted, loss.isfinite())
    close(loss[counted], exact[counted], dtype, size=logits / (1 if given.get("reduction") == "mean" else 4))
    biggest = [wide[1].abs().amax(), wide[0].abs().amax() if target.numel() else 0.0, 1.0]
    for each, other, factor in zip(here, wide, biggest, strict=True):
        if each is not None:
            assert each.grad.dtype == dtype
            ups = other.grad.abs().amax() if other.grad.numel() else 0.0
            size = (1 + logits) * max(ups, factor * upstream.amax() / 8 if upstream.numel() else 0.0)
            close(each.grad, other.grad, dtype, max(target.numel(), num_classes), size)


@pytest.mark.usefixtures("in_triton", "small_chunks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes, has_bias=st.booleans(), weighs=st.booleans(), options=options)
@few
def test_in_triton(dtype, shape, has_bias, weighs, options):
    check(shape, dtype, has_bias, weighs, **options)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes, has_bias=st.booleans(), weighs=st.booleans(), options=options)
@few
def test_in_plain_torch(dtype, shape, has_bias, weighs, options):
    check(shape, dtype, has_bias, weighs, **options)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("in_triton", [False, True])
@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_option_of_torch(monkeypatch, in_triton, weighs, smoothing, reduction):
    monkeypatch.setattr(op.device, "in_triton", lambda x: in_triton)
    given = {"weighs": weighs, "label_smoothing": smoothing, "reduction": reduction}
    check(((3, 7), 16, 40), torch.float32, has_bias=True, **given)


@pytest.mark.usefixtures("small_chunks")
def test_in_float64_it_is_what_torch_gives():
    capped = {"softcap": 2.0, "scale": 0.5, "reduction": "none"}
    for chosen, weighs in (({}, False), ({"label_smoothing": 0.1}, True), (capped, False)):
        inputs = [tensor(23, 16).double(), tensor(40, 16, seed=1).double(), tensor(40, seed=2).double()]
        target, class_weight = targets((23,), 40), tensor(40, seed=3).double().abs() if weighs else None
        here, there = ([each.clone().requires_grad_() for each in inputs] for _ in range(2))
        loss = op.linear_cross_entropy(here[0], here[1], target, here[2], class_weight=class_weight, **chosen)
        wanted = op.reference(there[0], there[1], target, there[2], class_weight=class_weight, **chosen)
        torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
        loss.sum().backward()
        wanted.sum().backward()
        for one, other in zip(here, there, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("divides", [False, True])
def test_rounded_where_the_reference_rounds(dtype, rounds, divides):
    formula = rows.Formula(-100, 0.1, 8.0 if divides else 0.125, divides, 4.0, rounds)
    logits, target = tensor(9, 200, dtype=dtype, scale=3), targets((9,), 200)
    found, wanted = (torch.empty(9, device=DEVICE) for _ in range(2))
    gradient, other = logits.clone(), logits.clone()
    rows.launch_rows(gradient, target, None, None, found, formula, True)
    rows.reference_rows(other, target, None, None, wanted, formula, True)
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)
    close(gradient, other.double(), dtype, size=other.abs().max())


@pytest.mark.usefixtures("in_triton")
def test_tanh_near_zero_and_far():
    formula = rows.Formula(softcap=1.0)
    logits = torch.tensor([[0.0, 1e-6, -1e-3, 0.2499, 0.2501, -5.0, 90.0, -90.0]], device=DEVICE)
    wanted = torch.log_softmax(torch.tanh(logits.double()), 1)[0]
    for target in range(8):
        loss = torch.empty(1, device=DEVICE)
        rows.launch_rows(logits.clone(), torch.tensor([target], device=DEVICE), None, None, loss, formula, False)
        torch.testing.assert_close(loss[0].double(), -wanted[target], rtol=1e-6, atol=0)


@pytest.mark.parametrize("in_triton", [False, True])
def test_rows_that_do_not_count(monkeypatch, in_triton):
    monkeypatch.setattr(op.device, "in_triton", lambda x: in_triton)
    hidden, weight = tensor(6, 8).requires_grad_(), tensor(30, 8, seed=1).requires_grad_()
    for reduction, wanted in (("mean", float("nan")), ("sum", 0.0)):
        loss = op.linear_cross_entropy(hidden, weight, torch.full((6,), -100, device=DEVICE), reduction=reduction)
        assert torch.equal(loss.isnan(), torch.tensor(wanted, device=DEVICE).isnan())
        grads = torch.autograd.grad(loss, (hidden, weight))
        assert all((grad == 0).all() for grad in grads)
    target = torch.tensor([1, -100, 2, -100, 3, 4], device=DEVICE)
    with torch.no_grad():
        hidden[1] = float("nan")  # padding may hold anything
    loss = op.linear_cross_entropy(hidden, weight, target)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert loss.isfinite()
    assert (grad[1] == 0).all()
    assert grad[0].abs().sum() > 0


@pytest.mark.parametrize("in_triton", [False, True])
def test_classes_without_a_chance(monkeypatch, in_triton):
    monkeypatch.setattr(op.device, "in_triton", lambda x: in_triton)
    bias = tensor(30, seed=2)
    bias[:20] = -float("inf")  # a vocabulary that is masked, its first whole block too
    given = [tensor(5, 8), tensor(30, 8, seed=1)]
    here, there = ([each.clone().requires_grad_() for each in given] for _ in range(2))
    target = torch.tensor([20, 25, 29, -100, 21], device=DEVICE)
    monkeypatch.setattr(rows, "settings", lambda num_columns: rows.Settings(8, 1))
    op.linear_cross_entropy(*here, target, bias).backward()
    op.reference(*there, target, bias).backward()
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_target_that_is_no_class(monkeypatch):
    hidden, weight = tensor(3, 8).requires_grad_(), tensor(30, 8, seed=1)
    for wrong in (30, -1):
        target = torch.tensor([1, wrong, -100], device=DEVICE)
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds: there are 30 classes"):
            op.linear_cross_entropy(hidden.cpu(), weight.cpu(), target.cpu())
        with monkeypatch.context() as patched:
            patched.setattr(op.device, "in_triton", lambda x: True)
            loss = op.linear_cross_entropy(hidden, weight, target, reduction="none")
            assert loss.isnan().tolist() == [False, True, False]
            assert op.linear_cross_entropy(hidden, weight, target).isnan()
            assert torch.autograd.grad(loss.sum(), hidden)[0].isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("in_triton", [False, True])
def test_inputs_that_are_not_contiguous(monkeypatch, in_triton):
    monkeypatch.setattr(op.device, "in_triton", lambda x: in_triton)
    base, weights, labels = tensor(6, 4, 16), tensor(8, 30, seed=1), targets((4, 12), 30)
    here = [base[..., ::2].transpose(0, 1).clone().requires_grad_(), weights.t().clone().requires_grad_()]
    leaves = [base.clone().requires_grad_(), weights.clone().requires_grad_()]
    op.linear_cross_entropy(leaves[0][..., ::2].transpose(0, 1), leaves[1].t(), labels[:, ::2]).backward()
    op.reference(*here, labels[:, ::2].contiguous()).backward()
    torch.testing.assert_close(leaves[0].grad[..., ::2].transpose(0, 1), here[0].grad)
    torch.testing.assert_close(leaves[1].grad.t(), here[1].grad)


class Largest(TorchDispatchMode):
    """The numbers in the largest tensor that anything makes, inside the operators of this repository too."""

    def __init__(self):
        super().__init__()
        self.numel = 0
        self.bodies = {each._opoverload: each._init_fn for each in (op._forward, op._backward, op._backward_of_rows)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.bodies:
            with self, torch.no_grad():
                return self.bodies[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        sizes = [each.untyped_storage().nbytes() // each.element_size() for each in tree_leaves(out) if plain(each)]
        self.numel = max([self.numel, *sizes])
        return out


def plain(value):
    return type(value) in (torch.Tensor, torch.nn.Parameter) and not value.is_meta


@pytest.mark.parametrize("in_triton", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_logits_are_never_there_together(monkeypatch, in_triton, dtype, reduction):
    monkeypatch.setattr(op.device, "in_triton", lambda x: in_triton)
    monkeypatch.setattr(op, "BUFFER", 1 << 17)
    hidden, weight = tensor(300, 8, dtype=dtype).requires_grad_(), tensor(1000, 8, dtype=dtype, seed=1).requires_grad_()
    target, most = targets((300,), 1000), op.BUFFER // dtype.itemsize // (1 if in_triton else 8)
    monkeypatch.setattr(rows, "launch_rows", rows.reference_rows)
    monkeypatch.setattr(op, "launch_rows", rows.reference_rows)
    with Largest() as largest:
        op.linear_cross_entropy(hidden, weight, target, reduction=reduction).sum().backward()
    assert 8000 <= largest.numel <= max(most, 8000) < 300 * 1000
    with Largest() as largest:
        op.reference(hidden, weight, target, reduction=reduction).sum().backward()
    assert largest.numel == 300 * 1000


@given(st.integers(0, 20000), st.integers(1, 300000), st.sampled_from([2, 4]))
def test_chunks(num_rows, num_columns, itemsize):
    most = 1 << 29
    chunk = op.chunk_rows(num_rows, num_columns, itemsize, most)
    assert chunk >= 1
    assert chunk * num_columns * itemsize <= most or chunk == 1
    fitting = max(most // (num_columns * itemsize), 1)
    assert -(-num_rows // chunk) == -(-num_rows // fitting)  # no more chunks than there must be
    assert op.chunk_rows(8192, 151936, 2, most) == 1664


def test_gradients_of_16_bits_lose_nothing_between_chunks(monkeypatch):
    """In float16 gradients of a mean over many rows are below what it can hold: the loss's scale brings them back."""
    monkeypatch.setattr(op, "BUFFER", 8 * 48 * 2 * 7)
    hidden, weight = tensor(500, 16, dtype=torch.float16), tensor(40, 16, dtype=torch.float16, seed=1)
    target = targets((500,), 40)
    here, wide = [hidden.clone(), weight.clone()], [hidden.double(), weight.double()]
    for each in (*here, *wide):
        each.requires_grad_()
    (op.linear_cross_entropy(*here, target) * 2.0**-16).mul(2.0**16).backward()
    op.reference(*wide, target).backward()
    close(here[1].grad, wide[1].grad, torch.float16, 40)
    gradient = torch.autograd.grad(op.linear_cross_entropy(*here, target), here[0], torch.tensor(2.0**16))[0]
    # The logits are rounded, and with them the probabilities.
    close(gradient.double() / 2**16, wide[0].grad, torch.float16, 40, wide[0].grad.abs().max())


def samples(dtype):
    options = (-100, 0.1, 0.5, False, 3.0, True)
    target = targets((5,), 12)
    kinds = [(True, "mean"), (False, "none"), (False, "mean"), (True, "sum"), (True, "none")]
    for learns, reduction in kinds if dtype == torch.bfloat16 else kinds[:2]:
        hidden, weight, bias = (
            tensor(*shape, dtype=dtype, seed=seed).requires_grad_(learns)
            for seed, shape in enumerate([(5, 8), (12, 8), (12,)])
        )
        needs = [learns and reduction != "none"] * 3
        yield op._forward, (hidden, weight, bias, target, tensor(12, seed=3).abs(), *options, reduction, *needs)
        yield op._forward, (hidden, weight, None, target, None, *options, reduction, *needs[:2], False)


@pytest.mark.parametrize("in_triton", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operators_keep_their_promises(monkeypatch, in_triton, dtype):
    monkeypatch.setattr(op.device, "in_triton", lambda x: in_triton)
    for operator, arguments in samples(dtype):
        torch.library.opcheck(operator, arguments)


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trains", [False, True])
def test_compiled_in_one_piece(reduction, trains):
    def both(hidden, weight, target):
        return op.linear_cross_entropy(hidden * 2, weight, target, reduction=reduction, softcap=2.0).sum()

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for tokens in (3, 5):
        given, target = [tensor(2, tokens, 8), tensor(20, 8, seed=2)], targets((2, tokens), 20)
        once, again = ([each.clone().requires_grad_(trains) for each in given] for _ in range(2))
        out = compiled(*once, target)
        assert torch.equal(out, both(*again, target))
        if trains:
            out.backward()
            both(*again, target).backward()
            assert all(torch.equal(one.grad, other.grad) for one, other in zip(once, again, strict=True))


def test_only_what_learns_has_a_gradient():
    for learns in ((True, False), (False, True)):
        hidden, weight = tensor(5, 8).requires_grad_(learns[0]), tensor(20, 8, seed=1).requires_grad_(learns[1])
        op.linear_cross_entropy(hidden, weight, targets((5,), 20)).backward()
        assert (hidden.grad is not None, weight.grad is not None) == learns
    assert not op.linear_cross_entropy(hidden, weight.detach(), targets((5,), 20)).requires_grad


def test_twice_backward_and_a_second_derivative():
    hidden, weight = tensor(5, 8).requires_grad_(), tensor(20, 8, seed=1).requires_grad_()
    for reduction in ("mean", "none"):
        loss = op.linear_cross_entropy(hidden, weight, targets((5,), 20), reduction=reduction).sum()
        once = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(loss, hidden, retain_graph=True)[0], once)
        (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            first.sum().backward()


def test_under_autocast():
    hidden, weight, target = tensor(5, 8).requires_grad_(), tensor(20, 8, seed=1).requires_grad_(), targets((5,), 20)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss, wanted = op.linear_cross_entropy(hidden, weight, target), op.reference(hidden, weight, target)
    torch.testing.assert_close(loss, wanted)
    found = torch.autograd.grad(loss, (hidden, weight))
    for one, other in zip(found, torch.autograd.grad(wanted, (hidden, weight)), strict=True):
        assert one.dtype == torch.float32
        close(one, other.double(), torch.bfloat16, 20, other.abs().max())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"target": torch.zeros(4, dtype=torch.int64)}, "target (4,)"),
        ({"weight": torch.zeros(20, 9)}, "weight (20, 9)"),
        ({"target": torch.zeros(5)}, "torch.float32. It is to hold classes"),
        ({"class_weight": torch.ones(19)}, "class_weight is (19,)"),
        ({"reduction": "max"}, "'max'"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"softcap": 0.0}, "softcap is 0.0"),
    ],
)
def test_what_does_not_go_together(changed, said):
    given = {"hidden": torch.zeros(5, 8), "weight": torch.zeros(20, 8), "target": torch.zeros(5, dtype=torch.int64)}
    with pytest.raises(ValueError) as error:
        op.linear_cross_entropy(**{**given, **changed})
    assert said in str(error.value)
