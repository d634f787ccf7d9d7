"""The guide's two kernels in a real language model, which `make test` puts into the cache folder."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kernelgraft

pytestmark = pytest.mark.transformers

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "my-kernel"
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def folder():
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import smollm2
    finally:
        sys.path.remove(str(ROOT / "examples"))
    return smollm2.folder()


def config():
    return kernelgraft.KernelConfig(
        {
            (
                ("RMSNorm", "model.layers.*.post_attention_layernorm"),
                ("MLP", "model.layers.*.mlp"),
            ): f"{EXAMPLE}:RMSNormMLP",
            "RMSNorm": f"{EXAMPLE}:CustomRMSNorm",
        },
        inherit_mapping=False,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_logits_tokens_and_saved_tensors_are_the_originals(folder, dtype, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = kernelgraft.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, kernel_config=config())
    graft = kernelgraft.graft_of(model)

    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert graft.calls.kernel == len(graft.plan.sites) == 61
    assert graft.calls.reference == 0

    expected = plain.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False), expected)
    assert "Paris" in tokenizer.decode(expected[0])

    model.save_pretrained(tmp_path / "grafted")
    plain.save_pretrained(tmp_path / "plain")
    saved = load_file(tmp_path / "grafted" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "plain" / "model.safetensors").items():
        assert torch.equal(saved.pop(name), tensor), name
    assert not saved
    if dtype is torch.bfloat16:  # the checkpoint's own dtype: the very file comes back
        assert (tmp_path / "grafted" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()

    graft.remove()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


def mapped_ranges(file):
    """The address ranges at which this process has `file` mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    return [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]


def test_only_merged_parameters_are_copied_out_of_the_file(folder):
    model = kernelgraft.AutoModelForCausalLM.from_pretrained(folder, kernel_config=config())
    ranges = mapped_ranges((folder / "model.safetensors").resolve())
    assert ranges

    def is_mapped(parameter):
        return any(start <= parameter.data_ptr() < end for start, end in ranges)

    copied = {name for name, parameter in model.named_parameters() if not is_mapped(parameter)}
    assert copied == {name for name, _ in model.named_parameters() if "gate_up_proj" in name}
    assert len(copied) == 30
