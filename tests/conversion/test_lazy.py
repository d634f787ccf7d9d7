"""Lazy tensors: how they stand in for tensors, what they read, and what they refuse."""

import ast
import copy
import math
import pickle
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernelgraft import conversion
from kernelgraft.conversion import LazyTensor, TensorSource, eager_steps
from kernelgraft.conversion.lazy import is_lossless
from kernelgraft.errors import ConversionError


class CountingSource(TensorSource):
    """Counts how often it is read."""

    reads = 0

    def read(self):
        object.__setattr__(self, "reads", self.reads + 1)
        return super().read()


class Recorder(TorchDispatchMode):
    """Records what is copied and what is allocated, also inside of operations on lazy tensors."""

    def __init__(self):
        super().__init__()
        self.copied, self.allocated = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(cls, LazyTensor) for cls in types):
            with self:
                return LazyTensor.__torch_dispatch__(func, types, args, kwargs)
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            self.copied.append(args[1].numel())
        elif not any(isinstance(arg, torch.Tensor) for arg in args) or func is torch.ops.aten._to_copy.default:
            self.allocated.append(result.numel())
        return result


def lazy(tensor, name="a"):
    return LazyTensor.of(TensorSource(name, tensor))


A, B = torch.randn(4, 6), torch.randn(5, 6)


def test_it_stands_in_for_a_tensor():
    tensor = lazy(A)
    assert (tensor.shape, tensor.dtype, tensor.device, tensor.stride()) == (A.shape, A.dtype, A.device, A.stride())
    assert len(tensor) == 4
    assert tensor.is_floating_point()
    assert not tensor.requires_grad
    assert tensor.is_contiguous()
    assert repr(tensor) == "LazyTensor(shape=(4, 6), dtype=torch.float32, device=cpu, of=[a])"
    assert tensor.to(torch.bfloat16).dtype == torch.bfloat16
    assert tensor.to("meta").device.type == "meta"


@pytest.mark.parametrize(
    "index",
    [0, -1, slice(1, 3), (slice(None), slice(None, None, 2)), (..., None), (None, 1, slice(2, 5)), (..., -1), (0, 0)],
)
def test_indexing(index):
    with eager_steps() as steps:
        result = lazy(A)[index]
    assert torch.equal(result.materialize(), A[index])
    assert steps.total == 0


def test_indexing_with_a_list_is_a_re_layout_too():
    with eager_steps() as steps:
        result = lazy(A)[:, [3, 0, 3]]
        chosen = lazy(A).index_select(0, torch.tensor([2, -1 % 4]))
    assert torch.equal(result.materialize(), A[:, [3, 0, 3]])
    assert torch.equal(chosen.materialize(), A[[2, 3]])
    assert steps.total == 0
    with pytest.raises(IndexError, match="out of bounds"):
        lazy(A)[[7]]


def test_spellings_of_re_layouts():
    def spellings(x):
        yield from torch.chunk(x, 3, 1)
        yield from torch.tensor_split(x, 2, 1)
        yield from x.unbind(-1)
        yield x.unflatten(1, (2, -1)).movedim(1, 0)
        yield x.mT.reshape(-1)
        yield x.swapaxes(0, 1).flatten(0)
        yield x.T.ravel()
        yield torch.vstack([x, x])
        yield x.expand(2, 4, 6).reshape(8, 6)
        yield x.narrow(1, 2, 3).contiguous()
        yield x.view(2, 2, 6)[:, 1].clone()
        yield x.unsqueeze(0).squeeze().squeeze(0)
        yield x.reshape(6, 4).t()[1:4].detach()
        yield x.reshape(1, 1, 24).expand(-1, 2, -1)
        yield torch.stack([x, x], -1).view_as(torch.empty(4, 12))
        yield torch.cat([torch.empty(0), x]) if type(x) is torch.Tensor else torch.cat([lazy(torch.empty(0)), x])

    eager = list(spellings(A))
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context(), eager_steps() as steps:
            results = list(spellings(lazy(A)))
        assert steps.total == 0
        for result, expected in zip(results, eager, strict=True):
            assert torch.equal(result.materialize(), expected)


@pytest.mark.parametrize("tensor", [torch.tensor(3.0), torch.empty(0, 4), torch.empty(2, 0), torch.ones(1, 1)])
def test_small_shapes(tensor):
    assert torch.equal(lazy(tensor).materialize(copy=True), tensor)
    assert torch.equal(lazy(tensor).reshape(-1).materialize(), tensor.reshape(-1))
    repeated = lazy(tensor).unsqueeze(0).expand(3, *tensor.shape)
    assert torch.equal(repeated.materialize(), tensor.expand(3, *tensor.shape))


