"""What users import: the public names, and what importing the package costs."""

import inspect
import subprocess
import sys

import pytest

import kernelgraft

PUBLIC = {
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
    "Graft",
    "Kernel",
    "KernelConfig",
    "Plan",
    "errors",
    "from_pretrained",
    "graft",
    "graft_of",
    "load",
    "plan",
    "recorded",
    "save_pretrained",
}


def test_the_public_names():
    assert set(kernelgraft.__all__) == PUBLIC
    assert set(dir(kernelgraft)) == PUBLIC


@pytest.mark.transformers
def test_every_public_name_can_be_had():
    pytest.importorskip("transformers")
    for name in PUBLIC:
        assert getattr(kernelgraft, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'AutoModelForEverything'"):
        _ = kernelgraft.AutoModelForEverything


def test_importing_the_package_imports_torch_alone():
    others = ("transformers", "kernels", "safetensors", "huggingface_hub", "accelerate", "tomli_w", "torch._dynamo")
    code = f"import sys, kernelgraft; print([name for name in {others!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_errors_are_one_family():
    errors = [value for value in vars(kernelgraft.errors).values() if isinstance(value, type)]
    assert all(issubclass(error, kernelgraft.errors.KernelGraftError) for error in errors)
    for name in ("ConfigError", "KernelError", "PlanError", "ConversionError", "CheckpointError"):
        assert issubclass(getattr(kernelgraft.errors, name), ValueError)


def test_what_a_graft_answers():
    names = {"plan", "remove", "verify", "benchmark", "update", "packed_names", "calls", "names", "reference", "model"}
    assert {name for name in vars(kernelgraft.Graft) if not name.startswith("_")} >= names - {"plan", "model"}
    assert inspect.signature(kernelgraft.graft).parameters["verify"].default is False
