"""The buffers between tensors and files: one for each thread, filled from host memory or by a device's own copies."""

import ctypes
from collections.abc import Iterable
from concurrent.futures import Executor
from contextlib import ExitStack

import torch

from kernelgraft.checkpoint.memory import Mapped, Pinned, RegistrationError, registered, writable
from kernelgraft.conversion.lazy import LazyTensor

pinned = Pinned()
"""The host memory that saves have registered at the moment, and the most that it was."""


class Staging:
    """A buffer of whole pages, and a stream of its own on each CUDA device.

    Attributes:
        view: The buffer's bytes.
    """

    def __init__(self, nbytes: int, alone: Executor) -> None:
        """A buffer of `nbytes`; what torch does by several threads of its own, it does in the one of `alone`."""
        self._stack = ExitStack()
        self._nbytes = nbytes
        self._alone = alone
        self._memory = Mapped(nbytes)
        self._stack.callback(self._memory.close)
        self.view = writable(self._memory.bytes)
        self._is_registered: bool | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._scratch: dict[torch.device, torch.Tensor] = {}

    def prepare(self, devices: Iterable[torch.device]) -> None:
        """Let copies from these devices start after what their current streams have to do now."""
        for device in devices:
            if device.type == "cuda":
                if device not in self._streams:
                    self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                self._streams[device].wait_stream(torch.cuda.current_stream(device))

    def take(self, run: torch.Tensor, at: int) -> None:
        """Copy a contiguous tensor's bytes into the buffer from byte `at` on."""
        if run.device.type == "cpu":
            # Not torch's copy: called from several threads, it would start threads of its own for each.
            ctypes.memmove(self._memory.address + at, run.data_ptr(), run.nbytes)
            return
        stream = self._streams.get(run.device)
        if stream is None:
            self._slice(run, at).copy_(run)
            return
        self._register()
        with torch.cuda.stream(stream):
            self._slice(run, at).copy_(run, non_blocking=True)

    def gather(self, tensor: LazyTensor, at: int) -> None:
        """Copy a tensor that lies in pieces, laid out on its device, into the buffer from byte `at` on."""
        stream = self._streams.get(tensor.device)
        if stream is None or any(source.device != tensor.device for source in tensor.sources):
            # Torch shares a copy out among threads; of several copies at once they would stand in each other's way.
            self._alone.submit(tensor.materialize, self._slice(tensor, at)).result()
            return
        with torch.cuda.stream(stream):
            if tensor.device not in self._scratch:
                self._scratch[tensor.device] = torch.empty(self._nbytes, dtype=torch.uint8, device=tensor.device)
            laid_out = self._scratch[tensor.device][at : at + tensor.nbytes].view(tensor.dtype)
            tensor.materialize(out=laid_out)
        self.take(laid_out, at)

    def wait(self) -> None:
        """Wait until all that was asked for lies in the buffer."""
        for stream in list(self._streams.values()):  # for the next file there may come one while this waits
            stream.synchronize()

    def close(self) -> None:
        """Give the memory back, when no copy into it is under way any more."""
        self.wait()
        self._scratch = {}
        self.view.release()
        self._stack.close()

    def _slice(self, like: torch.Tensor, at: int) -> torch.Tensor:
        return self._memory.bytes[at : at + like.nbytes].view(like.dtype).view(like.shape)

    def _register(self) -> None:
        """Let devices write the buffer by themselves; where the driver refuses, they copy more slowly."""
        if self._is_registered is None:
            try:
                self._stack.enter_context(registered(self._memory.address, self._nbytes, pinned, read_only=False))
                self._is_registered = True
            except RegistrationError:
                self._is_registered = False
