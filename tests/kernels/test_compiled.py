"""Every kernel compiles for an H100 or H200, and for a smaller GPU, in a process without the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = """_add_rows _add_splits _attend_split _backward _backward_blocks _backward_few_rows _backward_rows _combine
    _decode_split _forward _forward_blocks _forward_rows _one_token _some_tokens"""
"""All of them but that of the loss, which `test_cross_entropy.py` compiles with each of its switches."""


@pytest.mark.parametrize("architecture", ["90", "89"])
def test_all_that_is_launched_compiles(architecture):
    script = Path(__file__).with_name("compiled_without_gpu.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, script, architecture], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(line.split()[0] for line in done.stdout.splitlines()) == KERNELS.split()
