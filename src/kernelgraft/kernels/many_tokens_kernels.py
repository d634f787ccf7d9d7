"""The kernel of products for many tokens on Hopper, in Gluon; see `many_tokens` for the formula and the shapes.

One warp has the tensor memory accelerator fetch blocks into a ring of shared memory, and two groups of four warps
multiply them: 128 rows of x by 256 of the weight, of which with an activation 128 are the gate's and 128 the same of
up's. So gate and up of a number lie in one thread, and what comes between needs no memory. It would leave the tensor
cores waiting at each block's end, where every register holds a sum. The sums are rounded, which halves them, and
activated and stored piece by piece between the products of the next block; those take as long with as without. And the
second group begins a block when the first has done a step of it, so that one multiplies while the other is at its
block's end: with the norm and the product behind it 208.9 us for 8192 tokens, H 1024, I 3072 in place of 209.6, and two
steps behind 214.6; with H 4096, I 12288 3454, 3454 and 3488, for 2048 tokens 774.0, 775.6 and 777.6 (an H200 in
bfloat16, torch 2.11, Triton 3.6, 2026-11-30).
"""

import functools
import struct
from collections.abc import Callable
from typing import Any

import torch

from . import device, overlap
from .launching import REMEMBERED, VERSIONS, DescribedLaunch

try:
    import triton
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    KNOWN = triton.__version__.startswith(VERSIONS)
except ImportError:
    KNOWN = False

ROWS, COLUMNS = 128, 256
"""Rows of x and of the weight that a program multiplies at a time: as many sums as registers hold. A third group of
warps, with 64 rows more, leaves none to activate beside the products: 150 us in place of 135 for 8192 tokens, H 1024,
I 3072 (the first product with its activation, an H200 in bfloat16, torch 2.11, Triton 3.6, 2026-11-30)."""

DEPTH, STAGES = 64, 4
"""Numbers of each row that are fetched at a time, and how often in advance. 32 numbers eight times: 158 us in place of
155, and 128 numbers twice 210 (the same, when all of the activation was at a block's end)."""

MIN_LENGTH = 8 * DEPTH + 1
"""The shortest rows, so that all that is done between the products of a block has one before it."""

GROUP = 16
"""Blocks of rows that go through the weight together: 2200 us for 8192 tokens, H 4096, I 12288, with 32 2202, with 8
2226, and 64 2274; with H 1024, I 3072 135 to 136 whatever it is (the same)."""

_LOG2_E = 1.4426950408889634
_OF_TANH = -2 * 0.7978845608028654 * _LOG2_E
EXPONENTS = {"silu": (-_LOG2_E, 0.0), "gelu_tanh": (_OF_TANH, _OF_TANH * 0.044715)}
"""a and b of the activations that are computed with one exponential: x / (1 + 2^(x (a + b x^2)))."""

_HALVES = {
    torch.bfloat16: ("bf16x2", "shl.b32 a, $1, 16; and.b32 b, $1, 0xffff0000;"),
    torch.float16: ("f16x2", ".reg .b16 c, d; mov.b32 {c, d}, $1; cvt.f32.f16 a, c; cvt.f32.f16 b, d;"),
}


@functools.cache
def assembly(activation: str, dtype: torch.dtype) -> str:
    """act(gate) * up of two pairs of numbers, rounded where the two are operations of their own."""
    if not activation:
        return ""
    packed, unpack = _HALVES[dtype]
    first, cubic = (f"0f{struct.unpack('>I', struct.pack('>f', each))[0]:08X}" for each in EXPONENTS[activation])
    lines = [".reg .b32 a, b, s, t;", unpack]
    for x, e in ("as", "bt"):
        if activation == "silu":
            lines += [f"mul.f32 {e}, {x}, {first};"]
        else:
            lines += [f"mul.f32 {e}, {x}, {x};", f"fma.rn.f32 {e}, {e}, {cubic}, {first};", f"mul.f32 {e}, {e}, {x};"]
    for each in ("ex2.approx.ftz.f32 {0}, {0};", "add.f32 {0}, {0}, 0f3F800000;", "rcp.approx.ftz.f32 {0}, {0};"):
        lines += [each.format(e) for e in "st"]
    lines += ["mul.f32 a, a, s;", "mul.f32 b, b, t;", f"cvt.rn.{packed}.f32 a, b, a;", f"mul.rn.{packed} $0, a, $2;"]
    return "{" + " ".join(lines) + "}"


