"""A whole Qwen3 that decodes one token at a time, compiled with CUDA graphs: with the graft over without it.

    PYTHONPATH=src python -m benchmarks.kernels.compiled_decode --sizes 0.6b
    PYTHONPATH=src python -m benchmarks.kernels.compiled_decode --sizes 8b

`torch.compile(mode="reduce-overhead")` and a static cache, batch 1, greedy. The time is that of the host around a run
of tokens, over their number. To compile takes a minute or two for each variant and size, hence `--sizes`.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.kernels import measure, ours, qwen3, script
from benchmarks.kernels.measure import Ready, Work, compiled

PROMPT, TOKENS, ROOM = 128, 64, 512


def works(asked: argparse.Namespace) -> Iterator[Work]:
    """Each size."""
    for size in asked.sizes:
        yield _work(asked, size)


def _work(asked: argparse.Namespace, size: str) -> Work:
    prompt, tokens, room = (5, 3, 12) if asked.tiny else (PROMPT, TOKENS, ROOM)
    model = qwen3.model(size, asked)
    ids = qwen3.token_ids(model, 1, prompt, asked)
    exact = _exact(model, ids)
    # Every weight is read once for a token; of tied embeddings, the head reads what the embedding has only rows of.
    weights = qwen3.num_bytes(list(model.parameters()))
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        weights -= model.model.embed_tokens.weight.nbytes

    def ready(of: Any, graft: Any = None, says: dict[str, Any] | None = None) -> Ready:
        decoding = qwen3.StaticDecoding(of, ids, room)
        first = decoding.logits.argmax(-1)

        def one(token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = decoding.run(token).logits[:, -1:]
            return logits.argmax(-1), logits

        step = compiled(one, asked, mode="reduce-overhead")
        begin = torch.compiler.cudagraph_mark_step_begin if asked.device == "cuda" else lambda: None

        def call() -> torch.Tensor:
            token = first
            for _ in range(tokens):
                begin()
                token, logits = step(token)
                # The next step writes over what this one gave.
                token = token.clone()
            return logits.clone()

        def outputs() -> list[torch.Tensor]:
            begin()
            logits = step(ids[:, -1:])[1].clone()
            return [decoding.logits, logits]

        return Ready(call, outputs, decoding.rewind, graft, says or {})

    def grafted(layers: bool) -> Ready:
        mapping = ours.mapping(layers=layers)
        if not layers and mapping == ours.mapping():
            raise measure.Skipped("kernelgraft.kernels has no DecoderLayer here, so this is the same as ours")
        return ready(*ours.grafted(model, mapping), {"kernels": ours.names(mapping)})

    return Work(
        name=f"compiled decode, Qwen3-{size}",
        shape={"prompt": prompt, "tokens": tokens, "room": room},
        variants={
            "eager": lambda: ready(model),
            "ours": lambda: grafted(True),
            "ours, two kernels": lambda: grafted(False),
        },
        reference=lambda: exact,
        bytes=weights,
        units=tokens,
        with_host=True,
        repeats=None if asked.tiny else 10,
    )


def _exact(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """The logits after the prompt, and those after its last token once more."""
    with torch.no_grad():
        logits = qwen3.in_float32(model)(torch.cat([ids, ids[:, -1:]], dim=1)).logits
    return [logits[:, -2:-1], logits[:, -1:]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    made = script.parser(__doc__)
    made.add_argument("--sizes", nargs="+", choices=("0.6b", "8b"), default=["0.6b", "8b"])
    return script.main("compiled_decode", __doc__, works, arguments, made)


if __name__ == "__main__":
    sys.exit(main())
