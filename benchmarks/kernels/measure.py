"""What the benchmarks of the kernels share: variants checked against float32, then timed in turn, and written as rows.

A script of a row makes `Work`s: the variants of one computation, each by a function that makes it ready, and what they
are checked against. A variant that is not installed, fails or is wrong has a row that says so, and no time.
"""

import argparse
import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kernelgraft.benchmark import _clock

DTYPE = torch.bfloat16

WARMUP = 3
YARDSTICK = "eager"
"""The variant whose own error says how far others may be off."""

REFERENCE = "float32"
"""What a row of a failed reference calls it."""

FAR = 0.1
"""The most that the yardstick may be off from float32, relatively: through 36 layers bfloat16 is off by percents."""

Row = dict[str, Any]


class Skipped(Exception):
    """A variant cannot run here, and the message says why."""


class WrongError(Exception):
    """A variant does not compute what it should: its time says nothing."""


class Clock(_clock.Clock):
    """The clock of `kernelgraft.benchmark`, which can leave the L2 cache without anything to write back.

    The buffer that is written before a call leaves as much in the cache as that holds, and it goes to memory while the
    call runs. A call that writes as much itself leaves its own there in turn, and the two cancel, as in the copy that
    shows the bandwidth. To one that only reads, 302 MB of weights say, it would add a sixth.

    Attributes:
        clean: Whether another buffer is read before a call, after the one that is written.
    """

    clean = False

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._read = torch.zeros_like(self._written).view(torch.int64) if self.is_cuda else self._written

    def close(self) -> None:
        """Give the buffers back."""
        super().close()
        self._read = self._written

    def _between_events(self, call: Callable[[], Any]) -> float:
        if self.clean:
            self._read.amax()
        return super()._between_events(call)


@contextlib.contextmanager
def clock_on(device: torch.device) -> Iterator[Clock]:
    """A clock, whose memory is free again afterwards."""
    clock = Clock(device)
    try:
        yield clock
    finally:
        clock.close()


@dataclass(frozen=True)
class Ready:
    """A variant that can be called.

    Attributes:
        call: What is timed.
        outputs: What is compared with the reference; by default what `call` returns.
        before: Runs before each call and is not timed.
        graft: The graft of a model that is called; its kernels must have run.
        says: What the row says beside its time.
        keeps: What has to live as long as it is called.
    """

    call: Callable[[], Any]
    outputs: Callable[[], Any] | None = None
    before: Callable[[], None] = lambda: None
    graft: Any = None
    says: Mapping[str, Any] = field(default_factory=dict)
    keeps: Any = None


@dataclass(frozen=True)
class Work:
    """One computation.

    Attributes:
        name: What the table calls it.
        shape: Its sizes.
        variants: What makes each variant ready. It may raise `Skipped`.
        reference: The outputs in float32.
        bytes: What one unit has to move: inputs, weights and outputs, each once.
        operations: Multiplications and additions of one unit.
        units: How often a call does the work: copies in a graph, tokens of a generation.
        graph: Whether calls are captured in a CUDA graph whose replays are timed.
        with_host: Whether what the host takes to launch counts.
        gradients: Whether autograd records.
        reads: Whether it writes next to nothing, see `Clock`.
        repeats: Rounds, if not as many as are asked for.
    """

    name: str
    shape: Mapping[str, int]
    variants: Mapping[str, Callable[[], Ready]]
    reference: Callable[[], Any]
    bytes: int = 0
    operations: int = 0
    units: int = 1
    graph: bool = False
    with_host: bool = False
    gradients: bool = False
    reads: bool = False
    repeats: int | None = None


def tensors(found: Any) -> list[torch.Tensor]:
    """The floating tensors of a call's outcome, in order."""
    if isinstance(found, torch.Tensor):
        return [found] if found.is_floating_point() else []
    if isinstance(found, Mapping):
        return tensors(list(found.values()))
    return [each for part in found for each in tensors(part)] if isinstance(found, list | tuple) else []


