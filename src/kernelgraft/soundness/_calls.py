"""What modules are called with: one forward on tensors without data, in which chosen calls are noted."""

import functools
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from kernelgraft.soundness._copying import Copier, Variant, isolated, wrap_forward
from kernelgraft.soundness._sites import Run

Call = tuple[tuple[Any, ...], dict[str, Any]]


def first_calls(model: nn.Module, paths: Collection[str], run: Run, variants: Collection[Variant]) -> dict[str, Call]:
    """The arguments of the first call of each module at `paths`; what the forward does not reach is left out.

    Args:
        model: The untouched model, on any device; nothing of it is called.
        paths: The modules to watch.
        run: Does one forward of the model that it is given.
        variants: The tensors to try it on, one after the other, until a forward goes through.
    """
    calls: dict[str, Call] = {}

    def note(path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls.setdefault(path, (args, kwargs))
        return forward(*args, **kwargs)

    for variant in variants:
        calls.clear()
        with isolated(model):
            try:
                twin = Copier(model, variant, set()).copy()
                for path in paths:
                    wrap_forward(twin.get_submodule(path), functools.partial(note, path))
                with variant.run_in:
                    run(twin)
            except Exception:
                # What a model's forward raises where it cannot run on such tensors is anything; the next may do.
                continue
        break
    return calls
