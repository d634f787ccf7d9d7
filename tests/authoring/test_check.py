"""Each mistake that is planted in a repository is found, by the right rule and with the right fix."""

import itertools
import json
from pathlib import Path

import pytest
from made import code_of, config_of, edit, found, skeleton, the_one

import tiny
from kernelgraft.authoring.check import check
from kernelgraft.authoring.new import new
from kernelgraft.errors import AuthoringError

pytestmark = pytest.mark.transformers

numbers = itertools.count()


@pytest.fixture(scope="module")
def qwen3():
    return skeleton("qwen3")


@pytest.fixture
def norm(tmp_path):
    return new(f"norm-{next(numbers)}", replaces="RMSNorm", folder=tmp_path)


@pytest.fixture
def fused(tmp_path, qwen3):
    return new(f"fused-{next(numbers)}", fuses=["RMSNorm", "MLP"], model=qwen3, folder=tmp_path)


def test_the_example_passes(qwen3):
    report = check(tiny.EXAMPLE, qwen3, tiny.guide_config())
    assert (report.findings, report.not_checked) == ((), ())
    assert report.kernels == ("CustomRMSNorm", "RMSNormMLP")


def test_without_a_model_it_says_what_it_left(norm):
    report = check(norm.folder)
    assert report.passed
    assert "give a model" in report.not_checked[0]


# --- classes


def test_layers_is_missing(norm):
    edit(norm, "from . import layers", "", "__init__.py")
    finding = the_one(norm, "layers")
    assert "no `layers`" in finding.what
    assert "from . import layers" in finding.fix
    edit(norm, '__all__ = ["layers"]', "class layers: ...", "__init__.py")
    assert "lists no kernel" in the_one(norm, "layers").what


def test_a_layout_under_another_name(norm):
    edit(norm, f"class {norm.kernel}Layout", "class ScaledLayout")
    finding = the_one(norm, "naming")
    assert "ScaledLayout is the layout of no kernel" in finding.what
    assert f"'{norm.kernel}Layout'" in finding.fix
    assert finding.where.startswith(f"{code_of(norm)}:")


def test_a_layout_in_another_module(norm):
    text = code_of(norm).read_text()
    start, end = text.index(f"class {norm.kernel}Layout"), text.index(f"class {norm.kernel}(")
    code_of(norm).with_name("layout.py").write_text("import torch\nfrom torch import nn\n\n" + text[start:end])
    code_of(norm).write_text(text[:start] + text[end:])
    edit(norm, "from . import layers", "from . import layers, layout", "__init__.py")
    finding = the_one(norm, "naming")
    assert f"{norm.kernel}Layout is in" in finding.what
    assert f"beside {norm.kernel}" in finding.fix


def test_an_alias(norm):
    edit(norm, f"import {norm.kernel}", f"import {norm.kernel} as Fast", "layers.py")
    edit(norm, f'"{norm.kernel}"', '"Fast"', "layers.py")
    finding = the_one(norm, "naming")
    assert ("'Fast'" in finding.what, finding.severity) == (True, "warning")


def test_state_in_the_kernel(norm):
    edit(norm, "    has_backward = True", "    limit = 3\n\n    def __init__(self):\n        super().__init__()\n")
    whats = " ".join(each.what for each in found(norm, "state"))
    assert "defines __init__" in whats
    assert "limit = int" in whats
    assert all(f"{norm.kernel}Layout" in each.fix for each in found(norm, "state") if each.severity == "error")


def test_helpers_are_a_warning(norm):
    edit(
        norm,
        "    def forward",
        "    @staticmethod\n    def supports(hidden_states):\n        return True\n\n    def forward",
    )
    finding = the_one(norm, "state")
    assert ("supports" in finding.what, finding.severity) == (True, "warning")
    assert check(norm.folder).passed


def test_no_forward(norm):
    edit(norm, "def forward", "def forwards")
    assert "def forward" in the_one(norm, "forward").fix


def test_an_import_that_raises(norm):
    edit(norm, "import torch\n", "import torch\n1 / 0\n")
    assert "ZeroDivisionError" in the_one(norm, "import").what


# --- code


