"""What this process runs on: versions, and devices."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

_PACKAGES = ("kernelgraft", "torch", "transformers", "kernels", "safetensors", "accelerate", "triton")


def environment() -> dict[str, Any]:
    """Versions of the packages that matter (`None` for one that is not installed), the machine, and its devices."""
    return {
        **{package: _version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "cpu": f"{os.cpu_count()} cores",
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
