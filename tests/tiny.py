"""Tiny random models of several families of Transformers, and what the tests do with them again and again."""

from pathlib import Path

import pytest
import torch

from kernelgraft import KernelConfig

transformers = pytest.importorskip("transformers")

EXAMPLE = Path(__file__).parents[1] / "examples" / "my-kernel"
KERNELS = Path(__file__).parent / "repositories" / "qwen3"

SEQUENCE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
DECODER = {**SEQUENCE, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 63}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}

KINDS = {
    "llama": ("LlamaForCausalLM", DECODER),
    "qwen2": ("Qwen2ForCausalLM", DECODER),
    "qwen3": ("Qwen3ForCausalLM", {**DECODER, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", {**DECODER, "head_dim": 8, "sliding_window": None}),
    "gemma3": ("Gemma3ForCausalLM", {**DECODER, "head_dim": 8, "sliding_window": 16}),
    "phi3": ("Phi3ForCausalLM", DECODER),
    "cohere": ("CohereForCausalLM", DECODER),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {**DECODER, **EXPERTS, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24},
    ),
    "mixtral": ("MixtralForCausalLM", {**DECODER, **EXPERTS, "num_local_experts": 4, "sliding_window": None}),
    "bert": ("BertForMaskedLM", SEQUENCE),
    "vit": (
        "ViTForImageClassification",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
        },
    ),
}
"""The model class of each kind, and the sizes of its config."""


def model_class(kind):
    return getattr(transformers, KINDS[kind][0])


def config(kind, **changes):
    return model_class(kind).config_class(**{**KINDS[kind][1], **changes})


def model(kind, seed=0, **changes):
    """A random model in eval mode, whose norms matter: their weights are drawn from 0.5 to 1.5, biases are not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = model_class(kind)(config(kind, **changes))
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.ndim == 1 and "norm" in name.lower() and name.endswith("weight"):
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith("bias"):
                    parameter.normal_(0, 0.1)
    return made.eval()


def inputs(kind, seed=0, batch=2, length=7):
    """Keyword arguments for one forward of a model of this kind."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    return {"input_ids": torch.randint(2, SEQUENCE["vocab_size"] - 1, (batch, length), generator=generator)}


def inputs_of(model, kind, **kwargs):
    """`inputs` where the model's first parameter is."""
    device = next(model.parameters()).device
    return {name: each.to(device) for name, each in inputs(kind, **kwargs).items()}


def logits(model, kind="qwen3", **kwargs):
    with torch.no_grad():
        return model(**inputs_of(model, kind, **kwargs)).logits


def generate(model, num_tokens=6):
    """Tokens by greedy search from a prompt that is the same each time."""
    prompt = inputs_of(model, "qwen3", batch=2, length=5)["input_ids"]
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False)


def gradients(model, kind="qwen3"):
    """The gradients of a loss over the logits, by parameter name; the parameters' own `grad` is left as it was."""
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss(model, kind), parameters.values(), allow_unused=True)
    return dict(zip(parameters, grads, strict=True))


def loss(model, kind="qwen3"):
    return model(**inputs_of(model, kind)).logits.float().pow(2).mean()


def switch_checkpointing(model, on, *args, **kwargs):
    """Activation checkpointing, under the name that the installed Transformers has for it."""
    new, old = (f"{name}_checkpointing_{'enable' if on else 'disable'}" for name in ("activation", "gradient"))
    getattr(model, new if hasattr(model, new) else old)(*args, **kwargs)


FUSION = (("RMSNorm", "model.layers.*.post_attention_layernorm"), ("MLP", "model.layers.*.mlp"))


def guide_mapping(fusion=FUSION):
    """The two examples of Transformers' guide together, from the example repository."""
    return {"RMSNorm": f"{EXAMPLE}:CustomRMSNorm", fusion: f"{EXAMPLE}:RMSNormMLP"}


def guide_config(**options):
    return KernelConfig(guide_mapping(), **{"inherit_mapping": False, **options})
