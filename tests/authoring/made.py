"""Kernel repositories made by `new` for tests, and what is done with them."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import kernelgraft
from kernelgraft.authoring.check import check

SOURCE = Path(kernelgraft.__file__).parents[1]


def skeleton(kind, **changes):
    """A tiny model on the meta device, built as the command line builds it."""
    import tiny

    with kernelgraft.recorded(), torch.device("meta"):
        return tiny.model_class(kind)(tiny.config(kind, **changes))


def code_of(made):
    """The file with the kernel and its layout."""
    return next(Path(made.folder).glob("torch-ext/*/kernel.py"))


def edit(made, old, text, file="kernel.py"):
    """Change a repository's code as an author would get it wrong."""
    path = code_of(made).with_name(file)
    before = path.read_text()
    assert old in before, before
    path.write_text(before.replace(old, text))


def found(made, rule, model=None):
    """The findings of one rule."""
    return [each for each in check(made.folder, model).findings if each.rule == rule]


def the_one(made, rule, model=None):
    """The only finding of a rule."""
    (finding,) = found(made, rule, model)
    return finding


def config_of(made):
    """What says where the kernel goes."""
    return kernelgraft.KernelConfig.from_file(Path(made.folder) / "kernels.toml")


def run_its_tests(made):
    """`pytest` on the repository's own tests, in a process of its own, where warnings are errors."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "tests"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.run(command, cwd=made.folder, env=environment, capture_output=True, text=True)
