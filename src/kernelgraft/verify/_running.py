"""One call of a replica, and everything that can be seen of it: outputs, gradients, and what it did besides."""

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernelgraft.binding import ClassKey
from kernelgraft.errors import GraftError
from kernelgraft.forwards import run_originals
from kernelgraft.verify._calls import SiteCall
from kernelgraft.verify._replica import Replica
from kernelgraft.verify._values import copied, direct, named


@dataclass(frozen=True)
class How:
    """How a call is made.

    Attributes:
        kernel: Whether the kernel runs, or the originals.
        training: The mode of the modules.
        inputs: Names of the inputs whose gradients are asked for.
        weights: Whether the gradients of the parameters are.
        poisoned: Whether memory that the call asks for is full of NaN first.
        upstream: What is done to each upstream gradient; by default it is contiguous.
    """

    kernel: bool
    training: bool = False
    inputs: frozenset[str] = frozenset()
    weights: bool = False
    poisoned: bool = False
    upstream: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.contiguous

    @property
    def gradients(self) -> bool:
        """Whether any gradient is asked for."""
        return self.weights or bool(self.inputs)


@dataclass
class Ran:
    """What one call gave and did.

    Attributes:
        outputs: Tensors that came back, by name.
        gradients: Those that were asked for; `None` where none came.
        states: Buffers, and tensors that an object among the arguments holds (a cache), as they are afterwards.
        upstream: The gradient with which each output went back.
        changed: Inputs and weights that were written into, and how that showed.
        shares: Pairs `(output, what it shares memory with)`.
        refused: Why the kernel refused the call, or "".
        lost: Why the kernel's output has no gradient, or "".
    """

    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor | None] = field(default_factory=dict)
    states: dict[str, torch.Tensor] = field(default_factory=dict)
    upstream: dict[str, torch.Tensor] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    shares: set[tuple[str, str]] = field(default_factory=set)
    refused: str = ""
    lost: str = ""


class _Given(torch.autograd.Function):
    """Hands an input over as something that was computed: in its strides, and writable in place as activations are."""

    @staticmethod
    def forward(_: Any, leaf: torch.Tensor) -> torch.Tensor:
        return copied(leaf)

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def run(replica: Replica, call: SiteCall, how: How, upstream: Mapping[str, torch.Tensor], seed: int = 0) -> Ran:
    """Call a replica once.

    Args:
        replica: The site.
        call: Its arguments; they are not changed.
        how: How it is called.
        upstream: The gradients with which outputs go back; those that are missing are drawn.
        seed: For them, and for what the call itself draws.

    Returns:
        What came of it. What the call raises is raised, but for a refusal by the kernel.
    """
    replica.refresh(training=how.training, use_reference=not how.kernel)
    leaves: dict[str, torch.Tensor] = {}
    given: dict[str, torch.Tensor] = {}

    def hand_over(name: str, tensor: torch.Tensor) -> torch.Tensor:
        leaf = copied(tensor)
        if name in how.inputs:
            leaf.requires_grad_(True)
        leaves[name] = leaf
        given[name] = _Given.apply(leaf) if leaf.requires_grad else copied(leaf)  # type: ignore[no-untyped-call]
        return given[name]

    ran = Ran()
    weights = {name: reading.tensors for name, reading in replica.originals.items()}
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(how.gradients))
        for tensors in weights.values():
            for tensor in tensors:
                tensor.requires_grad_(how.weights and tensor.is_floating_point())
        played = call.rebuilt(hand_over)
        inputs = {name: given[name] for name in played.inputs()}
        versions = {name: tensor._version for name, tensor in inputs.items()}
        weight_versions = {name: [tensor._version for tensor in tensors] for name, tensors in weights.items()}
        if how.poisoned:
            stack.enter_context(poisoned())
        seeded(seed, next(iter(given.values()), torch.empty(0)).device)
        try:
            out = played.play(replica.members)
        except GraftError as error:
            declined = [site.declined for site in replica.sites if site.declined]
            ran.lost, ran.refused = (declined[0], "") if declined else ("", str(error).split(". Pass KernelConfig")[0])
            return ran
        outputs = dict(direct(out, "output"))
        if how.gradients:
            _go_back(ran, replica, outputs, leaves, how, upstream, seed)
    ran.outputs = {name: tensor.detach() for name, tensor in outputs.items()}
    ran.states = _states(replica, played)
    ran.changed = _changed(inputs, leaves, versions)
    for name, tensors in weights.items():
        if weight_versions[name] != [tensor._version for tensor in tensors]:
            ran.changed[name] = "its version counter"
    ran.shares = _shares(ran.outputs, inputs, weights)
    return ran


