"""Checkpoints with random weights in the shapes of real models, written as files without building a model.

The names, the split into shards and the place of each tensor in its file are those that Transformers writes. Values are
random bits that are normal bfloat16 numbers of weight-like size (2^-9 to 2^-5): what is loaded is never zeros, which
could hide an unwritten output, and no two stretches of 64 MB are alike.
"""

import json
import os
import random
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any

Shapes = dict[str, tuple[int, ...]]

GB = 10**9
DONE = "complete.json"
INDEX = "model.safetensors.index.json"
BYTES = 2  # of one bfloat16
BLOCK = 64 << 20
# An odd number of elements, so that every stretch of a file starts at another place of the block.
ROTATION = 1_000_003 * BYTES

COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "use_cache": True,
}


@dataclass(frozen=True)
class Model:
    """A checkpoint to be.

    Attributes:
        name: The name of its folder.
        config: What stands in `config.json`.
        shard_bytes: The most bytes of tensors in one file.
    """

    name: str
    config: Mapping[str, Any]
    shard_bytes: int = 5 * GB

    @cached_property
    def tensors(self) -> Shapes:
        """Every tensor's shape by name, in the order in which Transformers saves them: numbers in names as numbers."""
        return dict(sorted(_named(self.config), key=lambda item: _natural(item[0])))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(prod(shape) * BYTES for shape in self.tensors.values())

    def merged(self, name: str) -> bool:
        """Whether a kernel of `merged.py` keeps this tensor as a part of another one."""
        return name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight"))

    def files(self, folder: Path) -> list[Path]:
        """The safetensors files of the checkpoint under `folder`."""
        return sorted((folder / self.name).glob("*.safetensors"))


def qwen3(name: str, **config: Any) -> Model:
    """A dense Qwen3."""
    return Model(name, {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **COMMON, **config})


def qwen3_moe(name: str, shard_bytes: int = 5 * GB, **config: Any) -> Model:
    """A Qwen3 whose every layer has experts, one tensor per expert and projection."""
    fixed = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "num_experts_per_tok": 8}
    head = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    return Model(name, {**head, **COMMON, **fixed, **config}, shard_bytes)


def _sizes(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, *, vocab: int = 151936, head_dim: int = 128
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
    }


_TINY = _sizes(32, 48, 2, 4, 2, vocab=64, head_dim=8)

LARGE = {
    "8b": qwen3("qwen3-8b", **_sizes(4096, 12288, 36, 32, 8)),
    "dense": qwen3("qwen3-1.7b", **{**_sizes(2048, 6144, 28, 16, 8), "tie_word_embeddings": True}),
    # 3,072 expert tensors of 1 MB, nearly all of 3.4 GB.
    "moe": qwen3_moe(
        "qwen3-moe", **_sizes(1024, 3072, 8, 16, 4, vocab=32768), moe_intermediate_size=512, num_experts=128
    ),
    # 100,428 tensors.
    "many": qwen3_moe(
        "qwen3-many",
        400_000,
        **_sizes(8, 8, 65, 1, 1, vocab=64, head_dim=8),
        moe_intermediate_size=1,
        num_experts=512,
    ),
    "tiny": qwen3("qwen3-tiny", **_TINY),
}
"""The models of the table, by the key that a case names."""

SMALL = {
    "8b": Model("small-8b", qwen3("", **_TINY).config, 20_000),
    "dense": qwen3("small-dense", **{**_TINY, "tie_word_embeddings": True}),
    "moe": qwen3_moe("small-moe", **_TINY, moe_intermediate_size=24, num_experts=8),
    "many": qwen3_moe(
        "small-many", 2_000, **_sizes(8, 8, 2, 1, 1, vocab=64, head_dim=8), moe_intermediate_size=1, num_experts=16
    ),
    "tiny": qwen3("small-tiny", **_TINY),
}
"""The same in sizes for a trial of the program."""


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _named(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, vocab, head_dim = config["hidden_size"], config["vocab_size"], config["head_dim"]
    query, key = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        yield f"{path}.self_attn.q_proj.weight", (query, hidden)
        yield f"{path}.self_attn.k_proj.weight", (key, hidden)
        yield f"{path}.self_attn.v_proj.weight", (key, hidden)
        yield f"{path}.self_attn.o_proj.weight", (hidden, query)
        yield f"{path}.self_attn.q_norm.weight", (head_dim,)
        yield f"{path}.self_attn.k_norm.weight", (head_dim,)
        if "num_experts" in config:
            yield f"{path}.mlp.gate.weight", (config["num_experts"], hidden)
            for expert in range(config["num_experts"]):
                yield from _mlp(f"{path}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"])
        else:
            yield from _mlp(f"{path}.mlp", hidden, config["intermediate_size"])
        yield f"{path}.input_layernorm.weight", (hidden,)
        yield f"{path}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)


