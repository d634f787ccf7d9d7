"""Launches whose kernel is looked up in a few microseconds, where Triton's own way takes the host some 20.

At each call Triton looks at every argument for what a kernel is compiled for: types, ones, multiples of 16. Where the
numbers and constants of a launch are given once, only the pointers are left to look at.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from . import device

VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")
"""The versions of Triton of which more is known here than what it documents."""

try:
    import triton

    _KNOWN = not device.INTERPRETED and triton.__version__.startswith(VERSIONS)
except ImportError:
    triton = None
    _KNOWN = False

REMEMBERED = 1024
"""Launches that each `functools.lru_cache` of them keeps."""


class Launch:
    """A launch of a kernel that is given pointers, and nothing else, at each call.

    The first call with some dtypes and alignments on a device goes through Triton, which compiles the kernel; what it
    compiled is then run at once, as Triton's `JITFunction.run` runs it. It stays with Triton where somebody looks on
    (hooks of launches or of the kernel), where the kernel is interpreted, and where it is not known how a kernel is
    run: in another version of Triton and on devices that are not Nvidia's. What Triton reads from its environment
    (debugging, instrumentation) counts at the first call.
    """

    __slots__ = ("_compiled", "_grid", "_kernel", "_options", "_values")

    def __init__(self, kernel: Any, grid: tuple[int, ...], values: tuple[Any, ...], **options: Any) -> None:
        """Nothing is launched yet.

        Args:
            kernel: What `triton.jit` made. Its pointers come before all its other parameters.
            grid: Its programs along up to three dimensions.
            values: Every other argument, constants too, by position.
            options: `num_warps` and the like.
        """
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._values = values
        self._options = options
        self._compiled: dict[Any, tuple[Any, ...]] = {}

    def __call__(self, *pointers: torch.Tensor) -> None:
        """Launch it on the pointers' device and its current stream."""
        if device.elsewhere(pointers[0]):
            with torch.cuda.device_of(pointers[0]):
                self._launch(pointers)
        else:
            self._launch(pointers)

    def _launch(self, pointers: tuple[torch.Tensor, ...]) -> None:
        if not (_KNOWN and device.in_triton(pointers[0])):
            self._in_triton(pointers)
            return
        driver = triton.runtime.driver.active
        index = driver.get_current_device()
        bits = 0
        key: list[Any] = [index]
        for pointer in pointers:
            bits |= pointer.data_ptr()
            key.append(pointer.dtype)
        # Nearly always all are aligned; which one is not makes another kernel.
        key.append(bits % 16 and tuple([pointer.data_ptr() % 16 == 0 for pointer in pointers]))
        known = tuple(key)
        compiled = self._compiled.get(known)
        if compiled is None or not bits or _watched(self._kernel):  # on meta there are no addresses
            made = self._in_triton(pointers)
            if compiled is None and _is_cuda(made):
                self._compiled[known] = (made.run, made.function, made.packed_metadata)
            return
        run, function, metadata = compiled
        stream = driver.get_current_stream(index)
        run(*self._grid, stream, function, metadata, None, None, None, *self._arguments(pointers), *self._values)

    def _in_triton(self, pointers: tuple[torch.Tensor, ...]) -> Any:
        args = (*self._arguments(pointers), *self._values)
        return _run_or_load(self._kernel, self._grid, args, self._options, pointers[0].is_meta)

    def _arguments(self, pointers: tuple[torch.Tensor, ...]) -> Iterable[Any]:
        return pointers


class _At:
    """An address in the place of a tensor, for a descriptor that is kept and must not keep the tensor."""

    __slots__ = ("_address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self._address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self._address


class DescribedLaunch(Launch):
    """A launch of a kernel that takes a descriptor of each tensor, made once for each address."""

    __slots__ = ("_describe",)

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], values: tuple[Any, ...], describe: Callable[[int, Any], Any],
        **options: Any,
    ) -> None:  # fmt: skip
        """As for a `Launch`, and a function that gives the descriptor of which pointer, for what has its address."""
        super().__init__(kernel, grid, values, **options)

        @functools.lru_cache(REMEMBERED)
        def described(which: int, address: int, dtype: torch.dtype) -> Any:
            return describe(which, _At(address, dtype))

        self._describe = described

    def _arguments(self, pointers: tuple[torch.Tensor, ...]) -> Iterable[Any]:
        return [self._describe(which, each.data_ptr(), each.dtype) for which, each in enumerate(pointers)]


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel by Triton's own way, on the device of its first argument and its current stream."""
    with torch.cuda.device_of(args[0]):
        _run_or_load(kernel, grid, args, options, args[0].is_meta)


def _run_or_load(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any], is_meta: bool
) -> Any:
    """Launch a kernel; one for tensors on the meta device is only loaded, as `device.preparing` says."""
    if not is_meta:
        return kernel[grid](*args, **options)
    if device.INTERPRETED:
        return None
    made = kernel.warmup(*args, grid=grid, **options)
    load = getattr(made, "_init_handles", None)  # or the first launch does it
    if load is not None:
        load()
    return made


def _watched(kernel: Any) -> bool:
    """Whether a hook wants to know of launches."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        (enter is not None and getattr(enter, "calls", True))
        or (leave is not None and getattr(leave, "calls", True))
        or getattr(kernel, "pre_run_hooks", True)
    )


def _is_cuda(made: Any) -> bool:
    """Whether it is a kernel that `Launch` knows how to run; the interpreter gives none."""
    target = getattr(getattr(made, "metadata", None), "target", None)
    known = all(hasattr(made, name) for name in ("run", "function", "packed_metadata"))
    return known and getattr(target, "backend", None) == "cuda"