def _go_back(
    ran: Ran,
    replica: Replica,
    outputs: Mapping[str, torch.Tensor],
    leaves: Mapping[str, torch.Tensor],
    how: How,
    upstream: Mapping[str, torch.Tensor],
    seed: int,
) -> None:
    """The gradients of everything that was asked for."""
    ends = {name: tensor for name, tensor in outputs.items() if tensor.requires_grad}
    for index, (name, tensor) in enumerate(outputs.items()):
        if tensor.is_floating_point():
            ran.upstream[name] = upstream[name] if name in upstream else _drawn(tensor, seed + index)
    starts = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    packed = {id(t): t for reading in replica.originals.values() for t in reading.tensors if t.requires_grad}
    wanted = [*starts.values(), *packed.values()]
    found: list[torch.Tensor | None] = [None] * len(wanted)
    if ends and wanted:
        back = [how.upstream(ran.upstream[name].to(tensor.dtype)) for name, tensor in ends.items()]
        found = list(torch.autograd.grad(list(ends.values()), wanted, back, allow_unused=True))
    ran.gradients = {f"gradient of {name}": found[index] for index, name in enumerate(starts)}
    by_id = dict(zip(packed, found[len(starts) :], strict=True))
    for name, reading in replica.originals.items() if how.weights else ():
        parts = [by_id.get(id(tensor)) for tensor in reading.tensors]
        if parts and all(part is None for part in parts):
            ran.gradients[f"gradient of {name}"] = None
        elif parts:
            ran.gradients[f"gradient of {name}"] = reading.read(lambda t: _or_zeros(by_id.get(id(t)), t)).detach()


def _or_zeros(gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _drawn(like: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)


def _states(replica: Replica, call: SiteCall) -> dict[str, torch.Tensor]:
    found = {name: reading.read(torch.Tensor.detach).clone() for name, reading in replica.buffers.items()}
    inputs = call.inputs()
    for name, value in call.objects().items():
        found |= {inner: t.detach() for inner, t in named(value, name).items() if inner not in inputs}
    return found


def _changed(
    inputs: Mapping[str, torch.Tensor], leaves: Mapping[str, torch.Tensor], versions: Mapping[str, int]
) -> dict[str, str]:
    found = {}
    for name, tensor in inputs.items():
        if not _same_bits(tensor.detach(), leaves[name].detach()):
            found[name] = "its values"
        elif tensor._version != versions[name]:
            found[name] = "its version counter"
    return found


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if torch.equal(one, other):
        return True
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def _shares(
    outputs: Mapping[str, torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
    weights: Mapping[str, list[torch.Tensor]],
) -> set[tuple[str, str]]:
    holders = {_memory(tensor): name for name, tensors in weights.items() for tensor in tensors}
    holders |= {_memory(tensor): name for name, tensor in inputs.items()}
    holders.pop(0, None)
    return {(name, holders[_memory(t)]) for name, t in outputs.items() if _memory(t) in holders}


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.numel() else 0


# --- surroundings


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is asked for holds NaN, or the largest integer, until it is written.

    Torch does so for the sake of determinism, on every device; that an operation has no deterministic form is not said.
    """
    before = torch.get_deterministic_debug_mode(), torch._C._get_deterministic_fill_uninitialized_memory()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*determinis.*")
        try:
            torch._C._set_deterministic_fill_uninitialized_memory(True)
            torch.set_deterministic_debug_mode("warn")
            yield
        finally:
            torch.set_deterministic_debug_mode(before[0])
            torch._C._set_deterministic_fill_uninitialized_memory(before[1])


class InDouble(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, what code casts float64 down to (a norm computes in float32, say) is float64."""

    _NARROWER = (torch.float32, torch.bfloat16, torch.float16)

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_cast = kwargs.get("dtype") in self._NARROWER
        if is_cast and any(isinstance(each, torch.Tensor) and each.dtype == torch.float64 for each in args):
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def seeded(seed: int, device: torch.device) -> None:
    """The random state in which a call starts, on the CPU and on the device."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` looks at every accelerator there may be
    else:
        torch.manual_seed(seed)


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Inside, an autocast around it has no effect."""
    with torch.autocast(device.type, enabled=False):
        yield


class Entered:
    """How often the forward of an original was entered, told by Python itself."""

    def __init__(self, keys: Mapping[str, ClassKey]) -> None:
        own = {_code(kernel.forward_class.forward) for key in keys.values() for _, _, kernel in key.modes}  # type: ignore[union-attr]
        self.codes = {_code(key.original.forward) for key in keys.values() if key.role != "function"} - own - {None}
        self.count = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts inside the block, in this thread; not where somebody else profiles it, whose place this would take."""
        if sys.getprofile() is not None:
            yield
            return

        def note(frame: FrameType, event: str, _: object) -> None:
            if event == "call" and frame.f_code in self.codes and not _is_asked_by_the_graft(frame):
                self.count += 1

        sys.setprofile(note)
        try:
            yield
        finally:
            sys.setprofile(None)


def _is_asked_by_the_graft(frame: FrameType) -> bool:
    """Whether it is no kernel that calls: a graft asks the originals whether an output should have a gradient."""
    caller = frame.f_back
    while caller is not None and caller.f_code is not run_originals.__code__:
        caller = caller.f_back
    return caller is not None


def _code(function: Any) -> CodeType | None:
    return getattr(inspect.unwrap(function), "__code__", None)