def test_a_parameter_of_a_lazy_tensor():
    parameter = torch.nn.Parameter(lazy(A))
    assert isinstance(parameter, torch.nn.Parameter)
    assert isinstance(parameter, LazyTensor)
    assert parameter.requires_grad
    parameter._is_hf_initialized = True
    for again in (copy.copy(parameter), copy.deepcopy(parameter)):
        assert again._is_hf_initialized
        assert isinstance(again, torch.nn.Parameter)
        assert again.requires_grad
    module = torch.nn.Linear(6, 4)
    module.weight = parameter
    assert torch.equal(copy.deepcopy(module).weight.materialize(), A)
    resolved = parameter.resolved()
    assert type(resolved) is torch.nn.Parameter
    assert resolved._is_hf_initialized
    assert resolved is parameter.resolved()
    assert copy.copy(parameter).resolved() is not resolved
    assert type(lazy(A).resolved()) is torch.Tensor


def test_a_contiguous_run_of_one_source_is_not_copied():
    for result, expected in ((lazy(A), A), (lazy(A)[1:3], A[1:3]), (lazy(A).reshape(2, 12)[1], A.reshape(2, 12)[1])):
        value = result.materialize()
        assert value.data_ptr() == expected.data_ptr()
        assert torch.equal(value, expected)
    copies = [
        lazy(A).materialize(copy=True),
        lazy(A).materialize(dtype=torch.float64),
        lazy(A).t().materialize(),
        lazy(A)[:, :3].materialize(),
        lazy(A.t()).materialize(),
    ]
    assert not {value.data_ptr() for value in copies} & {A.data_ptr()}
    assert all(value.is_contiguous() for value in copies)


def test_what_was_cut_apart_and_put_back_is_one_whole_leaf():
    merged = torch.cat([lazy(A, "a"), lazy(B, "b")])
    first, second = merged.split([4, 5])
    assert [(s.name, s.shape, s.stride, s.offset) for _, s in first.pieces()] == [("a", (24,), (1,), 0)]
    assert [(s.name, s.shape, s.stride, s.offset) for _, s in second.pieces()] == [("b", (30,), (1,), 0)]
    whole = lazy(A)
    for dim in (0, 1):
        for back in (torch.cat(list(whole.split(1, dim)), dim), torch.stack(list(whole.unbind(dim)), dim)):
            assert len(back.pieces()) == 1
            assert back.materialize().data_ptr() == A.data_ptr()


def test_a_plain_tensor_pulls_the_pieces_into_place():
    a, b = CountingSource("a", A), CountingSource("b", B)
    merged = torch.cat([LazyTensor.of(a), LazyTensor.of(b)]).t()
    out = torch.empty(6, 9)
    wide = torch.zeros(12, 9)[::2]
    with Recorder() as recorder:
        out.copy_(merged)
        wide.copy_(merged)
    assert recorder.allocated == [12 * 9] or recorder.allocated == []
    assert recorder.copied == [24, 30, 24, 30]
    assert torch.equal(out, torch.cat([A, B]).t())
    assert torch.equal(wide, out)
    assert (a.reads, b.reads) == (2, 2)


def test_a_narrowed_read_touches_only_its_part():
    a, b = CountingSource("a", A), CountingSource("b", B)
    merged = torch.stack([torch.cat([LazyTensor.of(a), LazyTensor.of(b)])] * 2).flatten(1)
    with Recorder() as recorder:
        value = merged.unflatten(1, (9, 6))[1, 5:8, 2:4].materialize()
    assert torch.equal(value, B[1:4, 2:4])
    assert (a.reads, b.reads) == (0, 1)
    assert recorder.copied == [6]


def test_writing_through_broadcasts_and_slices():
    out = torch.empty(3, 4, 6)
    out.copy_(lazy(A))
    assert torch.equal(out, A.expand(3, 4, 6))
    out[1] = lazy(A).to(torch.bfloat16)
    assert torch.equal(out[1], A.bfloat16().float())
    out[..., :3] = lazy(A)[:, 3:]
    assert torch.equal(out[0, :, :3], A[:, 3:])
    with pytest.raises(ConversionError, match=r"shape \(4, 6\) was to be read into a tensor of shape \(6, 4\)"):
        lazy(A).materialize(out=torch.empty(6, 4))


def test_a_lazy_tensor_over_lazy_tensors_assembles_nothing():
    merged = torch.cat([lazy(A, "a"), lazy(B, "b")])
    outer = LazyTensor.of(TensorSource("merged", torch.nn.Parameter(merged)))
    assert [view.name for _, view in outer.pieces()] == ["merged"]
    with Recorder() as recorder:
        value = outer[3:6].t().materialize()
    assert torch.equal(value, torch.cat([A, B])[3:6].t())
    assert sorted(recorder.copied) == [6, 12]
    assert torch.equal(outer[3:6].materialize(), torch.cat([A, B])[3:6])
    assert LazyTensor.of(TensorSource("again", lazy(A))).materialize().data_ptr() == A.data_ptr()


@pytest.mark.parametrize(
    "tensor", [torch.arange(4), torch.rand(4).to(torch.float8_e4m3fn), torch.rand(4) > 0.5, torch.rand(4).bfloat16()]
)
def test_dtypes(tensor):
    result = torch.cat([lazy(tensor), lazy(tensor)]).to(torch.float32)
    assert torch.equal(result.materialize(), torch.cat([tensor, tensor]).to(torch.float32))


