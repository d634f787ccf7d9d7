"""Every kernel compiles for an H100 or H200, and for a smaller GPU, in a process without the interpreter.

And each module of the repository compiles by torch in one piece, and runs on fake tensors.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drawn import DEVICE, DTYPES
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

import kernelgraft
from kernelgraft.kernels import layers

pytest.importorskip("triton")

KERNELS = """_add_rows _add_splits _attend_split _backward _backward_blocks _backward_few_rows _backward_rows _combine
    _decode_split _forward _forward_blocks _forward_rows _loss_rows _one_token _product _some_tokens"""


@pytest.mark.parametrize("architecture", ["90", "89"])
def test_all_that_is_launched_compiles(architecture):
    script = Path(__file__).with_name("compiled_without_gpu.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    kernels = [each for each in KERNELS.split() if architecture == "90" or each != "_product"]
    done = subprocess.run(
        [sys.executable, script, architecture], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(line.split()[0] for line in done.stdout.splitlines()) == kernels


# --- modules

AT = {
    "DecoderLayer": ("qwen3", "DecoderLayer"),
    "GeGLUMLP": ("gemma3", "MLP"),
    "LinearCrossEntropy": ("llama", ("Linear", "lm_head")),
    "OffsetRMSNorm": ("gemma3", ("RMSNorm", "model.layers.*.input_layernorm")),
    "RMSNorm": ("llama", ("RMSNorm", "model.layers.*.input_layernorm")),
    "RMSNormAttention": (
        "qwen3",
        (("RMSNorm", "model.layers.*.input_layernorm"), ("Attention", "model.layers.*.self_attn")),
    ),
    "RMSNormMLP": (
        "qwen3",
        (("RMSNorm", "model.layers.*.post_attention_layernorm"), ("MLP", "model.layers.*.mlp")),
    ),
    "SwiGLUMLP": ("llama", "MLP"),
}
"""The model in which each kernel stands, and the key of the mapping."""

HIDDEN = 32
MANY = {"LinearCrossEntropy": 70}
"""Tokens for which each is what it is in training, where that takes more than 6: logits that wait."""


def test_every_kernel_stands_somewhere():
    assert sorted(AT) == layers.__all__


def called(name, dtype, tokens):
    """A kernel's module in a model, and the arguments of its call there."""
    import tiny

    kind, key = AT[name]
    model = tiny.model(kind, num_hidden_layers=1).to(DEVICE, dtype)
    graft = kernelgraft.graft(model, {key: f"kernelgraft.kernels:{name}"})
    (site,) = graft.plan.sites
    module = model.get_submodule(site.host)
    calls = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(**tiny.inputs_of(model, kind, batch=1, length=tokens), use_cache=False)
    hook.remove()
    return module, calls[0]


def outcome(run, parameters, call, trains):
    """The gradients of hidden states and parameters, and what a call gives."""
    leaves = []

    def leaf(x):
        if not trains or x.shape[-1] != HIDDEN:  # angles take no gradient
            return x
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    args, kwargs = tree_map_only(torch.Tensor, leaf, call)
    with torch.set_grad_enabled(trains):
        out = run(*args, **kwargs)
    if not trains:
        return [], out
    y = out[0] if isinstance(out, tuple) else out
    return torch.autograd.grad(y.float().sin().sum(), [*leaves, *parameters]), out


def on_fakes(module, parameters, *args, **kwargs):
    return functional_call(module, parameters, args, kwargs)


def described(x):
    return tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad


# Dynamo makes an instance itself, and means to hear nothing of it.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.transformers
@pytest.mark.usefixtures("few_are_four", "in_triton")
@pytest.mark.parametrize("name", AT)
def test_each_module_compiles_in_one_piece(name):
    torch._dynamo.reset()  # after another length of other tests this one would be symbolic, and take longer
    module, call = called(name, torch.float32, MANY.get(name, 6))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found, wanted = (outcome(run, [*module.parameters()], call, True) for run in (compiled, module))
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-4)  # gradients of small weights are small


@pytest.mark.transformers
@pytest.mark.usefixtures("few_are_four", "in_triton")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", AT)
def test_each_module_runs_on_fake_tensors(name, dtype):
    for tokens, trains in ((3, False), (MANY.get(name, 6), True)):
        module, call = called(name, dtype, tokens)
        held = dict(module.named_parameters())
        real = outcome(module, held.values(), call, trains)
        with FakeTensorMode() as mode:
            faked, of_fakes = tree_map_only(torch.Tensor, mode.from_tensor, (held, call))
            run = functools.partial(on_fakes, module, faked)
            fake = outcome(run, faked.values(), of_fakes, trains)
        assert tree_map_only(torch.Tensor, described, fake) == tree_map_only(torch.Tensor, described, real)