if KNOWN:
    _load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    _store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
    _rows, _columns, _depth, _stages, _group = (gl.constexpr(each) for each in (ROWS, COLUMNS, DEPTH, STAGES, GROUP))

    @gluon.jit
    def _block(index, num_row_blocks, num_column_blocks):
        """Which rows and columns: `GROUP` blocks of rows, then the next columns, so that both are in the L2 cache."""
        in_group = _group * num_column_blocks
        first = index // in_group * _group
        rows = gl.minimum(num_row_blocks - first, _group)
        return first + index % in_group % rows, index % in_group // rows

    @gluon.jit
    def _wait_for_kernel_in_front():
        gl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)

    @gluon.jit
    def _let_kernel_behind_start():
        asm: gl.constexpr = "griddepcontrol.launch_dependents; mov.u32 $0, 0;"
        gl.inline_asm_elementwise(asm, "=r", [], gl.int32, is_pure=False, pack=1)

    @gluon.jit
    def _fetch(x_desc, weight_desc, ring, blocks, apart, GATED: gl.constexpr, OVERLAPS: gl.constexpr):
        x_ring, weight_ring, fetched, used = ring
        num_row_blocks, num_column_blocks, num_steps = blocks
        rows_of_block: gl.constexpr = _columns // 2 if GATED else _columns
        size: gl.constexpr = x_desc.block_type.nbytes + 2 * weight_desc.block_type.nbytes
        half: gl.constexpr = _columns // 2
        if OVERLAPS:
            row_block, column_block = _block(gl.program_id(0), num_row_blocks, num_column_blocks)
            row = column_block * rows_of_block
            for early in gl.static_range(_stages):
                mbarrier.expect(fetched.index(early), size)
                early_weight = weight_ring.index(early)
                _load(weight_desc, [row, early * _depth], fetched.index(early), early_weight.slice(0, half))
                _load(weight_desc, [row + apart, early * _depth], fetched.index(early), early_weight.slice(half, half))
            _wait_for_kernel_in_front()
            _let_kernel_behind_start()
            for early in gl.static_range(_stages):
                _load(x_desc, [row_block * _rows, early * _depth], fetched.index(early), x_ring.index(early))
        step = 0
        for index in range(gl.program_id(0), num_row_blocks * num_column_blocks, gl.num_programs(0)):
            row_block, column_block = _block(index, num_row_blocks, num_column_blocks)
            row = column_block * rows_of_block
            for k in range(num_steps):
                at = step % _stages
                bar = fetched.index(at)
                weight = weight_ring.index(at)
                new = step >= _stages or not OVERLAPS
                mbarrier.wait(used.index(at), (step // _stages & 1) ^ 1)
                mbarrier.expect(bar, size, pred=new)
                _load(x_desc, [row_block * _rows, k * _depth], bar, x_ring.index(at), pred=new)
                _load(weight_desc, [row, k * _depth], bar, weight.slice(0, half), pred=new)
                _load(weight_desc, [row + apart, k * _depth], bar, weight.slice(half, half), pred=new)
                step += 1

    @gluon.jit
    def _halves(x):
        first, second = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute([0, 2, 1]).split()
        return first, second

    @gluon.jit
    def _quarter(x, layout: gl.constexpr):
        return gl.convert_layout(x, layout, assert_trivial=True)

    @gluon.jit
    def _finish(sums, y_desc, buffer, row, column, PIECE: gl.constexpr, GATED: gl.constexpr, ASSEMBLY: gl.constexpr):
        """Activate and store one of a block's pieces of 64 columns: two with an activation, four without."""
        if GATED:
            y = gl.inline_asm_elementwise(
                ASSEMBLY, "=r,r,r", [sums[PIECE], sums[PIECE + 2]], dtype=sums[0].dtype, is_pure=True, pack=2
            )
        else:
            y = sums[PIECE]
        tma.store_wait(1)  # the one before the last, which had this buffer
        buffer.store(y)
        fence_async_shared()
        _store(y_desc, [row, column + PIECE * 64], buffer)

    @gluon.jit
    def _multiply(
        GROUP_OF_WARPS: gl.constexpr, ring, begun, y_desc, y_buffers, blocks, outside,
        GATED: gl.constexpr, ASSEMBLY: gl.constexpr, OVERLAPS: gl.constexpr,
    ):  # fmt: skip
        x_ring, weight_ring, fetched, used = ring
        num_row_blocks, num_column_blocks, num_steps = blocks
        whole: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _columns, 16])
        part: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _columns // 4, 16])
        pieces: gl.constexpr = 2 if GATED else 4
        none = gl.zeros((64, _columns // 4), y_desc.dtype, part)
        held = (none, none, none, none)
        row = outside  # nothing is stored there
        if OVERLAPS:  # or y may be what the kernel in front still reads
            _wait_for_kernel_in_front()
        column = 0
        turn = 0
        step = 0
        for index in range(gl.program_id(0), num_row_blocks * num_column_blocks, gl.num_programs(0)):
            row_block, column_block = _block(index, num_row_blocks, num_column_blocks)
            sums = gl.zeros((64, _columns), gl.float32, whole)
            for k in range(num_steps):
                at = step % _stages
                if GROUP_OF_WARPS == 1:
                    mbarrier.wait(begun.index(0), turn, pred=k == 0)
                mbarrier.wait(fetched.index(at), step // _stages & 1)
                x = x_ring.index(at).slice(64 * GROUP_OF_WARPS, 64)
                sums = warpgroup_mma(x, weight_ring.index(at).permute((1, 0)), sums, is_async=True, use_acc=k > 0)
                sums = warpgroup_mma_wait(1, deps=(sums,))
                mbarrier.arrive(used.index((step + _stages - 1) % _stages), pred=k > 0)
                if GROUP_OF_WARPS == 0:
                    mbarrier.arrive(begun.index(0), pred=k == 1)
                for piece in gl.static_range(pieces):
                    if k == 1 + 2 * piece + GROUP_OF_WARPS:  # the two groups by turns
                        buffer = y_buffers.index(2 * GROUP_OF_WARPS + piece % 2)
                        _finish(held, y_desc, buffer, row, column, piece, GATED, ASSEMBLY)
                step += 1
            sums = warpgroup_mma_wait(0, deps=(sums,))
            mbarrier.arrive(used.index((step + _stages - 1) % _stages))
            first, second = _halves(sums.to(y_desc.dtype))
            first, after_first = _halves(first)
            second, after_second = _halves(second)
            held = (
                _quarter(first, part), _quarter(after_first, part),
                _quarter(second, part), _quarter(after_second, part),
            )  # fmt: skip
            row = row_block * _rows + 64 * GROUP_OF_WARPS
            column = column_block * (pieces * 64)
            turn ^= 1
        for piece in gl.static_range(pieces):
            buffer = y_buffers.index(2 * GROUP_OF_WARPS + piece % 2)
            _finish(held, y_desc, buffer, row, column, piece, GATED, ASSEMBLY)
        tma.store_wait(0)

    # One kernel for all numbers of tokens, or the first call with another one would compile.
    @gluon.jit(do_not_specialize=["num_row_blocks", "num_column_blocks", "num_steps", "apart", "outside"])
    def _product(
        x_desc, weight_desc, y_desc, num_row_blocks, num_column_blocks, num_steps, apart, outside,
        GATED: gl.constexpr, ASSEMBLY: gl.constexpr, OVERLAPS: gl.constexpr,
    ):  # fmt: skip
        x_ring = gl.allocate_shared_memory(x_desc.dtype, [_stages, _rows, _depth], x_desc.layout)
        weight_ring = gl.allocate_shared_memory(weight_desc.dtype, [_stages, _columns, _depth], weight_desc.layout)
        y_buffers = gl.allocate_shared_memory(y_desc.dtype, [4, 64, 64], y_desc.layout)
        fetched = gl.allocate_shared_memory(gl.int64, [_stages, 1], mbarrier.MBarrierLayout())
        used = gl.allocate_shared_memory(gl.int64, [_stages, 1], mbarrier.MBarrierLayout())
        begun = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        for at in gl.static_range(_stages):
            mbarrier.init(fetched.index(at), count=1)
            mbarrier.init(used.index(at), count=2)
        mbarrier.init(begun.index(0), count=1)
        fence_async_shared()
        ring = (x_ring, weight_ring, fetched, used)
        blocks = (num_row_blocks, num_column_blocks, num_steps)
        gl.warp_specialize(
            [
                (_multiply, (0, ring, begun, y_desc, y_buffers, blocks, outside, GATED, ASSEMBLY, OVERLAPS)),
                (_multiply, (1, ring, begun, y_desc, y_buffers, blocks, outside, GATED, ASSEMBLY, OVERLAPS)),
                (_fetch, (x_desc, weight_desc, ring, blocks, apart, GATED, OVERLAPS)),
            ],
            [4, 1],
            [240, 24],
        )


@functools.lru_cache(REMEMBERED)
def _launch_of(
    num_rows: int, length: int, x_stride: int, weight_shape: tuple[int, ...], weight_stride: int, act: str,
    dtype: torch.dtype, num_multiprocessors: int, overlaps: bool,
) -> Callable[..., None]:  # fmt: skip
    num_columns = weight_shape[0] // 2 if act else weight_shape[0]
    in_block = COLUMNS // 2 if act else COLUMNS
    blocks = triton.cdiv(num_rows, ROWS), triton.cdiv(num_columns, in_block)
    layout = gl.NVMMASharedLayout.get_default_for([ROWS, DEPTH], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)
    descriptors = (
        ((num_rows, length), (x_stride, 1), (ROWS, DEPTH)),
        (weight_shape, (weight_stride, 1), (COLUMNS // 2, DEPTH)),
        ((num_rows, num_columns), (num_columns, 1), (64, 64)),
    )

    def described(which: int, at: Any) -> Any:
        shape, strides, block = descriptors[which]
        return TensorDescriptor(at, list(shape), list(strides), list(block), layout)

    apart = num_columns if act else COLUMNS // 2
    values = (*blocks, triton.cdiv(length, DEPTH), apart, num_rows + ROWS, bool(act), assembly(act, dtype), overlaps)
    # As few programs as do it in as many rounds: those that would have nothing in the last one only take power.
    num_blocks = blocks[0] * blocks[1]
    grid = (triton.cdiv(num_blocks, triton.cdiv(num_blocks, num_multiprocessors)),)
    return DescribedLaunch(_product, grid, values, described, num_warps=4, maxnreg=168, **overlap.options(overlaps))


def launch(x: torch.Tensor, weight: torch.Tensor, act: str) -> torch.Tensor | None:
    """Run the kernel; `None` where an address or a stride is none of 16 bytes, which the accelerator cannot take."""
    rows = device.rows_of(x)
    num_columns = weight.shape[0] // 2 if act else weight.shape[0]
    strides = rows.stride(0) | weight.stride(0) | num_columns
    if weight.stride(1) != 1 or strides % 8 or (rows.data_ptr() | weight.data_ptr()) % 16:
        return None
    of = device.of(x)
    y = torch.empty(*x.shape[:-1], num_columns, dtype=x.dtype, device=x.device)
    run = _launch_of(
        *rows.shape, rows.stride(0), tuple(weight.shape), weight.stride(0), act,
        x.dtype, device.num_multiprocessors(of), overlap.overlaps(of),
    )  # fmt: skip
    run(rows, weight, y)
    return y
