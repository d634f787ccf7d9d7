"""Safetensors files written by a few threads, byte for byte as the safetensors library writes them.

A file is cut into chunks at fixed places. A thread gathers one chunk in a buffer, from wherever its tensors are and
however they lie there, and writes it to its place, past the page cache where the file system can. So a copy of the
model is never made: what is in memory beyond it is one buffer for each thread. While one file is brought to the disk
the next is begun: the disk has something to do until the last one.
"""

import bisect
import errno
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import cast

import torch

from kernelgraft.checkpoint.header import KINDS
from kernelgraft.checkpoint.memory import PAGE
from kernelgraft.checkpoint.staging import Staging
from kernelgraft.checkpoint.system import allocate, uninterrupted
from kernelgraft.conversion.lazy import LazyTensor, TensorSource
from kernelgraft.errors import CheckpointError

# An 8B model from an H100 to disk in 4 shards (16.38 GB, two rounds in turn, 2026-11-28): 8 threads and 8 MB took 8.7
# and 11.1 s, 4 threads 10.7 and 10.7, 16 threads 9.9 and 10.4, 2 MB 9.5 and 11.1, 32 MB 10.5 and 10.9. As many bytes
# from one buffer by 8 threads took 10.6 and 10.8 s past the page cache, 19.4 and 14.0 through it. The disk decides: so
# as little pinned memory (64 MB) as keeps a faster one busy.
# 2.2 GB from host memory on 2 busy cores (three rounds, same day): 8 threads and 8 MB 2.0 to 2.2 s, 1 thread 2.6 to
# 3.1, 2 MB 2.0 to 2.4, 32 MB 1.9 to 2.8, 16 threads 2.1 to 3.7; 8 threads through the page cache 4.6 to 15.8.
THREADS = 8
CHUNK = 8 << 20

_KIND_OF = {dtype: (rank, kind) for rank, (kind, (_, dtype)) in enumerate(KINDS.items()) if dtype is not None}


@dataclass(frozen=True, slots=True)
class Span:
    """Where a tensor's bytes lie in a file.

    Attributes:
        start: Offset of the first byte.
        stop: Offset after the last one.
        tensor: The tensor.
        run: The same as a contiguous tensor in memory, if it is one.
    """

    start: int
    stop: int
    tensor: LazyTensor
    run: torch.Tensor | None


def layout(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, tuple[Span, ...]]:
    """What a file of these tensors begins with, and where in it each tensor lies.

    As in the safetensors library larger dtypes come first, so that every tensor is aligned, and then names decide.

    Raises:
        CheckpointError: A tensor cannot stand in such a file.
    """
    names = sorted(tensors, key=lambda name: (-_kind(name, tensors[name])[0], name.encode()))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offsets, stop = [], 0
    for name in names:
        tensor = tensors[name]
        start, stop = stop, stop + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _kind(name, tensor)[1], "shape": _shape(tensor), "data_offsets": [start, stop]}
        offsets.append((start, stop))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    spans = [_span(name, tensors[name], first + a, first + b) for name, (a, b) in zip(names, offsets, strict=True)]
    return len(text).to_bytes(8, "little") + text, tuple(span for span in spans if span.start < span.stop)


def _kind(name: str, tensor: torch.Tensor) -> tuple[int, str]:
    found = _KIND_OF.get(tensor.dtype)
    if found is None or tensor.layout != torch.strided or tensor.is_meta or name == "__metadata__":
        what = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        raise CheckpointError(
            f"{name} ({what}) cannot be written into a safetensors file, which takes dense tensors that have values, "
            f"of the dtypes {', '.join(str(dtype).removeprefix('torch.') for dtype in _KIND_OF)}."
        )
    return found


def _shape(tensor: torch.Tensor) -> list[int]:
    # Torch holds two numbers of four bits in one element.
    twice = tensor.dtype == torch.float4_e2m1fn_x2 and tensor.ndim
    return [*tensor.shape[:-1], 2 * tensor.shape[-1]] if twice else list(tensor.shape)


def _span(name: str, tensor: torch.Tensor, start: int, stop: int) -> Span:
    if not isinstance(tensor, LazyTensor):
        # What is only marked as conjugate or negated has other bytes than it stands for.
        tensor = LazyTensor.of(TensorSource(name, tensor.detach().resolve_conj().resolve_neg()))
    run = tensor.view_of_source() if start < stop else None
    return Span(start, stop, tensor, None if run is None else run.reshape(-1))