def test_a_cast_rounds_where_it_stands():
    x = torch.rand(16)
    with eager_steps() as steps:
        half = lazy(x).to(torch.bfloat16)
    assert steps.total == 0
    assert torch.equal(half.materialize(out=torch.empty(16)), x.bfloat16().float())
    with eager_steps() as steps:
        again = half.to(torch.float32)
    assert steps.total == 1
    assert torch.equal(again, x.bfloat16().float())


def test_lossless_casts():
    f32, f16, bf16, f8 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn
    lossless = [
        (bf16, f32),
        (f16, f32),
        (f8, f16),
        (f8, bf16),
        (torch.bool, f8),
        (torch.int8, bf16),
        (torch.uint8, f16),
    ]
    lossy = [
        (f32, bf16),
        (f16, bf16),
        (bf16, f16),
        (f16, f8),
        (torch.int32, f32),
        (f32, torch.int64),
        (f32, torch.bool),
    ]
    assert all(is_lossless(old, new) for old, new in lossless)
    assert not any(is_lossless(old, new) for old, new in lossy)
    assert is_lossless(torch.uint8, torch.int16)
    assert not is_lossless(torch.int8, torch.uint8)


def test_anything_else_goes_on_eagerly_and_is_counted():
    with eager_steps() as outer, eager_steps() as steps:
        doubled = lazy(A, "a") * 2 + lazy(A, "b")
        assert torch.equal(lazy(A), A)
        mixed = torch.cat([lazy(A), torch.zeros(1, 6)])
    assert type(doubled) is torch.Tensor
    assert torch.equal(doubled, A * 2 + A)
    assert torch.equal(mixed[:4], A)
    assert steps.total == outer.total == 4
    assert steps.sources == {"a", "b"}
    assert steps.operations["aten.mul.Tensor"] == 1
    lazy(A).sum()
    assert steps.total == 4


def test_factories_read_nothing():
    with eager_steps() as steps:
        assert lazy(A).new_zeros(2, 3).sum() == 0
        assert torch.zeros_like(lazy(A)).shape == A.shape
        assert torch.empty_like(lazy(A), dtype=torch.int64).dtype == torch.int64
    assert steps.total == 0


def test_each_thread_counts_its_own():
    counts = {}

    def work(number):
        with eager_steps() as steps:
            for _ in range(number):
                torch.equal(lazy(A).t().materialize(), (lazy(A) + 0).t())
        counts[number] = steps.total

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
    with eager_steps() as steps:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert counts == {number: number for number in range(1, 9)}
    assert steps.total == 0


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.add_(1),
        lambda x: x.copy_(A),
        lambda x: x[1:].zero_(),
        lambda x: torch.add(A, A, out=x),
        lambda x: torch._foreach_copy_([x], [A]),
        lambda x: x.__setitem__(0, 1.0),
    ],
)
def test_writing_into_a_lazy_tensor_is_refused(write):
    with pytest.raises(ConversionError, match=r"was asked to write into LazyTensor.*materialize\(copy=True\)"):
        write(lazy(A))


def test_what_depends_on_strides_or_needs_bytes_is_refused():
    with pytest.raises(ConversionError, match="has no strides of its own"):
        lazy(A).as_strided((2,), (1,))
    with pytest.raises(ConversionError, match=r"pickle \.materialize"):
        pickle.dumps(lazy(A))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x.view(5, 5),
        lambda x: x.transpose(0, 2),
        lambda x: x.permute(0, 0),
        lambda x: x[9],
        lambda x: x.split([1, 1]),
        lambda x: torch.cat([x, lazy(torch.ones(2, 2))]),
        lambda x: torch.stack([x, lazy(B)]),
        lambda x: x.expand(3, 6),
    ],
)
def test_what_torch_refuses_is_refused_likewise(wrong):
    with pytest.raises((RuntimeError, IndexError)):
        wrong(A)
    with pytest.raises((RuntimeError, IndexError)):
        wrong(lazy(A))


def test_a_reshape_that_would_shatter_goes_eager():
    x = torch.arange(5003 * 5009, dtype=torch.uint8).reshape(5003, 5009)
    with eager_steps() as steps:
        result = lazy(x).t().reshape(5003, 5009).t()
    assert steps.total == 1
    assert torch.equal(result, x.t().reshape(5003, 5009).t())


def test_many_experts_stay_cheap():
    experts = [lazy(torch.empty(8, 4, device="meta"), f"e{i}") for i in range(512)]
    parts = torch.stack(experts).transpose(1, 2).unbind(0)
    assert [part.sources[0].name for part in parts] == [f"e{i}" for i in range(512)]
    assert all(math.prod(view.shape) == 32 for part in parts for view, _ in part.pieces())


def test_the_package_imports_nothing_heavy():
    folder = Path(conversion.__file__).parent
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                ours = module.startswith(("kernelgraft.conversion", "kernelgraft.errors"))
                assert ours or module.split(".")[0] in {"torch", *sys.stdlib_module_names}, (file.name, module)
