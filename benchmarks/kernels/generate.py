"""A whole Qwen3-0.6B by `from_pretrained` and `generate` without a compiler: the time for each token.

    PYTHONPATH=src python -m benchmarks.kernels.generate

A checkpoint with random weights is written first. One prompt, greedy; the time is that of `generate`, host and all,
over the tokens that it made.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import measure, ours, qwen3, script
from benchmarks.kernels.measure import DTYPE, Ready, Work

PROMPT, TOKENS = 16, 32


def works(asked: argparse.Namespace) -> Iterator[Work]:
    """The one generation."""
    prompt, tokens = (5, 3) if asked.tiny else (PROMPT, TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        model = qwen3.model("0.6b", asked)
        model.save_pretrained(folder)
        ids = qwen3.token_ids(model, 1, prompt, asked)
        with torch.no_grad():
            exact = qwen3.in_float32(model)(ids).logits
        del model
        yield Work(
            name=f"generate {tokens} tokens, Qwen3-0.6B",
            shape={"prompt": prompt, "tokens": tokens},
            variants={
                "eager": lambda: _ready(_eager(Path(folder), asked), ids, tokens),
                "ours": lambda: _ours(Path(folder), asked, ids, tokens, layers=True),
                "ours, two kernels": lambda: _ours(Path(folder), asked, ids, tokens, layers=False),
            },
            reference=lambda: exact,
            units=tokens,
            with_host=True,
            repeats=None if asked.tiny else 5,
        )


def _eager(folder: Path, asked: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE, device_map=asked.device)


def _ready(model: Any, ids: torch.Tensor, tokens: int, says: dict[str, Any] | None = None) -> Ready:
    from kernelgraft import graft_of

    mask = torch.ones_like(ids)
    length = ids.shape[1] + tokens

    def generate() -> torch.Tensor:
        found: torch.Tensor = model.generate(
            ids, attention_mask=mask, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
        return found

    def outputs() -> torch.Tensor:
        if generate().shape[1] != length:
            raise measure.WrongError(f"generate gave other than {tokens} tokens")
        logits: torch.Tensor = model(ids).logits
        return logits

    return Ready(generate, outputs, graft=graft_of(model), says=says or {})


def _ours(folder: Path, asked: argparse.Namespace, ids: torch.Tensor, tokens: int, *, layers: bool) -> Ready:
    from kernelgraft import AutoModelForCausalLM, KernelConfig

    mapping = ours.mapping(layers=layers)
    if not layers and mapping == ours.mapping():
        raise measure.Skipped("kernelgraft.kernels has no DecoderLayer here, so this is the same as ours")
    config = KernelConfig(mapping, inherit_mapping=False)
    model = AutoModelForCausalLM.from_pretrained(folder, kernel_config=config, dtype=DTYPE, device_map=asked.device)
    return _ready(model, ids, tokens, {"kernels": ours.names(mapping)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    return script.main("generate", __doc__, works, arguments)


if __name__ == "__main__":
    sys.exit(main())
