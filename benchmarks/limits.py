"""What the machine itself can do with the same bytes: the bus, registered pages, positioned reads, copies, writes.

Every function here that takes a `Run` is a measurement, as `worker.py` describes it.
"""

import itertools
import mmap
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pages
from models import Place, places
from worker import Measurement, Run

MB = 1 << 20
REGISTER_READ_ONLY = 8  # cudaHostRegisterReadOnly
Piece = tuple[Any, int, int]  # (a file, where in it, how many bytes)


def bus(run: Run, *, buffer_mb: int) -> Measurement:
    """Pinned memory to the GPU, as many bytes as the checkpoint has, from one buffer that stays in place."""
    import torch

    yield
    pinned = torch.empty(buffer_mb * MB, dtype=torch.uint8, pin_memory=True).random_()
    total = sum(file.stat().st_size for file in run.files)
    with run.clock():
        destination = torch.empty(total, dtype=torch.uint8, device=run.device)
        for part in destination.split(pinned.numel()):
            part.copy_(pinned[: part.numel()], non_blocking=True)
    run.require(bool(torch.equal(destination[: pinned.numel()].cpu(), pinned[:total])), "the copy differs")
    run.result["bytes"] = total


def registered(run: Run, *, threads: int, chunk_mb: int, depth: int = 1, populate: bool = False) -> Measurement:
    """Pages of the mapped files, registered read-only with the driver and copied by DMA."""
    import torch

    yield
    total = sum(file.stat().st_size for file in run.files)
    with run.clock():
        destination = torch.empty(total, dtype=torch.uint8, device=run.device)
        copy_registered(destination, run.files, threads, chunk_mb * MB, depth, populate)
    _check_copy(run, destination)


def positioned(run: Run, *, threads: int, chunk_mb: int) -> Measurement:
    """Positioned reads into pinned buffers, two for each thread, and copies from there."""
    import torch

    yield
    total = sum(file.stat().st_size for file in run.files)
    with run.clock():
        destination = torch.empty(total, dtype=torch.uint8, device=run.device)
        copy_positioned(destination, run.files, threads, chunk_mb * MB)
    _check_copy(run, destination)


def sweep(
    run: Run, *, threads: Sequence[int], chunks_mb: Sequence[int], depths: Sequence[int], populate: Sequence[bool]
) -> Measurement:
    """Every setting of `registered` once, in one process, after one that does not count."""
    import torch

    yield
    total = sum(file.stat().st_size for file in run.files)
    destination = torch.empty(total, dtype=torch.uint8, device=run.device)
    copy_registered(destination, run.files, threads[0], chunks_mb[0] * MB, 1, False)
    found = []
    with run.clock():
        for setting in itertools.product(threads, chunks_mb, depths, populate):
            num_threads, chunk_mb, depth, populated = setting
            start = time.perf_counter()
            copy_registered(destination, run.files, num_threads, chunk_mb * MB, depth, populated)
            found.append([*setting, round(time.perf_counter() - start, 4)])
    _check_copy(run, destination)
    run.result["sweep"] = sorted(found, key=lambda each: each[-1])


def copy_registered(
    destination: Any, files: Sequence[Path], num_threads: int, chunk: int, depth: int, populate: bool
) -> None:
    """Copy whole files to the GPU from their own pages, each chunk registered for the time of its copy.

    Args:
        destination: A tensor of bytes on the GPU; the files go into it one after another.
        files: The files.
        num_threads: Each registers, copies on a stream of its own, and unregisters.
        chunk: Bytes that are registered at once.
        depth: How many chunks of one thread may be registered at a time.
        populate: Map a chunk's pages by madvise(2) before they are registered.
    """
    import torch

    cudart = torch.cuda.cudart()
    mapped = [pages.map_file(file) for file in files]
    jobs: deque[tuple[int, int, int]] = deque()
    start = 0
    for address, size in mapped:
        jobs.extend((address + at, min(chunk, size - at), start + at) for at in range(0, size, chunk))
        start += size

    def work() -> None:
        stream = torch.cuda.Stream()
        flying: deque[tuple[Any, int]] = deque()

        def land() -> None:
            event, address = flying.popleft()
            event.synchronize()
            torch.cuda.check_error(int(cudart.cudaHostUnregister(address)))

        while True:
            try:
                address, size, place = jobs.popleft()
            except IndexError:
                break
            whole_pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
            if populate:
                pages.advise(address, whole_pages, pages.MADV_POPULATE_READ)
            torch.cuda.check_error(int(cudart.cudaHostRegister(address, whole_pages, REGISTER_READ_ONLY)))
            event = torch.cuda.Event()
            with torch.cuda.stream(stream):
                source = torch.frombuffer(pages.buffer_at(address, size), dtype=torch.uint8)
                destination[place : place + size].copy_(source, non_blocking=True)
                event.record(stream)
            flying.append((event, address))
            if len(flying) >= depth:
                land()
        while flying:
            land()

    _in_threads(num_threads, work)
    for address, size in mapped:
        pages.unmap(address, size)


