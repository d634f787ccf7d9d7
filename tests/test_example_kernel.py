"""The example repository: loaded by us, and by Transformers' own loader, which its rules must serve as well."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kernelgraft.kernel import load_kernel, require_layout
from kernelgraft.reference import KernelReference

EXAMPLE = Path(__file__).parents[1] / "examples" / "my-kernel"


def example(name):
    return load_kernel(KernelReference.parse(f"{EXAMPLE}:{name}"))


@pytest.mark.parametrize("name", ["CustomRMSNorm", "RMSNormMLP"])
def test_it_is_a_repository_of_the_hub(name):
    kernel = example(name)
    assert kernel.name == name
    assert kernel.layout.__name__ == f"{name}Layout"
    assert kernel.origin == str(EXAMPLE / "build" / "torch-universal")
    assert (kernel.has_backward, kernel.can_torch_compile, kernel.supports) == (True, True, None)
    assert "forward" not in vars(kernel.layout)
    hub_metadata = json.loads((EXAMPLE / "build/torch-universal/metadata.json").read_text())
    assert kernel.forward_class.__module__.startswith(hub_metadata["id"])


def test_it_loads_where_there_is_no_transformers():
    code = """
import sys
sys.modules["transformers"] = None
from kernelgraft.kernel import load_kernel
from kernelgraft.reference import KernelReference
for name in ("CustomRMSNorm", "RMSNormMLP"):
    layout = load_kernel(KernelReference.parse(f"{sys.argv[1]}:{name}")).layout
    assert layout.conversion_mapping == [], layout
    print(sorted(layout.packing))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, str(EXAMPLE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "['scale']",
        "['down_proj.bias', 'down_proj.weight', 'gate_up_proj.bias', 'gate_up_proj.weight', 'scale']",
    ]


class Norm(nn.Module):
    """The arithmetic of Transformers' LlamaRMSNorm, in its order."""

    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x):
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * h.to(x.dtype)


class MLP(nn.Module):
    """The arithmetic of Transformers' LlamaMLP, in its order."""

    def __init__(self, hidden_size, intermediate_size, bias):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def packed(layout, sources):
    """Fills a layout by its `packing`, read as plainly as it is written."""
    with torch.no_grad():
        for name, parameter in layout.named_parameters():
            names = type(layout).packing[name]
            parts = [sources[n] for n in ([names] if isinstance(names, str) else names)]
            parameter.copy_(torch.cat(parts) if len(parts) > 1 else parts[0])
    return layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("intermediate_size", [48, 50, 128])
def test_both_kernels_give_the_same_bits_as_the_original(dtype, bias, intermediate_size):
    torch.manual_seed(0)
    norm, mlp = Norm(32, eps=1e-5).to(dtype), MLP(32, intermediate_size, bias).to(dtype)
    x = torch.randn(2, 5, 32).to(dtype)

    kernel = example("CustomRMSNorm")
    layout = packed(require_layout(kernel)(32, eps=1e-5).to(dtype), dict(norm.named_parameters()))
    assert torch.equal(kernel.forward_class.forward(layout, x), norm(x))
    assert list(layout.state_dict()) == ["scale"]

    kernel = example("RMSNormMLP")
    sources = {f"norm.{n}": p for n, p in norm.named_parameters()} | {f"mlp.{n}": p for n, p in mlp.named_parameters()}
    layout = packed(require_layout(kernel)(norm, mlp), sources)
    assert layout.act_fn is mlp.act_fn
    assert {p.dtype for p in layout.parameters()} == {dtype}
    found, expected = kernel.forward_class.forward(layout, x), mlp(norm(x))
    if intermediate_size % 16:
        # A matrix product may add up in another order at the edge of a width that is no whole number of vectors.
        torch.testing.assert_close(found, expected)
    else:
        assert torch.equal(found, expected)


# What the loader of Transformers itself makes of the repository. It is run in a process of its own because it leaves
# patched classes behind, and it refuses the CPU, so that the list of devices is extended there.
BY_TRANSFORMERS = """
import sys, tempfile, torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, KernelConfig, LlamaConfig, Qwen3Config
from transformers.utils import is_kernels_available, kernel_config

if not is_kernels_available():
    print("SKIP this Transformers refuses the installed kernels")
    sys.exit()
kernel_config.KERNELS_SUPPORTED_DEVICE_TYPES.append("cpu")
name, family = sys.argv[1:]
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8)
config = Qwen3Config(**sizes) if family == "qwen3" else LlamaConfig(**sizes, mlp_bias=True)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config).eval()
for parameter in model.parameters():
    parameter.data.normal_(0, 0.3)
tokens = torch.arange(10)[None]
with torch.no_grad():
    expected = model(tokens).logits

with tempfile.TemporaryDirectory() as folder:
    plain, again = Path(folder, "plain"), Path(folder, "again")
    model.save_pretrained(plain)
    fusion = (("RMSNorm", "model.layers.*.post_attention_layernorm"), ("MLP", "model.layers.*.mlp"))
    # A revision, because a version is looked for on the Hub before LOCAL_KERNELS is.
    mapping = {"RMSNorm" if name == "CustomRMSNorm" else fusion: (f"owner/my-kernel:{name}", {"revision": "main"})}
    loaded, info = AutoModelForCausalLM.from_pretrained(
        plain, use_kernels=True, kernel_config=KernelConfig(mapping), output_loading_info=True
    )
    assert not any(info.values()), info
    layouts = [n for n, m in loaded.named_modules() if type(m).__name__ == f"{name}Layout"]
    norms = [n for n, m in model.named_modules() if type(m).__name__.endswith("RMSNorm")]
    fused = [n for n in norms if n.endswith("post_attention_layernorm")]
    assert layouts == (norms if name == "CustomRMSNorm" else fused), layouts
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, expected)
    loaded.save_pretrained(again)
    one, two = load_file(plain / "model.safetensors"), load_file(again / "model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
print("OK", len(layouts))
"""


@pytest.mark.transformers
@pytest.mark.parametrize(
    ("name", "family", "sites"),
    [
        ("CustomRMSNorm", "qwen3", 13),
        ("CustomRMSNorm", "llama", 7),
        ("RMSNormMLP", "qwen3", 3),
        ("RMSNormMLP", "llama", 3),
    ],
)
def test_the_loader_of_transformers_takes_it(name, family, sites):
    pytest.importorskip("transformers")
    environment = os.environ | {"LOCAL_KERNELS": f"owner/my-kernel={EXAMPLE}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", BY_TRANSFORMERS, name, family]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()[-1]
    if said.startswith("SKIP"):
        pytest.skip(said.removeprefix("SKIP "))
    assert said == f"OK {sites}"