def test_imports_that_the_hub_does_not_allow(norm):
    package = code_of(norm).parent.name
    guarded = "try:\n    import triton, einops\nexcept ImportError:\n    pass\n"
    further = f"import transformers\nfrom {package} import reference\nimport math\n{guarded}"
    edit(norm, "import torch\n", "import torch\n" + further)
    first, second = sorted(found(norm, "imports"), key=lambda each: each.what)
    assert "'transformers'" in first.what
    assert "except ImportError" in first.fix
    assert "its own package" in second.what
    assert "from . import" in second.fix


def test_a_dependency_that_may_be_declared(norm):
    edit(norm, "import torch\n", "import torch\n\ndef late():\n    import einops\n    return einops\n")
    assert 'python-depends = ["einops"]' in the_one(norm, "imports").fix
    build = Path(norm.folder) / "build.toml"
    build.write_text(build.read_text().replace("version = 1", 'version = 1\npython-depends = ["einops"]'))
    assert found(norm, "imports") == []


def test_sizes_off_a_config(norm):
    edit(
        norm,
        "        return rms_norm(",
        "        hidden_states.view(-1, self.config.hidden_size, self.num_heads)\n        return rms_norm(",
    )
    first, second = found(norm, "sizes")
    assert "self.config.hidden_size" in first.what
    assert "self.num_heads" in second.what
    assert "hidden_states.shape[-1]" in first.fix


# --- metadata


def test_metadata(norm):
    file = Path(norm.folder) / "build" / "torch-cpu" / "metadata.json"
    good = json.loads(file.read_text())

    def said(**changes):
        file.write_text(json.dumps({key: value for key, value in {**good, **changes}.items() if value is not None}))
        return the_one(norm, "metadata.json")

    assert "license" in said(version=None, license=None).what or "version" in said(version=None).what
    assert "Invalid kernel name" in said(name="Not_A_Name").what
    assert "numpy" in said(**{"python-depends": ["numpy"]}).what
    other = json.loads((file.parents[1] / "torch-cuda" / "metadata.json").read_text())
    assert "two modules cannot share a name" in said(id=other["id"]).what
    assert said(id=other["id"]).fix == f"run `kernelgraft export {norm.folder}`"
    file.write_text(json.dumps(good))
    assert found(norm, "metadata.json") == []
    (file.parent / "kernel.py").write_text("changed = True\n")
    assert "digests are not those of the files" in the_one(norm, "metadata.json").what
    file.unlink()
    assert "missing" in the_one(norm, "metadata.json").what


def test_a_build_of_other_code_and_none_at_all(norm):
    edit(norm, "# Right", "# Still right")
    assert {each.severity for each in found(norm, "metadata.json")} == {"warning"}
    assert "built of other code" in found(norm, "metadata.json")[0].what
    (Path(norm.folder) / "build").rename(Path(norm.folder) / "tests" / "build")
    assert "there is no build" in the_one(norm, "metadata.json").what


# --- in a model


def test_a_signature_that_does_not_fit(norm, qwen3):
    edit(norm, "def forward(self, hidden_states: torch.Tensor)", "def forward(self, hidden_states, residual)")
    finding = the_one(norm, "signature", qwen3)
    assert "needs 'residual'" in finding.what
    assert "parameters of the original's" in finding.fix


ATTENTION = """
import torch
from torch import nn

class Attention(nn.Module):
    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        cos, sin = position_embeddings
        q = self.q_norm(self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim)))
        return self.o_proj((q * cos.unsqueeze(-2)).flatten(-2)), None
"""


def test_keywords_that_are_dropped(tmp_path, qwen3):
    (tmp_path / "__init__.py").write_text("from . import layers\n")
    (tmp_path / "layers.py").write_text("from .kernel import Attention\n")
    (tmp_path / "kernel.py").write_text(ATTENTION)
    (tmp_path / "kernels.toml").write_text('[[kernel]]\nreplaces = "Attention"\nuse = "./:Attention"\n')
    report = check(tmp_path, qwen3)
    dropped = [each for each in report.findings if each.rule == "keywords"]
    assert len(dropped) == 1
    assert "takes it and drops it" in dropped[0].what
    assert "use 'past_key_values'" in dropped[0].fix
    assert dropped[0].where == "model.layers.0.self_attn"


