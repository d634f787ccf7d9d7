"""Tensors of a checkpoint, and parameters made of them in every way that a lane to a device lays them out."""

import torch

NAMES = "abcd"


def tensors(rows, columns, num_small):
    """Four large ones and many small ones."""
    made = {name: torch.randn(rows, columns) for name in NAMES}
    return made | {f"small.{i}": torch.randn(7, 3) for i in range(num_small)}


def layouts(given):
    """As they are, joined, transposed, stacked, sliced, and stacked in another order; of tensors or of lazy ones."""
    rows, columns = given["a"].shape
    small = [given[name] for name in sorted(given) if name not in NAMES]
    return [
        given["a"],
        torch.cat([given["b"], given["c"]]),
        given["d"].t(),
        torch.stack(small, 1),
        given["a"][100 : rows - 100, 3 : columns - 100],
        torch.stack([given["b"], given["c"]], 1).transpose(0, 2),
    ]
