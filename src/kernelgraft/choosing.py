"""Which kernels an entry of a config runs on a device, by mode; and in which modes the originals run instead."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kernelgraft.binding import Modes
from kernelgraft.entry import MISSING, Entry, Missing, Use, device_type, select
from kernelgraft.errors import PlanError
from kernelgraft.forwards import Mode
from kernelgraft.kernel import Kernel, load_kernel
from kernelgraft.plan import Rejected

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


@dataclass(frozen=True)
class Chosen:
    """What one entry runs on one device, the same at each of its places.

    Attributes:
        asked: The entry, and whether the originals may run.
        modes: Its kernels by mode; there is one at least.
        runs: What runs at a site of its own.
        kernels: The kernels, each once.
        number: The same for equal `modes`, and quicker to look up.
    """

    asked: Asked
    modes: Modes
    runs: Runs
    kernels: tuple[Kernel, ...]
    number: int


class Chooser:
    """The choices of one planning: an entry is asked once about each device, and a kernel is loaded once.

    Args:
        fallback: The config's.
        backend: As in `load_kernel`.
        rejected: Gets the places that are left as they are, with the reason.
    """

    def __init__(self, fallback: str, backend: str | None, rejected: list[Rejected]) -> None:
        self._fallback, self._backend, self._rejected = fallback, backend, rejected
        # By identity, as what a config names need not be hashable. Beside each answer stands what it is about, so that
        # no other object gets its identity.
        self._kernels: dict[int, tuple[Any, Kernel | Exception]] = {}
        self._modes: dict[tuple[int, torch.device], tuple[Entry, Modes | None]] = {}
        self._chosen: dict[tuple[int, bool, torch.device], tuple[Entry, Chosen]] = {}
        self._numbers: dict[Modes, int] = {}

    def modes(self, entry: Entry, device: torch.device) -> Modes | None:
        """The kernels that an entry runs on a device: see `choose_modes`."""
        key = (id(entry), device)
        if key not in self._modes:
            self._modes[key] = (entry, choose_modes(entry, device, self._load))
        return self._modes[key][1]

    def chosen(self, entry: Entry, device: torch.device, place: str, *, inherited: bool) -> Chosen | None:
        """What an entry runs on a device; `None` if the place is left as it is, which is noted.

        Raises:
            PlanError: The config has no kernel for the device, and allows no fallback.
        """
        optional = inherited or self._fallback == "reference"
        key = (id(entry), optional, device)
        if key in self._chosen:
            return self._chosen[key][1]
        modes = self.modes(entry, device)
        if modes:
            asked, kernels = Asked(entry, optional), tuple(dict.fromkeys(kernel for _, _, kernel in modes))
            number = self._numbers.setdefault(modes, len(self._numbers))
            self._chosen[key] = (entry, Chosen(asked, modes, runs_of([asked], [modes], device), kernels, number))
            return self._chosen[key][1]
        reason = "left alone, as the config says"
        if modes is not None:
            reason = f"the config has no kernel for {device_type(device)!r}"
            if not optional:
                raise PlanError(
                    f"{entry.label}: {reason}. Add an entry for {device_type(device)!r} ('' leaves the module alone), "
                    f'or pass KernelConfig(..., fallback="reference").'
                )
        self.leave(entry, place, reason)
        return None

    def leave(self, entry: Entry, place: str, reason: str) -> None:
        """Note that a place is left as it is."""
        self._rejected.append(Rejected(entry.label, place, reason))

    def _load(self, use: Any) -> Kernel:
        """Load a kernel once, also if that fails: a server that cannot be reached is not asked again for each site."""
        if id(use) not in self._kernels:
            try:
                self._kernels[id(use)] = (use, load_kernel(use, backend=self._backend))
            except Exception as error:
                self._kernels[id(use)] = (use, error)
        _, found = self._kernels[id(use)]
        if isinstance(found, Exception):
            raise found
        return found


def _use(entry: Entry, device: torch.device, mode: Mode) -> Use | Literal[Missing.MISSING]:
    training, compiling = mode
    use = select(entry, device, training=training, compiling=compiling)
    return select(entry, device, training=training) if use is MISSING and compiling else use
