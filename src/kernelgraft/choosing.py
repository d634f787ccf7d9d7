"""Which kernels an entry of a config runs on a device, by mode; and in which modes the originals run instead."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kernelgraft.binding import Mode, Modes
from kernelgraft.entry import MISSING, Entry, Missing, Use, select
from kernelgraft.kernel import Kernel

MODES: tuple[Mode, ...] = ((False, False), (True, False), (False, True), (True, True))
"""`(training, compiling)`, in the order in which they are looked at."""


@dataclass(frozen=True)
class Asked:
    """An entry that asks for a kernel, and whether the originals may run where there is none.

    They may under `fallback="reference"`, and for what a default table offers and the user did not name.
    """

    entry: Entry
    optional: bool


@dataclass(frozen=True)
class Runs:
    """What runs at one site on one device.

    Attributes:
        kernels: The kernels by mode, of each entry of the site.
        modes: The modes in which they run.
        originals: The modes in which the originals run, because the config says so or allows it.
    """

    kernels: tuple[Modes, ...]
    modes: frozenset[Mode]
    originals: frozenset[Mode]


def choose_modes(entry: Entry, device: torch.device, load: Callable[[Any], Kernel]) -> Modes | None:
    """The kernels that an entry runs on a device, by mode; `None` if it leaves the module alone there.

    A kernel without a backward is left out of training. Where the config says nothing about torch.compile, the eager
    mode's kernel is traced.
    """
    uses = {mode: _use(entry, device, mode) for mode in MODES}
    found: list[tuple[bool, bool, Kernel]] = []
    for (training, compiling), use in uses.items():
        if use is not None and use is not MISSING:
            kernel = load(use)
            if kernel.has_backward or not training:
                found.append((training, compiling, kernel))
    return None if None in uses.values() and not found else tuple(found)


def runs_of(asked: Sequence[Asked], kernels: Sequence[Modes], device: torch.device) -> Runs:
    """What runs at a site that has one entry, or several: one for each function that a forward calls.

    A mode in which only some of them have a kernel runs those, if the others may stay what they are.
    """
    by_entry: list[set[Mode]] = [{(training, compiling) for training, compiling, _ in modes} for modes in kernels]
    allowed = [
        modes | {mode for mode in MODES if each.optional or _use(each.entry, device, mode) is None}
        for each, modes in zip(asked, by_entry, strict=True)
    ]
    everywhere = set(MODES).intersection(*allowed)
    runs = everywhere.intersection(mode for modes in by_entry for mode in modes)
    return Runs(tuple(kernels), frozenset(runs), frozenset(everywhere - runs))


def _use(entry: Entry, device: torch.device, mode: Mode) -> Use | Literal[Missing.MISSING]:
    training, compiling = mode
    use = select(entry, device, training=training, compiling=compiling)
    return select(entry, device, training=training) if use is MISSING and compiling else use
