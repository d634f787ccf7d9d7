"""Choices that a model makes inside of a forward, such as which experts a token goes to.

Where two experts are nearly even a rounding decides between them, and then what comes out is another thing altogether:
it says nothing about the kernel that did the rounding. So a model whose outputs differ is run once more with the
choices of its originals. What is wrong with a kernel shows in that run as well.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

MOST = 0.05
"""The share of choices that a right kernel may change. Nearly even ones are rare."""


class Choices:
    """The integers that modules of a model return, and what comes out beside them.

    Args:
        model: The model.
        paths: Modules that kernels run in; what they choose themselves is theirs to answer for.
    """

    def __init__(self, model: nn.Module, paths: Collection[str]) -> None:
        self._modules = {
            name: module
            for name, module in model.named_modules()
            if name and not any(name == path or name.startswith(f"{path}.") for path in paths)
        }
        self._known: dict[str, list[tuple[torch.Tensor, ...]]] = {}
        self.changed = self.total = 0

    @property
    def are_few(self) -> bool:
        """Whether some were taken from the originals, and no more than a rounding explains."""
        return 0 < self.changed <= max(1, MOST * self.total)

    def __str__(self) -> str:
        said = "choice was another" if self.changed == 1 else "choices were others"
        return f"{self.changed} of {self.total} {said}, and compared as the originals choose"

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside, what modules choose is kept."""

        def keep(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                if type(output) is tuple and any(map(_is_choice, output)):
                    kept = tuple(each.clone() if isinstance(each, torch.Tensor) else each for each in output)
                    self._known.setdefault(name, []).append(kept)

            return hook

        with self._hooked({name: keep(name) for name in self._modules}):
            yield

    @contextmanager
    def forced(self) -> Iterator[None]:
        """Inside, where a module chooses otherwise than it did, it gives what it gave then."""

        def force(calls: Iterator[tuple[Any, ...]]) -> Callable[..., Any]:
            def hook(_: nn.Module, __: Any, output: Any) -> Any:
                theirs = next(calls, None)
                if theirs is None or type(output) is not tuple or len(theirs) != len(output):
                    return output
                return self._chosen(output, theirs)

            return hook

        with self._hooked({name: force(iter(calls)) for name, calls in self._known.items()}):
            yield

    def _chosen(self, ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> tuple[Any, ...]:
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if _is_choice(a)]
        if len(pairs) != 1 or pairs[0][0].shape != pairs[0][1].shape:
            return ours
        other = (pairs[0][0] != pairs[0][1]).any(-1)
        self.changed += int(other.sum())
        self.total += other.numel()
        return tuple(_where(other, b, a) for a, b in zip(ours, theirs, strict=True))

    @contextmanager
    def _hooked(self, hooks: dict[str, Callable[..., Any]]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, hook in hooks.items():
                stack.callback(self._modules[name].register_forward_hook(hook).remove)
            yield


def _is_choice(value: Any) -> bool:
    """Whether a value is a tensor of indices, some for each row."""
    if not isinstance(value, torch.Tensor) or value.ndim < 2:
        return False
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def _where(rows: torch.Tensor, theirs: Any, ours: Any) -> Any:
    if not isinstance(ours, torch.Tensor) or ours.shape != theirs.shape or ours.shape[: rows.ndim] != rows.shape:
        return ours
    return torch.where(rows.reshape(*rows.shape, *[1] * (ours.ndim - rows.ndim)), theirs, ours)
