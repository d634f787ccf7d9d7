"""A pickle of a grafted model keeps its kernels, in a fresh process too, or raises; copies are models of their own."""

import copy
import io
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import kernelgraft
import zoo
from kernelgraft import graft_of
from kernelgraft.errors import KernelError
from twins import KINDS, assert_same_state, pair, run

TESTS = Path(__file__).parent

KERNELS = """
    import torch
    from torch import nn
    from torch.nn import functional as F

    class FileNormLayout(nn.Module):
        packing = {"scale": "weight"}

        def __init__(self, hidden):
            super().__init__()
            self.scale = nn.Parameter(torch.empty(hidden))

    class FileNorm(nn.Module):
        def forward(self, x):
            return F.rms_norm(x, x.shape[-1:], self.scale)

    class FileTwist(nn.Module):
        def forward(self, x):
            return F.linear(x, self.a.weight) - F.linear(x, self.b.weight)

    class layers:
        FileNorm = FileNorm
        FileTwist = FileTwist
"""


def fresh_process(file, code):
    """Runs code in which `model` is the pickle and `zoo` the module of that name."""
    head = f"import torch, zoo, kernelgraft\nmodel = torch.load({str(file)!r}, weights_only=False)\n"
    path = os.pathsep.join([str(TESTS), str(Path(kernelgraft.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", head + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_kernels_given_as_classes_run_in_a_fresh_process(tmp_path):
    twin, model, _ = pair("zoo")
    run("zoo", model)
    torch.save(model, tmp_path / "model.pt")
    torch.save((twin.state_dict(), run("zoo", model), run("zoo", twin)), tmp_path / "expected.pt")
    done = fresh_process(
        tmp_path / "model.pt",
        f"""
        state, grafted, untouched = torch.load({str(tmp_path / "expected.pt")!r})
        graft = kernelgraft.graft_of(model)
        before = graft.calls
        assert torch.equal(model(zoo.inputs()), grafted)
        assert graft.calls.kernel - before.kernel == len(graft.plan.sites) == 9
        assert graft.calls.reference == before.reference
        found = model.state_dict()
        assert list(found) == list(state)
        assert "blocks.0.norm.w12" in dict(model.named_parameters())
        graft.remove()
        assert type(model) is zoo.Zoo and type(model.mix) is zoo.Mix
        assert all(torch.equal(found[name], state[name]) for name in state if "batch" not in name)
        torch.testing.assert_close(model(zoo.inputs()), untouched)
        """,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def kernel_file(tmp_path):
    file = tmp_path / "kernels_here.py"
    file.write_text(textwrap.dedent(KERNELS))
    return file


@pytest.fixture
def from_file(kernel_file, tmp_path):
    model = zoo.model()
    mapping = {"Norm": f"{kernel_file}:FileNorm", "Twist": f"{kernel_file}:FileTwist"}
    graft = kernelgraft.graft(model, mapping, example_inputs=zoo.inputs())
    torch.save(model, tmp_path / "model.pt")
    torch.save(model(zoo.inputs()), tmp_path / "expected.pt")
    assert graft.calls.kernel == 4
    return tmp_path / "model.pt"


def test_kernels_given_by_reference_are_loaded_again(from_file, tmp_path):
    done = fresh_process(
        from_file,
        f"""
        assert torch.equal(model(zoo.inputs()), torch.load({str(tmp_path / "expected.pt")!r}))
        graft = kernelgraft.graft_of(model)
        assert graft.calls.kernel == 4, graft.calls
        assert "kernel=FileTwist" in repr(model.twist)
        graft.remove()
        assert type(model.twist) is zoo.Twist and type(model.norm) is zoo.Norm
        """,
    )
    assert done.returncode == 0, done.stderr


def test_a_kernel_that_has_changed_meanwhile_is_refused(from_file, kernel_file):
    kernel_file.write_text(kernel_file.read_text() + "\n# another version\n")
    with pytest.raises(KernelError, match=rf"made with {kernel_file}:FileNorm at digest .*Restore that version"):
        torch.load(from_file, weights_only=False)


def test_a_kernel_that_is_gone_is_an_error(from_file, kernel_file):
    kernel_file.unlink()
    with pytest.raises(KernelError, match=str(kernel_file)):
        torch.load(from_file, weights_only=False)


def test_a_kernel_that_no_other_process_can_import_is_not_pickled():
    class Local(nn.Module):
        def forward(self, x):
            return x * self.weight

    model = zoo.model()
    kernelgraft.graft(model, {"Norm": Local})
    with pytest.raises((AttributeError, pickle.PicklingError), match="Local"):
        pickle.dumps(model)


def restored(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, restored])
def test_a_copy_is_a_grafted_model_of_its_own(make):
    twin, model, graft = pair("zoo")
    twin.eval(), model.eval()
    other = make(model)
    assert type(other) is type(model)
    assert torch.equal(run("zoo", other), run("zoo", model))
    assert graft_of(other) is not graft
    assert graft_of(other).model is other
    assert graft_of(other).calls.kernel == graft.calls.kernel == len(graft.plan.sites)
    assert graft_of(other).plan == graft.plan
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    with graft_of(other).reference():
        run("zoo", model)
    assert graft.calls.reference == 0
    assert_same_state(model.state_dict(), twin.state_dict())
    graft_of(other).remove()
    assert type(other) is zoo.Zoo
    assert graft.is_applied
    assert set(map(type, other.modules())) == set(map(type, twin.modules()))
    assert not any(parameter.any() for name, parameter in other.named_parameters() if name != "legacy.bias")
    assert_same_state(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("make", [copy.deepcopy, restored])
def test_a_copy_of_a_model_that_is_compiled_in_place_runs_itself(make):
    _, model, _ = pair("zoo")
    model.eval().compile(backend="eager")
    for module in (model.mix, model.norm):
        module.compile(backend="eager")
    expected = run("zoo", model)
    other = make(model)
    assert not [path for path, module in other.named_modules() if "_compiled_call_impl" in vars(module)]
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert torch.equal(run("zoo", other), expected)


@pytest.mark.parametrize("path", [*zoo.PLACES, "blocks.1"])
@pytest.mark.parametrize("make", [copy.deepcopy, restored])
def test_a_copy_of_one_module(path, make):
    twin, model, graft = pair("zoo")
    twin.eval(), model.eval()
    other = make(model.get_submodule(path))
    assert_same_state(other.state_dict(), twin.get_submodule(path).state_dict())
    before = graft.calls
    if path != "blocks.0.gate":  # absorbed, it passes through what the host has done
        torch.testing.assert_close(other(zoo.inputs()), model.get_submodule(path)(zoo.inputs()))
        assert graft.calls.kernel == before.kernel + 1
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    assert_same_state(model.state_dict(), twin.state_dict())


def test_a_copy_that_shares_its_tensors():
    twin, model, _ = pair("zoo")
    other = copy.copy(model.mix)
    assert other.qkv.weight is model.mix.qkv.weight
    assert_same_state(other.state_dict(), twin.mix.state_dict())
    assert torch.equal(other(zoo.inputs()), model.mix(zoo.inputs()))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "zoo"])
def test_a_model_of_transformers_is_pickled_as_well_as_without_the_graft_or_raises(kind):
    twin, model, _ = pair(kind)
    try:
        pickle.dumps(twin)
    except Exception as error:  # Transformers' own function modules cannot be pickled beside some versions of kernels
        with pytest.raises(type(error)):
            pickle.dumps(model)
        return
    other = restored(model)
    assert torch.equal(run(kind, other), run(kind, model))
    assert graft_of(other).calls.kernel == graft_of(model).calls.kernel > 0
    assert_same_state(other.state_dict(), twin.state_dict())


def test_what_weights_only_loading_takes():
    twin, model, _ = pair("zoo")
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    assert_same_state(torch.load(buffer, weights_only=True), twin.state_dict())
