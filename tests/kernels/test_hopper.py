"""Every kernel compiles for an H100 or H200, in a process without the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = """_add_rows _add_splits _attend_split _backward _backward_blocks _backward_few_rows _backward_rows _combine
    _decode_split _forward _forward_blocks _forward_rows _one_token _some_tokens"""
"""All of them but that of the loss, which `test_cross_entropy.py` compiles with each of its switches."""


def test_all_that_is_launched_compiles():
    script = Path(__file__).with_name("hopper.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(line.split()[0] for line in done.stdout.splitlines()) == KERNELS.split()