class _File:
    """A file while it is written.

    Attributes:
        left: How many of its chunks are not written.
    """

    def __init__(self, path: Path, header: bytes, spans: tuple[Span, ...], chunk: int) -> None:
        self.path = path
        self.header = header
        self.spans = spans
        self.size = spans[-1].stop if spans else len(header)
        self.left = -(-self.size // chunk)
        self._starts = [span.start for span in spans]
        flags = os.O_WRONLY | getattr(os, "O_CLOEXEC", 0)
        self._fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
        self._direct: int | None = None
        self._is_open = True
        try:
            allocate(self._fd, self.size)
            if self.left > 1 and hasattr(os, "O_DIRECT"):
                self._direct = _opened(path, flags | os.O_DIRECT)
        except BaseException:
            self.close()
            raise

    def fill(self, start: int, stop: int, staging: Staging) -> None:
        """Gather the bytes `start:stop` of the file in a buffer."""
        if start < len(self.header):
            head = self.header[start:stop]
            staging.view[: len(head)] = head
        first_span = max(0, bisect.bisect_right(self._starts, start) - 1)
        for span in self.spans[first_span : bisect.bisect_left(self._starts, stop)]:
            low, high = max(start, span.start), min(stop, span.stop)
            if low < high:
                itemsize = span.tensor.dtype.itemsize
                first, count = (low - span.start) // itemsize, (high - low) // itemsize
                if span.run is not None:
                    staging.take(span.run[first : first + count], low - start)
                else:
                    staging.gather(cast(LazyTensor, span.tensor.view(-1).narrow(0, first, count)), low - start)
        staging.wait()

    def write(self, start: int, stop: int, staging: Staging) -> None:
        """Write a buffer to its place."""
        if self._direct is not None:
            # Past the page cache whole blocks are written; what is too much is cut off in the end.
            padded = start - (start - stop) // PAGE * PAGE
            staging.view[stop - start : padded - start] = bytes(padded - stop)
            try:
                _write_at(self._direct, staging.view[: padded - start], start)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        _write_at(self._fd, staging.view[: stop - start], start)

    def finish(self) -> None:
        """Bring the file to the disk."""
        os.ftruncate(self._fd, self.size)
        os.fsync(self._fd)

    def close(self) -> None:
        """Close it, if it is open."""
        for fd in (self._fd, self._direct) if self._is_open else ():
            if fd is not None:
                os.close(fd)
        self._is_open = False


def _opened(path: Path, flags: int) -> int | None:
    try:
        return os.open(path, flags)
    except OSError:
        return None


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


_Part = tuple[_File, int, Callable[[int], None]]
"""A file, where in it a chunk begins, and whom to tell that it is written."""


class FileWriter:
    """Writes safetensors files by several threads.

    Use it as a context manager: when its block ends, the disk has all files.
    """

    def __init__(self, *, threads: int = THREADS, chunk: int = CHUNK) -> None:
        self._chunk = chunk
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kernelgraft-save")
        self._alone = ThreadPoolExecutor(1, thread_name_prefix="kernelgraft-save")
        self._staging: list[Staging] = []
        self._files: set[_File] = set()
        self._left: deque[_Part] = deque()
        self._is_all = False
        self._failures: list[BaseException] = []
        self._changed = threading.Condition()

    def __enter__(self) -> "FileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        uninterrupted(partial(self._end, is_whole=kind is None), self._stop)

    def write(
        self,
        path: str | Path,
        tensors: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str] | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Write a new file. It returns when the last chunk is in a thread's hands; the block's end waits for the disk.

        Args:
            path: Where to; nothing may be there.
            tensors: Tensors by name, plain ones of any strides and lazy ones, on any device. They must not change
                before the block ends.
            metadata: Texts that go into the header.
            progress: Called with the number of the tensors' bytes after each chunk, until the block ends.

        Raises:
            CheckpointError: A tensor cannot stand in such a file.
            OSError: This file, or one before it, cannot be written. The end of the block raises what comes later.
        """
        header, spans = layout(tensors, metadata)
        size = spans[-1].stop if spans else len(header)
        starts = range(0, size, self._chunk)
        while len(self._staging) < min(self._threads, len(starts)):
            self._staging.append(Staging(self._chunk, self._alone))
            self._pool.submit(self._work, self._staging[-1])
        # Here and not in the threads: each thread has another current stream.
        devices = {span.tensor.device for span in spans}
        for staging in self._staging:
            staging.prepare(devices)

        def begin() -> None:
            if self._failures:
                return
            file = _File(Path(path), header, spans, self._chunk)
            with self._changed:
                self._files.add(file)
                if not self._is_all:
                    self._left.extend((file, start, progress) for start in starts)
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._left)

        uninterrupted(begin, self._stop)
        if self._failures:
            raise self._failures[0]

    def _work(self, staging: Staging) -> None:
        try:
            while (part := self._next()) is not None:
                file, start, progress = part
                stop = min(start + self._chunk, file.size)
                file.fill(start, stop, staging)
                file.write(start, stop, staging)
                with self._changed:
                    progress(max(0, stop - max(start, len(file.header))))
                    file.left -= 1
                    is_written = not file.left
                if is_written:
                    file.finish()
                    with self._changed:
                        self._files.remove(file)
                    file.close()
        except BaseException as error:  # raised again where a file is asked for, or by the block's end
            self._failures.append(error)
            self._stop()

    def _next(self) -> _Part | None:
        with self._changed:
            self._changed.wait_for(lambda: self._left or self._is_all)
            part = self._left.popleft() if self._left else None
            if not self._left:
                self._changed.notify_all()
            return part

    def _stop(self, *, at_once: bool = True) -> None:
        """Nothing more comes; and if `at_once`, nothing of what has come is begun any more."""
        with self._changed:
            if at_once:
                self._left.clear()
            self._is_all = True
            self._changed.notify_all()

    def _end(self, *, is_whole: bool) -> None:
        self._stop(at_once=not is_whole)
        for pool in (self._pool, self._alone):
            pool.shutdown(wait=True)
        for staging in self._staging:
            staging.close()
        for file in self._files:
            file.close()
        if is_whole and self._failures:
            raise self._failures[0]
