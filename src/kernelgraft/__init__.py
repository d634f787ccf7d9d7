"""kernelgraft: optimized kernels put into existing PyTorch models, exactly, reversibly, and verified."""

from importlib import import_module
from typing import Any

from kernelgraft import errors
from kernelgraft.api import graft, load, plan, save_pretrained
from kernelgraft.config import KernelConfig
from kernelgraft.graft import Graft, graft_of
from kernelgraft.kernel import Kernel
from kernelgraft.plan import Plan
from kernelgraft.recording import recorded

__version__ = "0.1.0"

_AUTO = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModelForImageTextToText",
    "AutoModelForMaskedLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForTokenClassification",
    "from_pretrained",
)

__all__ = [
    *_AUTO,
    "Graft",
    "Kernel",
    "KernelConfig",
    "Plan",
    "errors",
    "graft",
    "graft_of",
    "load",
    "plan",
    "recorded",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    # Transformers is imported only when one of its models is asked for.
    if name in _AUTO:
        return getattr(import_module("kernelgraft.auto"), name)
    raise AttributeError(f"module 'kernelgraft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
