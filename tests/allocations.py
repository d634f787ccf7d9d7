"""What a block allocates on a real device, seen at torch's dispatcher, and which memory is a mapped file's."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Inside the block, notes every new storage that an operation gives: its size in bytes, and the operation.

    The tensors are held, so that no address is given out twice.
    """

    def __init__(self):
        super().__init__()
        self.found = {}
        self._held = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {storage.data_ptr() for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage.data_ptr() not in known and storage.nbytes():
                self.found.setdefault(storage.data_ptr(), (storage.nbytes(), str(func)))
                self._held.append(storage)
        return out

    def besides(self, tensors):
        """Those that are not the storages of `tensors`."""
        kept = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        return {address: what for address, what in self.found.items() if address not in kept}


def _storages(values):
    return [
        tensor.untyped_storage()
        for tensor in tree_leaves(values)
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type != "meta"
    ]


def in_file(tensor, file):
    """Whether a tensor's memory is that of a mapped file."""
    with open("/proc/self/maps") as maps:
        ranges = [line.split(maxsplit=5) for line in maps]
    ranges = [line[0].split("-") for line in ranges if len(line) == 6 and line[5].rstrip() == str(file)]
    return any(int(low, 16) <= tensor.data_ptr() < int(high, 16) for low, high in ranges)
