"""What a number was measured on: GPU, CPU, versions, and which source."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "kernels",
    "accelerate",
    "liger-kernel",
    "quack-kernels",
    "runai-model-streamer",
    "fastsafetensors",
    "instanttensor",
)


def describe() -> dict[str, Any]:
    """The machine, the versions of what is measured, and the state of the source."""
    gpu = _first_line("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or ""
    name, _, driver = gpu.partition(", ")
    return {
        "gpu": name or None,
        "driver": driver or None,
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "commit": _first_line("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        "source": _digest(),
    }


def slug(described: dict[str, Any]) -> str:
    """A short name of the machine for a file's name."""
    name = described["gpu"] or f"{described['cpu']}-{described['cores']}-cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def roomy_folder() -> Path:
    """A folder on whichever of the usual places for temporary files has the most room."""
    candidates = dict.fromkeys(Path(each) for each in (tempfile.gettempdir(), "/var/tmp", Path.home() / ".cache"))
    there = [each for each in candidates if each.is_dir() and os.access(each, os.W_OK)]
    return max(there, key=lambda each: shutil.disk_usage(each).free) / "kernelgraft-benchmark"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _digest() -> str:
    """A digest of the package's source: a copy of the working tree may come without its history."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "src").rglob("*.py")):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None
