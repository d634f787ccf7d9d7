"""Where there is a GPU, the tests of this folder run on it: `python -m pytest tests/kernels`.

`test_int64.py` takes 17 GB of its memory, in each process that runs a part of it.
"""

from pathlib import Path

import pytest
from drawn import few_are_four, in_triton, launched, rounded  # noqa: F401

OF_TORCH = (
    r"ignore:.torch\.jit\.script_method. is deprecated:DeprecationWarning",
    r"ignore:Warning. Profiler clears events:UserWarning",
    r"ignore:Attempting to run cuBLAS, but there was no current CUDA context:UserWarning",
    r"ignore:Synchronization debug mode is a prototype feature:UserWarning",
    r"ignore:TensorFloat32 tensor cores for float32 matrix multiplication:UserWarning",
)
"""What torch warns of by itself, in some versions or where there is a GPU."""


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            for each in OF_TORCH:
                item.add_marker(pytest.mark.filterwarnings(each))
