"""What a load to CUDA devices reads while it is still found out what becomes of the rest.

A device's bus is the slowest part of a load, so reads begin as soon as they are sure: of what no kernel is asked for
before the plan is made, and of all else when it is, before the graft is put in.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from kernelgraft import compat
from kernelgraft.blueprint import PreparedSite
from kernelgraft.checkpoint.fill import begin, reserve_for
from kernelgraft.checkpoint.reader import Reading
from kernelgraft.tree import ancestors

AT_ONCE = 1 << 30
"""Bytes after which tensors are handed over to be read: to work out all that a model reads takes longer than a bus
should wait, and to hand each over by itself takes longer than to read it."""


class Ahead:
    """The early reads of one load.

    Args:
        model: The model, on the meta device.
        lazies: The lazy tensors that will be in it, by name.
        ready: Threads that wait for reads. Stop them before the files are closed, if it does not come to `materialize`.
    """

    def __init__(self, model: Any, lazies: Mapping[str, torch.Tensor], ready: Reading) -> None:
        self._lazies, self._ready = lazies, ready
        self._tied = compat.tied_weights(model)
        self._held_back: list[torch.Tensor] = []
        self._nbytes = 0
        reserve_for(lazies.values())

    def begin_free(self, claimed: Collection[str]) -> None:
        """Begin with all that is in no module at a path that is `claimed`, "" being the model."""
        self._take(name for name in self._lazies if not _is_within(name, claimed))
        self._hand_over()

    def begin_rest(self, sites: Iterable[PreparedSite]) -> None:
        """Begin with all else: the plan is made, and these are its sites."""
        made = [site for site in sites if site.made is not None]
        self.begin_free({path for site in made for path in site.site.paths})
        for site in made:
            self._take(site.kept())
            self._add(site.pack_early(self._lazies))
        self._hand_over()

    def _take(self, names: Iterable[str]) -> None:
        # What is tied to another tensor will not stay in the model.
        self._add(self._lazies[name] for name in names if name in self._lazies and name not in self._tied)

    def _add(self, lazies: Iterable[torch.Tensor]) -> None:
        for lazy in lazies:
            self._held_back.append(lazy)
            self._nbytes += lazy.numel() * lazy.dtype.itemsize
            if self._nbytes >= AT_ONCE:
                self._hand_over()

    def _hand_over(self) -> None:
        lazies, self._held_back, self._nbytes = self._held_back, [], 0
        begin(lazies, self._ready)


def _is_within(name: str, paths: Collection[str]) -> bool:
    """Whether a parameter is in a module at one of the paths, "" being the model."""
    return any(path in paths for path in (*ancestors(name), ""))
