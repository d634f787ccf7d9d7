"""The memory of a process, watched from outside, so that watching takes nothing from what is measured."""

import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

EVERY_S = 0.005
# Asking the driver takes a lock of its own: less often.
GPU_EVERY_S = 0.02

FIELDS = ("VmRSS", "RssAnon", "RssFile", "RssShmem", "VmPin", "VmLck")


def status(pid: int | str = "self") -> dict[str, int]:
    """What the kernel says of a process's memory, in bytes."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in FIELDS:
            found[name] = int(rest.split()[0]) << 10
    return found


def available() -> int:
    """Bytes that the machine could still give, its page cache counted in."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/meminfo has no MemAvailable")


class Watch:
    """Samples a process until the block is left.

    Args:
        pid: The process.
        gpu: The GPU to watch as well, from the driver, so that what libraries take beside torch counts too.
    """

    def __init__(self, pid: int, gpu: int | None = None) -> None:
        self._pid = pid
        self._samples: list[tuple[float, dict[str, int]]] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._host, daemon=True)]
        device = None if gpu is None else _nvml_device(gpu)
        if device is not None:
            self._threads.append(threading.Thread(target=self._device, args=device, daemon=True))

    def _host(self) -> None:
        with suppress(OSError):  # the process is gone
            while not self._stop.wait(EVERY_S):
                self._samples.append((time.monotonic(), status(self._pid) | {"taken": -available()}))

    def _device(self, nvml: Any, handle: Any) -> None:
        while not self._stop.wait(GPU_EVERY_S):
            self._samples.append((time.monotonic(), {"gpu": nvml.nvmlDeviceGetMemoryInfo(handle).used}))

    def peaks(self, start: float, stop: float, before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
        """The most of each quantity over `before` between two times of `time.monotonic`, `after` being at the second.

        `taken` is what the machine had less to give (it counts what other processes take, too), `gpu` what all
        processes together had of the GPU, counted from the first sample before `start`.
        """
        before = {"taken": 0, **before}
        early = [sample["gpu"] for when, sample in self._samples if "gpu" in sample and when <= start]
        if early:
            before["gpu"] = early[-1]
        peaks: dict[str, int] = {}
        for when, sample in (*self._samples, (stop, after)):
            if start <= when <= stop:
                for name, value in sample.items():
                    if name in before:
                        peaks[name] = max(peaks.get(name, 0), value - before[name])
        return peaks

    def __enter__(self) -> "Watch":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def _nvml_device(gpu: int) -> tuple[Any, Any] | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(gpu)
    except Exception:  # no library, no driver, no such GPU: then torch's own count is all there is
        return None
