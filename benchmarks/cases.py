"""The rows of the benchmark: which measurement, of which model, in which group, how often."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Case:
    """One row: a measurement in one setting.

    Attributes:
        name: What `--rows` calls it.
        measure: `module:function`, a generator function that takes a `worker.Run`.
        model: A key of `models.LARGE` and `models.SMALL`.
        arguments: Keywords of the function.
        package: An optional package that it needs.
        repeats: How often at most, where that is less than is asked for.
        warm_ups: How many rounds do not count.
        cuda: Whether it needs a GPU.
        limit_s: How long it may take once it is its turn.
    """

    name: str
    measure: str
    model: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    package: str | None = None
    repeats: int | None = None
    warm_ups: int = 0
    cuda: bool = False
    limit_s: float = 150


def _variants(
    prefix: str, measure: str, model: str, settings: Mapping[str, Mapping[str, Any]], **kwargs: Any
) -> list[Case]:
    return [Case(f"{prefix}-{name}", measure, model, arguments, **kwargs) for name, arguments in settings.items()]


def _by_threads(*settings: tuple[int, int]) -> dict[str, dict[str, Any]]:
    return {f"{threads}x{chunk}": {"threads": threads, "chunk_mb": chunk} for threads, chunk in settings}


_REGISTERED = _by_threads((4, 64), (4, 128), (8, 64), (8, 128))
_POSITIONED = _by_threads((8, 16), (16, 16), (16, 2), (16, 1))
_BUFFERED = {
    "buffered": {"backend": "BUFFERED"},  # whichever of the next two is there
    "uring": {"backend": "URING_BUFFERED"},
    "mmap": {"backend": "MMAP"},
}
_WRITES = {"cached": {"direct": False}, "direct": {"direct": True}}
_COPIES = {
    "map": {"how": "map", "huge": False},
    "map-huge": {"how": "map", "huge": True},
    "read": {"how": "read", "huge": False},
    "read-huge": {"how": "read", "huge": True},
}


def _copies(what: str) -> dict[str, dict[str, Any]]:
    return {name: {"what": what, **setting} for name, setting in _COPIES.items()}


GPU = [
    Case("bus", "limits:bus", "8b", {"buffer_mb": 256}, cuda=True),
    *_variants("limit-registered", "limits:registered", "8b", _REGISTERED, cuda=True),
    *_variants("limit-pread", "limits:positioned", "8b", _POSITIONED, cuda=True),
    Case("ours-plain", "loaders:ours", "8b", {"merged": False}),
    Case("ours-merged", "loaders:ours", "8b", {"merged": True}),
    Case("transformers", "loaders:transformers", "8b"),
    Case("safetensors", "loaders:safetensors", "8b"),
    Case("runai", "loaders:runai", "8b", package="runai-model-streamer"),
    Case("fastsafetensors", "loaders:fastsafetensors", "8b", package="fastsafetensors"),
    Case("instanttensor", "loaders:instanttensor", "8b", {"backend": None}, "instanttensor", cuda=True),
    *_variants("instanttensor", "loaders:instanttensor", "8b", _BUFFERED, package="instanttensor", cuda=True),
    Case("update", "tasks:update", "8b", {"times": 15}),
    Case("save-ours", "tasks:save", "8b", {"who": "ours"}, limit_s=300),
    Case("save-transformers", "tasks:save", "8b", {"who": "transformers"}, limit_s=300),
    *_variants("save-write", "limits:plain_write", "8b", _WRITES, limit_s=300),
    Case(
        "sweep",
        "limits:sweep",
        "8b",
        {
            "threads": (2, 4, 6, 8, 12, 16),
            "chunks_mb": (32, 64, 128, 256),
            "depths": (1, 2),
            "populate": (False, True),
        },
        repeats=1,
        cuda=True,
        limit_s=300,
    ),
]

CPU = [
    Case("dense-ours", "loaders:ours", "dense", {"merged": False}),
    Case("dense-transformers", "loaders:transformers", "dense"),
    Case("merged-ours", "loaders:ours", "dense", {"merged": True}),
    *_variants("merged-copy", "limits:fresh_copy", "dense", _copies("merged")),
    Case("moe-ours", "loaders:ours", "moe", {"merged": False}),
    Case("moe-transformers", "loaders:transformers", "moe"),
    *_variants("moe-copy", "limits:fresh_copy", "moe", _copies("experts")),
    Case("planning", "tasks:planning", "many"),
    Case("start-ours", "tasks:start", "tiny", {"who": "ours"}, warm_ups=1),
    Case("start-transformers", "tasks:start", "tiny", {"who": "transformers"}, warm_ups=1),
]

GROUPS: Mapping[str, Sequence[Case]] = {"gpu": GPU, "cpu": CPU}

SMALL_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "sweep": {"threads": (2,), "chunks_mb": (1,), "depths": (1, 2), "populate": (False, True)},
    "update": {"times": 2},
}


def small(case: Case) -> Case:
    """The same for a trial of the program."""
    return replace(case, arguments=SMALL_ARGUMENTS.get(case.name, case.arguments))
