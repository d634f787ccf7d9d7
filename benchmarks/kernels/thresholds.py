"""Where one way of a kernel takes over from another: each constant of the kernels beside others, on both of its sides.

    PYTHONPATH=src python -m benchmarks.kernels.thresholds

The variants are the same call with another number in the place of the constant; what the constant is now is marked so.
"""

import argparse
import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.kernels import script
from benchmarks.kernels.measure import DTYPE, Ready, Work

Ways = Mapping[str, Mapping[str, Any]]
"""For each variant what `module.name` is in it; a function is called with what stands there."""

SIZES = ((1024, 3072), (4096, 12288))
TINY = ((32, 48),)


def works(asked: argparse.Namespace) -> Iterator[Work]:
    """Every constant."""
    for hidden, inner in TINY if asked.tiny else SIZES:
        yield from _products(asked, hidden, inner)
        yield from _many(asked, hidden, inner)
    yield from _rotations(asked, (4, 2) if asked.tiny else (16, 8))
    for rows, classes, hidden in ((9, 50, 32),) if asked.tiny else ((8192, 151936, 1024), (4096, 50257, 1024)):
        yield _loss(asked, rows, classes, hidden)


# --- products


def _products(asked: argparse.Namespace, hidden: int, inner: int) -> Iterator[Work]:
    draw = _drawing(asked)
    x, scale = draw(512, hidden), draw(hidden).abs()
    gate_up, down = draw(2 * inner, hidden) / hidden**0.5, draw(hidden, inner) / inner**0.5
    tokens = (3, 5) if asked.tiny else (16, 32, 64, 96, 128)
    for count in tokens:
        ways = {
            "ours, by kernels": {"few_tokens.MAX_TOKENS": 512},
            "ours, by the library": {"few_tokens.MAX_TOKENS": 0},
        }
        yield _mlp(f"{count} tokens", ways, x[:count], scale, gate_up, down)
    columns = (32, 64) if asked.tiny else (128, 256, 512, 1024)
    for count in (5,) if asked.tiny else (8, 64):
        ways = {
            f"ours, {each} columns": {"few_tokens_kernels._ADDED_COLUMNS": each, "few_tokens.MAX_TOKENS": 512}
            for each in columns
        }
        yield _mlp(f"{count} tokens, parts added up", ways, x[:count], scale, gate_up, down)


def _many(asked: argparse.Namespace, hidden: int, inner: int) -> Iterator[Work]:
    draw = _drawing(asked)
    gate_up, down = draw(2 * inner, hidden) / hidden**0.5, draw(hidden, inner) / inner**0.5
    ways = {
        "ours, by the kernel": {"many_tokens.MIN_ROWS": 1, "many_tokens._BUSY": {"": 0.0, "silu": 0.0}},
        "ours, by the library": {"many_tokens._BUSY": {}},
    }
    for count in (70, 90) if asked.tiny else (256, 512, 640, 768, 1024, 1536, 2048, 4096, 8192):
        x = draw(count, hidden)
        yield _product(f"{count} rows, H {hidden}, activated", ways, x, gate_up, "silu")
        yield _product(f"{count} rows, H {inner}", ways, draw(count, inner), down, "")


def _product(name: str, ways: Ways, x: torch.Tensor, weight: torch.Tensor, act: str) -> Work:
    from kernelgraft.kernels.many_tokens import product

    def plain(given: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        y = F.linear(given, rows)
        return F.silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1] if act else y

    return _work(
        f"product of {name}",
        {"rows": x.shape[0], "length": x.shape[1], "columns": weight.shape[0]},
        lambda: product(x, weight, None, act),
        lambda dtype: lambda: plain(x.to(dtype), weight.to(dtype)),
        ways,
    )


