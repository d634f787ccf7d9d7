"""A decoder layer of Qwen3: one token in a CUDA graph by the share of its bandwidth floor, and a long prefill.

    PYTHONPATH=src python -m benchmarks.kernels.decoder_layer

The calls are those that the model itself makes of its layers. A graph goes through several layers, one after another,
each with its own weights and cache, so that none is in the L2 cache already.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.kernels import ours, qwen3, script
from benchmarks.kernels.measure import Ready, Work, compiled

CONTEXT = 512
COPIES = {"0.6b": 8, "8b": 4}
"""Layers in a graph: 250 MB and 1.5 GB of weights, four times an H200's L2 at least."""

PREFILL = (4, 2048)

MakeReady = Callable[[Any, Any, bool], Ready]
"""From a model, its graft, and whether to compile its layers."""


def works(asked: argparse.Namespace) -> Iterator[Work]:
    """Decoding in both sizes, then the prefill."""
    for size in ("0.6b",) if asked.tiny else COPIES:
        yield _decode(asked, size)
    yield _prefill(asked, "8b")


def _decode(asked: argparse.Namespace, size: str) -> Work:
    context = 8 if asked.tiny else CONTEXT
    copies = 2 if asked.tiny else COPIES[size]
    model = qwen3.model(size, asked, num_hidden_layers=copies, vocab_size=64)
    ids = qwen3.token_ids(model, 1, context, asked)

    def ready(of: Any, graft: Any, compiles: bool) -> Ready:
        decoding = qwen3.StaticDecoding(of, ids[:, :-1], context)
        calls = qwen3.layer_calls(of, lambda: decoding.run(ids[:, -1:]))
        made = [compiled(each, asked) if compiles else each for each in calls]
        return Ready(lambda: [each() for each in made], before=decoding.rewind, graft=graft)

    config = model.config
    cached = 2 * config.num_key_value_heads * config.head_dim * context * 2
    weights = qwen3.num_bytes(list(model.model.layers[0].parameters()))
    return Work(
        name=f"decode, Qwen3-{size}, context {context}",
        shape={"tokens": 1, "context": context, "hidden_size": config.hidden_size, "copies": copies},
        variants=_variants(model, ready),
        reference=lambda: _exact(model, ready),
        bytes=weights + cached,
        units=copies,
        graph=True,
        reads=True,
    )


def _prefill(asked: argparse.Namespace, size: str) -> Work:
    batch, length = (2, 6) if asked.tiny else PREFILL
    model = qwen3.model(size, asked, num_hidden_layers=1, vocab_size=64)
    ids = qwen3.token_ids(model, batch, length, asked)

    def ready(of: Any, graft: Any, compiles: bool) -> Ready:
        (call,) = qwen3.layer_calls(of, lambda: of(ids, use_cache=False))
        return Ready(compiled(call, asked) if compiles else call, graft=graft)

    config = model.config
    matrices = sum(each.numel() for each in model.model.layers[0].parameters() if each.ndim == 2)
    attended = 2 * batch * length * (length + 1) // 2 * config.num_attention_heads * config.head_dim * 2
    return Work(
        name=f"prefill {batch}x{length}, Qwen3-{size}",
        shape={"batch": batch, "length": length, "hidden_size": config.hidden_size},
        variants=_variants(model, ready),
        reference=lambda: _exact(model, ready),
        operations=2 * matrices * batch * length + attended,
    )


def _exact(model: Any, ready: MakeReady) -> Any:
    made = ready(qwen3.in_float32(model), None, False)
    made.before()
    return made.call()


def _variants(model: Any, ready: MakeReady) -> Mapping[str, Callable[[], Ready]]:
    def grafted(mapping: Callable[[], Mapping[Any, str]]) -> Ready:
        return ready(*ours.grafted(model, mapping()), False)

    return {
        "eager": lambda: ready(model, None, False),
        "compile": lambda: ready(model, None, True),
        "ours": lambda: grafted(lambda: {"DecoderLayer": ours.reference("DecoderLayer")}),
        "ours, two kernels": lambda: grafted(
            lambda: {
                ours.ATTENTION: ours.reference("RMSNormAttention"),
                ours.MLP: ours.reference("RMSNormMLP"),
            }
        ),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    return script.main("decoder_layer", __doc__, works, arguments)


if __name__ == "__main__":
    sys.exit(main())
