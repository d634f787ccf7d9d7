"""A training step of Qwen3-0.6B, forward, loss and backward: its time and the most memory that it takes.

    PYTHONPATH=src python -m benchmarks.kernels.training_step

Weights are random and 4x2048 tokens are their own labels. No optimizer: all variants would take the same one. The time
is the host's and the device's together; `device_us` of a row is what the device's kernels take by themselves.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks.kernels import measure, ours, qwen3, script
from benchmarks.kernels.measure import Ready, Work, need

BATCH, LENGTH = 4, 2048


def works(asked: argparse.Namespace) -> Iterator[Work]:
    """The one step."""
    model = qwen3.model("0.6b", asked).train()
    batch, length = (2, 9) if asked.tiny else (BATCH, LENGTH)
    ids = qwen3.token_ids(model, batch, length, asked)
    # Of eager's matrix products: forward, and twice as much backward; attention is left out.
    matrices = sum(each.numel() for name, each in model.named_parameters() if each.ndim == 2 and "layers" in name)
    matrices += model.lm_head.weight.numel()
    yield Work(
        name=f"training step {batch}x{length}, Qwen3-0.6B",
        shape={"batch": batch, "length": length},
        variants={
            "eager": lambda: ready(model, ids),
            "compile": lambda: _compiled(model, ids, asked),
            "liger": lambda: _liger(model, ids, asked),
            "ours": lambda: _ours(model, ids, layers=True),
            "ours, two kernels": lambda: _ours(model, ids, layers=False),
        },
        reference=lambda: _exact(model, ids),
        operations=6 * matrices * batch * length,
        with_host=True,
        gradients=True,
        repeats=None if asked.tiny else 15,
    )


def ready(
    of: Any,
    ids: torch.Tensor,
    graft: Any = None,
    around: Callable[[], Any] | None = None,
    says: dict[str, Any] | None = None,
) -> Ready:
    """A model's step.

    Args:
        of: The model.
        ids: Its tokens, which are the labels too.
        graft: Its graft.
        around: A context in which the step runs.
        says: What the row says.
    """

    def before() -> None:
        of.zero_grad(set_to_none=True)

    def step() -> torch.Tensor:
        loss: torch.Tensor = of(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def within() -> torch.Tensor:
        if around is None:
            return step()
        with around():
            return step()

    def outputs() -> list[torch.Tensor]:
        loss = within()
        found = [loss, *_gradients(of)]
        before()
        row["device_us"] = measure.device_us(within, ids.device)
        return found

    row = {"model_bytes": qwen3.num_bytes(list(of.parameters())), **(says or {})}
    return Ready(within, outputs, before, graft, row)


def _gradients(of: nn.Module) -> list[torch.Tensor]:
    """The embeddings' gradient, which all of the model has a part in, and the norm of each layer's.

    A packed parameter holds its originals' elements in another order, so the norm is the same.
    """
    parameters = dict(of.named_parameters())
    embedding = parameters["model.embed_tokens.weight"].grad
    assert embedding is not None
    norms = []
    for group in _groups(of):
        squares = [parameters[name].grad.float().square().sum() for name in group]  # type: ignore[union-attr]
        norms.append(torch.stack(squares).sum().sqrt())
    return [embedding, torch.stack(norms)]


def _groups(of: nn.Module) -> list[list[str]]:
    """The names of each layer's parameters together, and of the others one by one."""
    names = [name for name, _ in of.named_parameters() if name != "model.embed_tokens.weight"]
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else name, []).append(name)
    return [found[key] for key in sorted(found)]


def _exact(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Loss and gradients in float32, one sequence after another: they have as many labels each."""
    of = qwen3.in_float32(model)
    losses = []
    for row in ids.split(1):
        loss = of(input_ids=row, labels=row, use_cache=False).loss / len(ids)
        loss.backward()
        losses.append(loss.detach())
    return [torch.stack(losses).sum(), *_gradients(of)]


def _compiled(model: Any, ids: torch.Tensor, asked: argparse.Namespace) -> Ready:
    of = copy.deepcopy(model)
    of.forward = measure.compiled(of.forward, asked)
    return ready(of, ids)


def _liger(model: Any, ids: torch.Tensor, asked: argparse.Namespace) -> Ready:
    need("liger_kernel", "liger-kernel", asked)
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3
    from transformers.models.qwen3 import modeling_qwen3

    before = dict(vars(modeling_qwen3))
    of = copy.deepcopy(model)
    apply_liger_kernel_to_qwen3(model=of)
    after = {name: value for name, value in vars(modeling_qwen3).items() if before.get(name) is not value}
    _put(modeling_qwen3, {name: before[name] for name in after})

    @contextmanager
    def patched() -> Iterator[None]:
        """It patches the module that eager's forward reads too; so only while its own step runs."""
        _put(modeling_qwen3, after)
        try:
            yield
        finally:
            _put(modeling_qwen3, {name: before[name] for name in after})

    return ready(of, ids, around=patched)


def _put(module: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(module, name, value)


def _ours(model: Any, ids: torch.Tensor, *, layers: bool) -> Ready:
    mapping = ours.mapping(layers=layers, head=True)
    if not layers and mapping == ours.mapping(head=True):
        raise measure.Skipped("kernelgraft.kernels has no DecoderLayer here, so this is the same as ours")
    of, graft = ours.grafted(model, mapping)
    return ready(of, ids, graft, says={"kernels": ours.names(mapping)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    return script.main("training_step", __doc__, works, arguments)


if __name__ == "__main__":
    sys.exit(main())