def _mlp(
    name: str,
    ways: Ways,
    x: torch.Tensor,
    scale: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> Work:
    from kernelgraft.kernels import rms_norm
    from kernelgraft.kernels.few_tokens import Norm
    from kernelgraft.kernels.gated_mlp import gated_mlp

    def plain(*tensors: torch.Tensor) -> torch.Tensor:
        given, weight, both, last = tensors
        gate, up = F.linear(rms_norm.reference(given, weight, 1e-6), both).chunk(2, -1)
        return F.linear(F.silu(gate) * up, last)

    tensors = (x, scale, gate_up, down)
    norm = Norm(scale, 1e-6)
    return _work(
        f"MLP H {x.shape[1]}, {name}",
        {"tokens": x.shape[0], "hidden": x.shape[1], "intermediate": down.shape[1]},
        lambda: gated_mlp(x, gate_up, down, "silu", norm=norm),
        lambda dtype: lambda: plain(*(each.to(dtype) for each in tensors)),
        ways,
        reads=True,
    )


# --- rotation


def _rotations(asked: argparse.Namespace, heads: tuple[int, int]) -> Iterator[Work]:
    from kernelgraft.kernels import rotary

    draw, dim = _drawing(asked), 8 if asked.tiny else 128
    for tokens in (3, 70) if asked.tiny else (16, 512, 8192):
        tensors = [draw(1, tokens, (heads[0] + 2 * heads[1]) * dim), *(draw(dim).abs() for _ in range(2))]
        angles = [draw(1, tokens, dim) for _ in range(2)]
        upstream = [draw(1, each, tokens, dim) for each in (heads[0], heads[1], heads[1])]
        yield _rotation(asked, heads, tensors, angles, rotary, None)
        if tokens > 16:
            yield _rotation(asked, heads, tensors, angles, rotary, upstream)


def _rotation(
    asked: argparse.Namespace,
    heads: tuple[int, int],
    tensors: Sequence[torch.Tensor],
    angles: Sequence[torch.Tensor],
    rotary: Any,
    upstream: Sequence[torch.Tensor] | None,
) -> Work:
    tokens, dim = angles[0].shape[1:]

    def made(rotate: Callable[..., Any], dtype: torch.dtype = DTYPE) -> Callable[[], Any]:
        leaves = [each.to(dtype, copy=True).requires_grad_(upstream is not None) for each in tensors]
        turned = [each.to(dtype) for each in angles]

        def call() -> Any:
            return rotate(leaves[0], *turned, heads[0], dim, *leaves[1:], 1e-6, 0.0, True)

        if upstream is None:
            return call
        found, above = call(), [each.to(dtype) for each in upstream]
        return lambda: torch.autograd.grad(found, leaves, above, retain_graph=True)

    place = "rotary_kernels.settings" if upstream is None else "rotary_backward_kernels.settings"
    ways: dict[str, dict[str, Any]] = {"ours, as it is": {}}
    for elements in (2048, 4096) if asked.tiny else (1024, 2048, 4096):
        for num_warps in (1, 4) if asked.tiny else (2, 4, 8):
            ways[f"ours, {elements} elements, {num_warps} warps"] = {place: _tiles_of(elements, num_warps)}
    return _work(
        f"rotation {tokens} tokens, {heads[0]} heads, {'forward' if upstream is None else 'backward'}",
        {"tokens": tokens, "heads": heads[0], "kv_heads": heads[1]},
        made(rotary.rotate),
        lambda dtype: made(rotary.reference, dtype),
        ways,
        gradients=upstream is not None,
    )


def _tiles_of(elements: int, num_warps: int) -> Callable[..., Any]:
    """Settings in whose programs there are so many elements, as far as there are heads and tokens."""
    from kernelgraft.kernels.rotary_kernels import settings as real

    def settings(num_rows: int, heads: tuple[int, int, int], head_dim: int, num: int, backward: bool) -> Any:
        chosen = real(num_rows, heads, head_dim, num, backward)
        at_once = min(max(elements // head_dim, 1), 1 << (max(min(heads[:2]), 1).bit_length() - 1))
        tokens = max(elements // head_dim // at_once, 1)
        tiles = [-(-num_rows // tokens) * -(-each // at_once) for each in heads]
        if backward:
            tiles = [min(each, most) for each, most in zip(tiles, chosen.num_programs, strict=True)]
        return replace(chosen, tokens=tokens, heads=at_once, num_warps=num_warps, num_programs=tuple(tiles))

    return settings


# --- loss


def _loss(asked: argparse.Namespace, rows: int, classes: int, hidden: int) -> Work:
    from kernelgraft.kernels.cross_entropy import linear_cross_entropy
    from kernelgraft.kernels.cross_entropy_rows import Settings

    draw = _drawing(asked)
    x, weight = draw(rows, hidden), draw(classes, hidden) / hidden**0.5
    target = torch.randint(classes, (rows,), device=asked.device)

    def loss(of: Callable[..., torch.Tensor], dtype: torch.dtype = DTYPE) -> Callable[[], Any]:
        leaves = [each.to(dtype, copy=True).requires_grad_() for each in (x, weight)]

        def call() -> Any:
            found = of(*leaves)
            return found.detach(), *torch.autograd.grad(found, leaves)

        return call

    def plain(given: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(given, of).float(), target)

    ways: dict[str, dict[str, Any]] = {"ours, as it is": {}}
    for columns in (16,) if asked.tiny else (2048, 4096, 8192):
        for num_warps in (1,) if asked.tiny else (4, 8, 16):
            chosen = Settings(columns, num_warps)
            ways[f"ours, {columns} columns, {num_warps} warps"] = {
                "cross_entropy_rows.settings": lambda _, chosen=chosen: chosen
            }
    for power in (10,) if asked.tiny else (27, 28, 30, 31):
        ways[f"ours, {1 << power >> 20} MB of logits"] = {"cross_entropy.BUFFER": 1 << power}
    return _work(
        f"loss of {rows} rows, {classes} classes",
        {"rows": rows, "classes": classes, "hidden": hidden},
        loss(lambda given, of: linear_cross_entropy(given, of, target)),
        lambda dtype: loss(plain, dtype),
        ways,
        gradients=True,
        repeats=None if asked.tiny else 9,
    )


# --- what they share


def _drawing(asked: argparse.Namespace) -> Callable[..., torch.Tensor]:
    generator = torch.Generator(asked.device).manual_seed(asked.seed)
    return lambda *shape: torch.randn(*shape, generator=generator, device=asked.device).to(DTYPE)


def _work(
    name: str,
    shape: Mapping[str, int],
    call: Callable[[], Any],
    plain: Callable[[torch.dtype], Callable[[], Any]],
    ways: Ways,
    **options: Any,
) -> Work:
    """The call in each way, beside plain torch, which is also the yardstick and, in float32, the reference."""

    def ready(way: Mapping[str, Any]) -> Ready:
        def run() -> Any:
            with _set(way):
                return call()

        return Ready(run)

    return Work(
        name=name,
        shape=shape,
        variants={
            "eager": lambda: Ready(plain(DTYPE)),
            **{variant: lambda way=way: ready(way) for variant, way in ways.items()},
        },
        reference=lambda: plain(torch.float32)(),
        **options,
    )


@contextlib.contextmanager
def _set(way: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block the kernels' constants are these; launches that remember others are forgotten on both sides."""
    before = []
    for place, value in way.items():
        module_name, _, name = place.rpartition(".")
        module = importlib.import_module(f"kernelgraft.kernels.{module_name}")
        before.append((module, name, getattr(module, name)))
        setattr(module, name, value)
    _forget()
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        _forget()


def _forget() -> None:
    from kernelgraft.kernels import few_tokens_kernels

    few_tokens_kernels._launches.cache_clear()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    return script.main("thresholds", __doc__, works, arguments)


if __name__ == "__main__":
    sys.exit(main())