def distance(found: Any, exact: Any) -> float:
    """The largest relative error of the tensors, by their norms; not a number where any is."""
    pairs = list(zip(tensors(found), tensors(exact), strict=True))
    if not pairs:
        raise WrongError("there is nothing to compare")
    errors = []
    for one, other in pairs:
        if one.shape != other.shape:
            raise WrongError(f"the shape is {tuple(one.shape)}, and not {tuple(other.shape)}")
        other = other.float()
        norm = torch.linalg.vector_norm(other)
        errors.append(torch.linalg.vector_norm(one.to(other) - other) / norm)
    return float(torch.stack([error.cpu() for error in errors]).max())  # of torch, so that NaN stays


def checked(ready: Ready, exact: Any, allowed: float) -> float:
    """How far a variant is off from float32.

    Raises:
        WrongError: It is further off than is allowed, or a graft's kernels did not run.
    """
    ready.before()
    error = distance((ready.outputs or ready.call)(), exact)
    if not error <= allowed:
        raise WrongError(f"the relative error is {error:.2g}, and {allowed:.2g} at most would be rounding")
    if ready.graft is not None and (not ready.graft.calls.kernel or ready.graft.calls.reference):
        raise WrongError(f"not the kernels ran: {ready.graft.calls}")
    return error


def allowed(name: str, yardstick: float) -> float:
    """How far a variant may be off, if bfloat16 explains as much as the yardstick's error."""
    return FAR if name == YARDSTICK else 2 * yardstick + torch.finfo(DTYPE).eps / 4


def profiled(ready: Ready, device: torch.device) -> str:
    """Where the time of a variant goes, in one call after others."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    for _ in range(WARMUP):
        ready.before()
        ready.call()
    ready.before()
    activities = {torch.profiler.ProfilerActivity.CPU, getattr(torch.profiler.ProfilerActivity, kind.upper())}
    with torch.profiler.profile(activities=activities) as profile:
        ready.call()
        if kind == "cuda":
            torch.cuda.synchronize()
    found: str = profile.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=16, max_name_column_width=70)
    return found


def device_us(call: Callable[[], Any], device: torch.device) -> float | None:
    """What the kernels and copies of a call take on a GPU together, in microseconds; none on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize(device)
    return float(sum(each.self_device_time_total for each in profile.key_averages()))


def compiled(what: Any, asked: argparse.Namespace, **options: Any) -> Any:
    """`torch.compile` of a function or module for these shapes; in a trial without the code generator."""
    if asked.tiny:
        options = {"backend": "eager"}
    return torch.compile(what, fullgraph=True, dynamic=False, **options)


def compiling() -> contextlib.ExitStack:
    """What `torch.compile` has to be told for a benchmark, until the stack is closed."""
    import torch._dynamo.config
    import torch._functorch.config

    stack = contextlib.ExitStack()
    # A backward here is called again and again, so it may not give up what it was handed.
    stack.enter_context(torch._functorch.config.patch(donated_buffer=False))
    # Layers of one model are compiled one by one, each for its own index.
    stack.enter_context(torch._dynamo.config.patch(recompile_limit=64))
    return stack


def need(module: str, package: str, asked: argparse.Namespace) -> None:
    """Skip a variant unless a package is there, and a GPU for it.

    Raises:
        Skipped: It cannot run here.
    """
    if importlib.util.find_spec(module) is None:
        raise Skipped(f"{package} is not installed")
    if asked.device != "cuda":
        raise Skipped(f"{package} needs a GPU")


def graphed(ready: Ready) -> tuple[Callable[[], Any], Any]:
    """A call captured in a CUDA graph: its replay, and what each replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            ready.before()
            ready.call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ready.call()
    return graph.replay, out


def make_ready(work: Work, name: str, device: torch.device) -> Ready:
    """A variant that can be called: where the work says so, the replay of a CUDA graph."""
    ready = work.variants[name]()
    if not work.graph or device.type != "cuda":
        return ready
    replay, out = graphed(ready)

    def outputs() -> Any:
        replay()
        return out

    # The weights that the graph reads are kept alive by the call that was captured.
    return Ready(replay, outputs, ready.before, ready.graft, ready.says, keeps=ready.call)