def copy_positioned(destination: Any, files: Sequence[Path], num_threads: int, chunk: int) -> None:
    """Copy whole files to the GPU through pinned buffers, two for each thread."""
    import torch

    cudart = torch.cuda.cudart()
    jobs: deque[tuple[int, int, int, int]] = deque()
    descriptors = [os.open(file, os.O_RDONLY) for file in files]
    start = 0
    for descriptor in descriptors:
        size = os.fstat(descriptor).st_size
        jobs.extend((descriptor, at, min(chunk, size - at), start + at) for at in range(0, size, chunk))
        start += size

    def work() -> None:
        stream = torch.cuda.Stream()
        address = pages.map_anonymous(2 * chunk)
        torch.cuda.check_error(int(cudart.cudaHostRegister(address, 2 * chunk, 0)))
        halves = [(pages.buffer_at(address + at, chunk), torch.cuda.Event()) for at in (0, chunk)]
        for buffer, event in itertools.cycle(halves):
            try:
                descriptor, at, size, place = jobs.popleft()
            except IndexError:
                break
            event.synchronize()
            read_fully(descriptor, memoryview(buffer)[:size], at)
            with torch.cuda.stream(stream):
                source = torch.frombuffer(buffer, dtype=torch.uint8, count=size)
                destination[place : place + size].copy_(source, non_blocking=True)
                event.record(stream)
        stream.synchronize()
        torch.cuda.check_error(int(cudart.cudaHostUnregister(address)))
        pages.unmap(address, 2 * chunk)

    _in_threads(num_threads, work)
    for descriptor in descriptors:
        os.close(descriptor)


