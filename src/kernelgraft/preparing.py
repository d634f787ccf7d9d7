"""Kernels made ready for their first call while weights are read.

What a first call loads (a compiler, code for the GPU, a library) takes longer than many steps, and reading leaves the
host time for it. A layout says how in `prepare_kernels(device)`; it is asked for GPUs alone, once for each kind of
module.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from kernelgraft.layouts import on_meta

logger = logging.getLogger("kernelgraft")

Task = tuple[str, Callable[..., Any], nn.Module, torch.device]
"""A layout's name and its `prepare_kernels`, which takes a layout and a device."""


@contextlib.contextmanager
def preparing(layouts: Iterable[tuple[type[nn.Module], nn.Module]], trains: bool | None = None) -> Iterator[None]:
    """Have layouts prepare their kernels on a thread, which has ended when the block is left.

    Where that fails, the kernel's first call does the work, as it would without all this; one line is logged.

    Args:
        layouts: Classes of layouts, and modules of theirs.
        trains: The mode to prepare for, if not the one that each module is in.
    """
    tasks = list(_tasks(layouts, trains))
    if not tasks:
        yield
        return
    is_over, ended = threading.Event(), threading.Event()
    thread = threading.Thread(target=_work, args=(tasks, is_over, ended), name="kernelgraft-prepare", daemon=True)
    try:
        thread.start()
        yield
        ended.wait()
    finally:
        # After an error, or Ctrl-C, it ends when it is through with the kind that it is at.
        is_over.set()
        if thread.ident is not None:
            # Not by `join` alone: interrupted by Ctrl-C, it may take a thread for ended that still runs.
            ended.wait()
            thread.join()


def _tasks(layouts: Iterable[tuple[type[nn.Module], nn.Module]], trains: bool | None) -> Iterator[Task]:
    """One for each kind of module that is on a GPU, with a copy of it on the meta device."""
    seen = set()
    for cls, module in layouts:
        prepare = getattr(cls, "prepare_kernels", None)
        if prepare is None:
            continue
        forms = [(each.shape, each.dtype, each.device, each.requires_grad) for each in module.parameters()]
        training = module.training if trains is None else trains
        kind = (cls, training, *forms)
        devices = {device for _, _, device, _ in forms}
        if len(devices) == 1 and all(map(_is_gpu, devices)) and kind not in seen:
            seen.add(kind)
            yield cls.__name__, prepare, on_meta(module)[0].train(training), devices.pop()


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _work(tasks: Sequence[Task], is_over: threading.Event, ended: threading.Event) -> None:
    try:
        for name, prepare, layout, device in tasks:
            if is_over.is_set():
                return
            try:
                prepare(layout, device)
            except Exception as error:
                logger.warning("%s.prepare_kernels failed, so the kernel's first call takes longer: %s", name, error)
    finally:
        ended.set()