def _mlp(path: str, hidden: int, intermediate: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{path}.gate_proj.weight", (intermediate, hidden)
    yield f"{path}.up_proj.weight", (intermediate, hidden)
    yield f"{path}.down_proj.weight", (hidden, intermediate)


def shards(model: Model) -> list[Shapes]:
    """The tensors of each file: filled in order, a new one where the next does not fit."""
    found: list[Shapes] = [{}]
    room = model.shard_bytes
    for name, shape in model.tensors.items():
        nbytes = prod(shape) * BYTES
        if nbytes > room and found[-1]:
            found.append({})
            room = model.shard_bytes
        found[-1][name] = shape
        room -= nbytes
    return found


def header(tensors: Shapes) -> tuple[bytes, int]:
    """A safetensors file's header, and the bytes of data behind it. Within one dtype a file is in order of names."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        start, end = end, end + prod(tensors[name]) * BYTES
        entries[name] = {"dtype": "BF16", "shape": list(tensors[name]), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def write(model: Model, folder: Path, num_threads: int) -> Path:
    """Write a checkpoint under `folder`, unless it is there already: its own folder.

    The files are synced, so that no write goes on while something is measured.
    """
    place = folder / model.name
    recipe = {"config": dict(model.config), "shard_bytes": model.shard_bytes}
    if (place / DONE).exists() and json.loads((place / DONE).read_text()) == recipe:
        return place
    place.mkdir(parents=True, exist_ok=True)
    for old in place.iterdir():
        old.unlink()
    (place / "config.json").write_text(json.dumps(model.config, indent=2))
    parts = shards(model)
    names = [f"model-{index + 1:05}-of-{len(parts):05}.safetensors" for index in range(len(parts))]
    if len(parts) == 1:
        names = ["model.safetensors"]
    else:
        index = {
            "metadata": {"total_parameters": model.nbytes // BYTES, "total_size": model.nbytes},
            "weight_map": {name: file for file, part in zip(names, parts, strict=True) for name in part},
        }
        (place / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    block = _block()
    with ThreadPoolExecutor(num_threads) as pool:
        jobs = []
        for number, (name, part) in enumerate(zip(names, parts, strict=True)):
            head, size = header(part)
            with (place / name).open("wb") as file:
                file.write(head)
                file.truncate(len(head) + size)
            for offset in range(0, size, BLOCK):
                rotation = (number * 1009 + offset // BLOCK) * ROTATION % BLOCK
                length = min(BLOCK, size - offset)
                jobs.append(pool.submit(_write_piece, place / name, len(head) + offset, length, block, rotation))
        for job in jobs:
            job.result()
    for name in names:
        with (place / name).open("rb") as file:
            os.fsync(file.fileno())
    (place / DONE).write_text(json.dumps(recipe))
    return place


@cache
def _block() -> memoryview:
    """Random bfloat16 numbers: a random low byte, and one of four high bytes."""
    source = random.Random(0)
    high = source.randbytes(BLOCK // BYTES).translate(bytes([0x3B, 0x3C, 0xBB, 0xBC] * 64))
    block = bytearray(BLOCK)
    block[0::BYTES] = source.randbytes(BLOCK // BYTES)
    block[1::BYTES] = high
    return memoryview(block)


def _write_piece(path: Path, offset: int, length: int, block: memoryview, rotation: int) -> None:
    pieces = [block[rotation:], block[:rotation]]
    pieces = [pieces[0][:length], pieces[1][: max(0, length - len(pieces[0]))]]
    descriptor = os.open(path, os.O_WRONLY)
    try:
        while length:
            written = os.pwritev(descriptor, [piece for piece in pieces if len(piece)], offset)
            offset, length = offset + written, length - written
            first = pieces[0][written:]
            pieces = [first, pieces[1][max(0, written - len(pieces[0])) :]]
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie: `offset` counts from the start of `file`."""

    file: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]


def places(files: list[Path]) -> dict[str, Place]:
    """Where each tensor of safetensors files lies, in the order of files and offsets."""
    found: dict[str, Place] = {}
    for file in files:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            entries = json.loads(handle.read(length))
        entries.pop("__metadata__", None)
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            found[name] = Place(file, 8 + length + start, end - start, tuple(entry["shape"]))
    return found