def fresh_copy(run: Run, *, what: str, how: str, huge: bool) -> Measurement:
    """The bytes of the tensors that a load re-lays-out, from the page cache into memory that nothing has touched.

    Args:
        run: The run.
        what: "merged" for q, k, v, gate and up; "experts" for those of all experts.
        how: "map" copies out of the mapped file with torch and all its threads; "read" is positioned reads by as many
            threads as there are cores.
        huge: Ask for huge pages.
    """
    import torch

    yield
    wanted = run.model.merged if what == "merged" else lambda name: ".experts." in name
    found = places(run.files)
    stretches = joined([place for name, place in found.items() if wanted(name)])
    total = sum(size for _, _, size in stretches)
    with run.clock():
        address = pages.map_anonymous(total, huge=huge)
        if how == "map":
            _copy_mapped(torch, stretches, address)
        else:
            _read_into(stretches, address, run.num_threads)
    at = 0
    for file, offset, size in stretches:
        for step in {0, size // 2, max(0, size - 16)}:
            expected = os.pread(run.descriptor(file), min(16, size - step), offset + step)
            run.require(bytes(pages.buffer_at(address + at + step, len(expected))) == expected, f"{file} at {offset}")
        at += size
    run.result["bytes"] = total


def joined(found: Sequence[Place]) -> list[Piece]:
    """Places, in order, with those joined that touch in a file."""
    stretches: list[Piece] = []
    for place in found:
        file, offset, size = stretches[-1] if stretches else (None, 0, 0)
        if file == place.file and offset + size == place.offset:
            stretches[-1] = (file, offset, size + place.nbytes)
        else:
            stretches.append((place.file, place.offset, place.nbytes))
    return stretches


def _copy_mapped(torch: Any, stretches: Sequence[Piece], address: int) -> None:
    mapped = {file: pages.map_file(file)[0] for file, _, _ in stretches}
    for file, offset, size in stretches:
        source = torch.frombuffer(pages.buffer_at(mapped[file] + offset, size), dtype=torch.uint8)
        torch.frombuffer(pages.buffer_at(address, size), dtype=torch.uint8).copy_(source)
        address += size


def _read_into(stretches: Sequence[Piece], address: int, num_threads: int) -> None:
    descriptors = {file: os.open(file, os.O_RDONLY) for file, _, _ in stretches}
    jobs: deque[tuple[int, int, int, int]] = deque()
    for file, offset, size in stretches:
        pieces = range(0, size, 8 * MB)
        jobs.extend((descriptors[file], offset + at, min(8 * MB, size - at), address + at) for at in pieces)
        address += size

    def work() -> None:
        while True:
            try:
                descriptor, at, size, place = jobs.popleft()
            except IndexError:
                return
            read_fully(descriptor, memoryview(pages.buffer_at(place, size)), at)

    _in_threads(num_threads, work)
    for descriptor in descriptors.values():
        os.close(descriptor)


def plain_write(run: Run, *, direct: bool) -> Measurement:
    """As many bytes as the checkpoint has, in as many files, from one buffer in memory, each file synced.

    Args:
        run: The run.
        direct: Past the page cache.
    """
    from kernelgraft.checkpoint import writer

    yield
    piece = 16 * MB
    address = pages.map_anonymous(piece)
    data = memoryview(pages.buffer_at(address, piece)).cast("B")
    data[:] = os.urandom(piece)
    sizes = {run.scratch / file.name: file.stat().st_size for file in run.files}
    with run.clock():
        jobs: deque[tuple[int, int, int]] = deque()
        descriptors = {}
        for file, size in sizes.items():
            flags = os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if direct else 0)
            descriptor = descriptors[file] = os.open(file, flags)
            # Direct writes are whole pages; what is too much of the last one is cut off below.
            whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
            os.posix_fallocate(descriptor, 0, whole)
            jobs.extend((descriptor, at, min(piece, whole - at)) for at in range(0, whole, piece))

        def work() -> None:
            while True:
                try:
                    descriptor, at, size = jobs.popleft()
                except IndexError:
                    return
                while size:
                    written = os.pwrite(descriptor, data[:size], at)
                    at, size = at + written, size - written

        def finish(file: Path) -> None:
            os.ftruncate(descriptors[file], sizes[file])
            os.fsync(descriptors[file])
            os.close(descriptors[file])

        _in_threads(writer.THREADS, work)
        # Files are synced side by side too, as a writer with several threads would.
        with ThreadPoolExecutor(writer.THREADS) as pool:
            list(pool.map(finish, sizes))
    for file, size in sizes.items():
        run.require(file.stat().st_size == size, f"{file.name} has {file.stat().st_size} bytes")
    run.result |= {"bytes": sum(sizes.values()), "threads": writer.THREADS}


def read_fully(descriptor: int, buffer: memoryview, offset: int) -> None:
    """As preadv(2), until the buffer is full."""
    while len(buffer):
        count = os.preadv(descriptor, [buffer], offset)
        if not count:
            raise EOFError(f"the file ends at {offset}")
        buffer, offset = buffer[count:], offset + count


def _in_threads(num_threads: int, work: Callable[[], None]) -> None:
    with ThreadPoolExecutor(num_threads) as pool:
        for job in [pool.submit(work) for _ in range(num_threads)]:
            job.result()


def _check_copy(run: Run, destination: Any) -> None:
    start = 0
    for file in run.files:
        size = file.stat().st_size
        for at in {0, size // 3, size - 64}:
            expected = os.pread(run.descriptor(file), 64, at)
            run.require(bytes(destination[start + at : start + at + 64].tolist()) == expected, f"{file.name} at {at}")
        start += size
    run.result["bytes"] = start
