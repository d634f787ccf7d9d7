"""Whole models with every kernel that ships: training goes as it went, and a real model says what it said."""

import pytest
import torch
from drawn import DEVICE

import kernelgraft
import test_smollm2
import tiny
from kernelgraft import KernelConfig

pytestmark = pytest.mark.transformers

folder = test_smollm2.folder


def reference(name):
    return f"kernelgraft.kernels:{name}"


HEAD = {("Linear", "lm_head"): reference("LinearCrossEntropy")}
ATTENTION = (("RMSNorm", "model.layers.*.input_layernorm"), ("Attention", "model.layers.*.self_attn"))
MLP = (("RMSNorm", "model.layers.*.post_attention_layernorm"), ("MLP", "model.layers.*.mlp"))
CONFIGS = {
    "members": {"RMSNorm": reference("RMSNorm"), "MLP": reference("SwiGLUMLP"), **HEAD},
    "fusions": {
        ATTENTION: reference("RMSNormAttention"),
        MLP: reference("RMSNormMLP"),
        "RMSNorm": reference("RMSNorm"),
        **HEAD,
    },
    "layers": {"DecoderLayer": reference("DecoderLayer"), "RMSNorm": reference("RMSNorm"), **HEAD},
}
"""A model's kernels, from the smallest that can stand alone to whole layers."""


def losses(model, seed, steps=200):
    """Of training on sentences that repeat: each step's, and the last ones far below the first."""
    generator = torch.Generator().manual_seed(seed)
    sentences = torch.randint(2, 60, (16, 12), generator=generator).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = []
    for _ in range(steps):
        batch = sentences[torch.randperm(16, generator=generator)[:4].to(DEVICE)]
        loss = model.train()(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found).float().cpu()


def model_of(seed):
    return tiny.model("qwen3", seed).to(DEVICE)


def rounded_otherwise(model, draw):
    """The model with each of its weights a rounding away, up or down: in one direction all, norms would undo it."""
    generator = torch.Generator().manual_seed(draw)
    with torch.no_grad():
        for parameter in model.parameters():
            sign = torch.randint(0, 2, parameter.shape, generator=generator).to(parameter) * 2 - 1
            parameter.mul_(1 + torch.finfo(parameter.dtype).eps * sign)
    return model


@pytest.fixture(scope="module")
def eager():
    """By seed, the losses of the model alone; and how far they go apart for first weights that differ by a rounding."""
    found, noise = {}, []
    for seed in range(3):
        found[seed] = alone = losses(model_of(seed), seed)
        for draw in range(2):
            noise.append((losses(rounded_otherwise(model_of(seed), draw), seed) - alone).abs().mean())
    return found, max(noise)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CONFIGS)
def test_200_steps_of_training(name, seed, eager):
    alone, noise = eager[0][seed], eager[1]
    assert alone[-20:].mean() < 0.7 * alone[:5].mean()
    model = model_of(seed)
    with kernelgraft.graft(model, KernelConfig(CONFIGS[name])) as graft:
        found = losses(model, seed)
        assert graft.calls.kernel >= 200
        assert graft.calls.reference == 0
    assert (found - alone).abs().mean() <= noise


@pytest.mark.parametrize("name", CONFIGS)
def test_a_real_model_says_what_it_said(name, folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": test_smollm2.QUESTION}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = inputs.to(DEVICE)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
    model = kernelgraft.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_kernels=True, kernel_config=KernelConfig(CONFIGS[name]), device_map=DEVICE
    )
    wanted = plain.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=16, do_sample=False), wanted)
    assert "Paris" in tokenizer.decode(wanted[0])
    graft = kernelgraft.graft_of(model)
    assert graft.calls.kernel >= len(graft.plan.sites)
    assert graft.calls.reference == 0
