"""Positioned reads of files, which several threads can do at once."""

from collections.abc import Sequence
from os import preadv

from kernelgraft.checkpoint.files import OpenFile
from kernelgraft.checkpoint.requests import Read
from kernelgraft.errors import CheckpointError


def read_into(file: OpenFile, buffers: Sequence[memoryview], offset: int, reads: Sequence[Read]) -> None:
    """Read a range of a file into buffers, one after the other.

    Args:
        file: The file.
        buffers: Where to.
        offset: Where the range begins.
        reads: Whose bytes they are, for the error's sake.

    Raises:
        CheckpointError: It cannot be read, or the file ends before.
    """
    left = list(buffers)
    wanted = sum(map(len, left))
    while wanted:
        try:
            got = preadv(file.fd, left, offset)
        except OSError as error:
            raise unreadable(file, name_at(reads, file, offset), offset, error) from error
        if got == 0:
            raise cut_off(file, name_at(reads, file, offset), offset)
        offset, wanted = offset + got, wanted - got
        if wanted:
            left = _without(left, got)


def name_at(reads: Sequence[Read], file: OpenFile, offset: int) -> str:
    """The tensor to which a byte of a file belongs that one of the reads asks for."""
    for read in reads:
        if read.file is file and any(start <= offset < start + nbytes for start, nbytes in read.runs):
            return read.name
    raise CheckpointError(f"{file.path}: nothing was to be read at byte {offset}.")


def unreadable(file: OpenFile, name: str, offset: int, error: OSError) -> CheckpointError:
    """What to raise when a tensor's file cannot be read."""
    return CheckpointError(f"{file.path}: {name} cannot be read at byte {offset}: {error}")


def cut_off(file: OpenFile, name: str, offset: int) -> CheckpointError:
    """What to raise when a file ends within a tensor."""
    return CheckpointError(
        f"{file.path} ends at byte {offset}, in the middle of {name}: it was cut off while it was being loaded."
    )


def read_runs(read: Read, buffer: memoryview) -> None:
    """Read the runs of one read into a buffer, one after the other.

    Raises:
        CheckpointError: See `read_into`.
    """
    position = 0
    for start, nbytes in read.runs:
        read_into(read.file, [buffer[position : position + nbytes]], start, [read])
        position += nbytes


def _without(buffers: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """What is left of buffers of which the first `nbytes` are full."""
    for index, buffer in enumerate(buffers):
        if nbytes < len(buffer):
            return [buffer[nbytes:], *buffers[index + 1 :]]
        nbytes -= len(buffer)
    return []
