"""A checkpoint's tensors in blocks: those whose names differ from others' in one number alone, as layers do."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kernelgraft.checkpoint.files import FileTensor

Block = Mapping[str, FileTensor]
"""The tensors of one block by the rest of their names, "mlp.up_proj.weight"."""

_INDEX = re.compile(r"\.(?:0|[1-9][0-9]*)\.")
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")


@dataclass(frozen=True)
class Blocks:
    """All tensors of a checkpoint.

    Attributes:
        blocks: The blocks by what their names begin with, "model.layers.3.".
        kinds: Heads of blocks that are alike: the same tensors, and in front of the number the same name.
        single: Tensors that are in none.
    """

    blocks: dict[str, dict[str, FileTensor]]
    kinds: list[list[str]]
    single: dict[str, FileTensor]


def blocks_of(tensors: Mapping[str, FileTensor]) -> Blocks:
    """Sort a checkpoint's tensors into blocks by the first number in their names, and blocks into kinds."""
    blocks: dict[str, dict[str, FileTensor]] = {}
    single: dict[str, FileTensor] = {}
    head, size, block = "\0", 1, single
    for name, tensor in tensors.items():
        if not name.startswith(head):  # most often the tensor before was of the same block
            found = _INDEX.search(name)
            if found is None:
                single[name] = tensor
                continue
            size = found.end()
            head = name[:size]
            block = blocks.setdefault(head, {})
        block[name[size:]] = tensor
    return Blocks(blocks, _kinds(blocks), single)


def _kinds(blocks: Mapping[str, Block]) -> list[list[str]]:
    kinds: list[list[str]] = []
    known: dict[tuple[str, int], list[list[str]]] = {}
    for head, block in blocks.items():
        mine = known.setdefault((head[: head.rindex(".", 0, -1)], len(block)), [])
        for kind in mine:
            if _alike(block, blocks[kind[0]]):
                kind.append(head)
                break
        else:
            mine.append([head])
            kinds.append(mine[-1])
    return kinds


def _alike(block: Block, other: Block) -> bool:
    for rest, tensor in block.items():
        found = other.get(rest)
        if found is None or found.entry[1:3] != tensor.entry[1:3]:  # kind and shape
            return False
    return True


def one_of_each(rests: Iterable[str]) -> list[str]:
    """Of names that differ in numbers alone, one. The digit in 'fc1' is no number."""
    return list({_NUMBER.sub("#", rest): rest for rest in rests}.values())
