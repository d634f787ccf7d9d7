"""Reports that were kept as JSON files, read again."""

import json
from pathlib import Path
from typing import Any

from kernelgraft.benchmark.report import Report as Benchmark
from kernelgraft.errors import ReportError
from kernelgraft.verify.report import Report as Verification


def read_verification(path: str | Path) -> Verification:
    """The report of `kernelgraft verify --json`, or of `json.dump(report.to_json(), file)`.

    Raises:
        ReportError: The file cannot be read, or is no such report.
    """
    found: Verification = _read(path, Verification, "graft.verify()")
    return found


def read_benchmark(path: str | Path) -> Benchmark:
    """The report of `kernelgraft bench --json`, or of `json.dump(report.to_json(), file)`.

    Raises:
        ReportError: The file cannot be read, or is no such report.
    """
    found: Benchmark = _read(path, Benchmark, "graft.benchmark()")
    return found


def _read(path: str | Path, cls: Any, source: str) -> Any:
    wanted = f"It must be what to_json() of a report of {source} gives, as JSON."
    try:
        return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}. {wanted}") from error
    except ValueError as error:
        raise ReportError(f"{path} is no JSON: {error}. {wanted}") from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ReportError(f"{path} is another kind of JSON ({type(error).__name__}: {error}). {wanted}") from error