MERGED = '        "gate_up_proj.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],\n'


def test_rules_that_do_not_cover(fused, qwen3):
    edit(fused, MERGED, "")
    finding = the_one(fused, "rules", qwen3)
    assert "Nothing fills" in finding.what
    assert "gate_up_proj.weight" in finding.what
    assert "kernelgraft plan" in finding.fix


def test_rules_that_cannot_be_read(fused):
    edit(fused, '"mlp.down_proj.weight"', "3")
    assert "packing['down_proj.weight']" in the_one(fused, "rules").what


def test_rules_without_a_way_back(norm, qwen3):
    edit(norm, '"weight": "weight",', '"weight": {"sources": "weight", "operations": [["cast", "float16"]]},')
    edit(norm, "torch.ones(size)", "torch.ones(size, dtype=torch.float16)")
    finding = the_one(norm, "rules", qwen3)
    assert "cannot be had back" in finding.what
    assert "moving elements only" in finding.fix


def test_an_attribute_that_nothing_has(norm, qwen3):
    edit(norm, "self.weight, self.eps)", "self.weight, self.epsilon)")
    assert "self.epsilon" in the_one(norm, "attributes", qwen3).what


def test_values_read_in_a_forward(norm, qwen3):
    edit(norm, "        return rms_norm(", "        hidden_states.sum().item()\n        return rms_norm(")
    finding = the_one(norm, "fake tensors", qwen3)
    assert ".item()" in finding.fix
    assert finding.where == "model.layers.0.self_attn.q_norm"


def test_a_promise_of_torch_compile(norm, qwen3):
    edit(norm, "        return rms_norm(", "        torch._dynamo.graph_break()\n        return rms_norm(")
    finding = the_one(norm, "torch.compile", qwen3)
    assert "does not compile as one graph" in finding.what
    assert "can_torch_compile = False" in finding.fix
    edit(norm, "can_torch_compile = True", "can_torch_compile = False")
    assert found(norm, "torch.compile", qwen3) == []


def test_a_missing_promise_is_a_warning(norm, qwen3):
    edit(norm, "can_torch_compile = True", "can_torch_compile = False")
    assert the_one(norm, "torch.compile", qwen3).severity == "warning"


def test_a_backward_that_is_not_there(norm, qwen3):
    edit(
        norm,
        "        return rms_norm(hidden_states, self.weight,",
        "        return rms_norm(hidden_states, self.weight.detach(),",
    )
    finding = the_one(norm, "backward", qwen3)
    assert "no gradient for weight" in finding.what
    assert "has_backward = False" in finding.fix
    edit(norm, "has_backward = True", "has_backward = False")
    assert found(norm, "backward", qwen3) == []


def test_all_at_once(fused, qwen3):
    edit(fused, "import torch\n", "import torch\nimport numpy\n")
    edit(fused, "    has_backward = True", "    scale = 2\n    has_backward = True")
    edit(fused, '"mlp.down_proj.weight"', "3")
    report = check(fused.folder, qwen3)
    assert [each.rule for each in report.errors] == ["imports", "rules", "state"]
    assert "does not load yet" in report.not_checked[0]
    assert not report.passed
    shown = str(report)
    assert shown.count("  fix: ") == len(report.findings)
    assert f"{len(report.errors)} errors" in shown
    assert json.loads(json.dumps(report.to_json()))["passed"] is False


def test_what_is_no_repository(tmp_path):
    with pytest.raises(AuthoringError, match="no kernel repository"):
        check(tmp_path)
    with pytest.raises(AuthoringError, match="no folder"):
        check(tmp_path / "nowhere")


def test_nothing_of_the_model_has_changed(norm, qwen3):
    before = [(name, type(module)) for name, module in qwen3.named_modules()]
    check(norm.folder, qwen3)
    assert [(name, type(module)) for name, module in qwen3.named_modules()] == before
    assert all(parameter.is_meta for parameter in qwen3.parameters())
    config_of(norm)
