"""Where kernels are loaded from, and what is said about a place that holds none."""

import pickle
import sys
import textwrap
import threading

import kernels
import pytest
import torch

from kernel_repositories import (
    LAYERS,
    hub_cache,
    ids,
    load,
    refused,
    source,
    write_file,
    write_package,
    write_repository,
)
from kernelgraft.errors import KernelError
from kernelgraft.kernel import load_kernel, require_layout
from kernelgraft.reference import KernelReference
from kernelgraft.source import digest_of


@pytest.fixture(autouse=True)
def _clean_modules():
    before = set(sys.modules)
    yield
    for name in [name for name in sys.modules if name.startswith("_kernelgraft_") and name not in before]:
        del sys.modules[name]


# --- the three local forms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_file, write_package, write_repository])
def test_every_local_form(write, tmp_path):
    place = write(tmp_path / "a") if write is not write_file else write_file(tmp_path)
    kernel = load(place)
    assert (kernel.name, kernel.layout.__name__, kernel.function) == ("FastNorm", "FastNormLayout", None)
    assert kernel.forward_class.forward(None, torch.ones(1)).item() == 2
    assert (kernel.has_backward, kernel.can_torch_compile, kernel.supports) == (True, True, None)
    assert kernel.reference == f"{place}:FastNorm"
    folder = place / "build" / "torch-universal" if write is write_repository else place
    assert (kernel.origin, kernel.digest) == (str(folder), digest_of(folder))
    assert require_layout(kernel) is kernel.layout
    assert sys.modules[kernel.forward_class.__module__].FastNorm is kernel.forward_class
    assert pickle.loads(pickle.dumps(kernel.forward_class)) is kernel.forward_class

    assert load(place) == kernel
    assert load(place).forward_class is kernel.forward_class
    # The name is the class's own, whatever `layers` calls it.
    assert load(place, "alias") == kernel
    assert load(place, "alias").name == "FastNorm"

    bare = load(place, "Bare")
    assert bare.forward_class.__module__ == kernel.forward_class.__module__
    assert (bare.layout, bare.has_backward, bare.can_torch_compile) == (None, False, False)
    assert bare.supports(torch.ones(1)) is True
    assert bare.supports(torch.ones(1).half()) == "float32 only"

    rotary = load(place, "rotary")
    assert (rotary.name, rotary.forward_class, rotary.layout) == ("rotary", None, None)
    assert rotary.function(1, 2) == (2, 1)
    assert (rotary.has_backward, rotary.can_torch_compile) == (True, False)


@pytest.mark.parametrize("write", [write_file, write_package])
def test_an_edited_file_is_another_class_and_the_old_one_stays(write, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    place = write(tmp_path / "a") if write is write_package else write_file(tmp_path)
    first = load(place)
    write(place.parent if write is write_file else place, factor=3)  # the same size within the same second
    second = load(place)
    assert second.forward_class is not first.forward_class
    assert second != first
    assert second.digest != first.digest
    assert first.forward_class.forward(None, torch.ones(1)).item() == 2
    assert second.forward_class.forward(None, torch.ones(1)).item() == 3
    write(place.parent if write is write_file else place, factor=2)
    assert load(place) == first
    assert not list(tmp_path.rglob("*.pyc"))


def test_the_same_place_by_another_way_is_the_same_class(tmp_path, monkeypatch):
    place = write_file(tmp_path)
    (tmp_path / "link.py").symlink_to(place)
    kernel = load(place)
    monkeypatch.chdir(tmp_path)
    for other in ("./fast.py", "fast.py", f"{tmp_path}/../{tmp_path.name}/fast.py", tmp_path / "link.py"):
        assert load(other) == kernel
    assert load("./fast.py").reference == f"{place}:FastNorm"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/fast.py") == kernel


def test_the_same_code_at_two_places_is_two_classes(tmp_path):
    one, two = load(write_package(tmp_path / "one")), load(write_package(tmp_path / "two"))
    assert one != two
    assert one.digest == two.digest


def test_the_digest_leaves_out_bytecode_and_hidden_files(tmp_path):
    folder = write_package(tmp_path / "a")
    before = digest_of(folder)
    for name in ("__pycache__/x.cpython-311.pyc", ".git/HEAD", "x.pyc", ".hidden"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    assert digest_of(folder) == before
    (folder / "fast.py").rename(folder / "slow.py")
    assert digest_of(folder) != before


@pytest.mark.parametrize("write", [write_file, write_package])
def test_an_exception_in_the_import_leaves_nothing(write, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    place = write(tmp_path / "a") if write is write_package else write_file(tmp_path)
    code = place if place.is_file() else place / "fast.py"
    good = code.read_text()
    code.write_text(good + "\nraise RuntimeError('no such card')\n")
    before = set(sys.modules)
    with pytest.raises(KernelError) as error:
        load(place)
    assert isinstance(error.value.__cause__, RuntimeError)
    for word in ("no such card", str(code), f"line {len(good.splitlines()) + 2}", "RuntimeError"):
        assert word in str(error.value)
    assert set(sys.modules) == before
    code.write_text("def broken(:\n")
    assert "SyntaxError" in refused(place)
    code.write_text("import no_such_package_anywhere\n")
    assert "no_such_package_anywhere" in refused(place)
    code.write_text(good)
    assert load(place).name == "FastNorm"
    code.write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load(place)
    assert sys.dont_write_bytecode is False


def test_threads_load_one_class(tmp_path):
    places = [write_file(tmp_path), write_repository(tmp_path / "a")]
    found, start = [], threading.Barrier(8)

    def work():
        start.wait()
        found.append(tuple(load(place) for place in places))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_an_installed_module_is_the_one_that_others_import(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"installed_{next(ids)}"
    write_package(tmp_path / name / "fast")
    (tmp_path / name / "__init__.py").write_text("")
    kernel = load(f"{name}.fast")
    assert sys.modules[f"{name}.fast"].layers.FastNorm is kernel.forward_class
    assert (kernel.origin, kernel.reference) == (str(tmp_path / name / "fast"), f"{name}.fast:FastNorm")
    digest = kernel.digest
    (tmp_path / name / "fast" / "fast.py").write_text(source(factor=5))
    assert load(f"{name}.fast").digest == digest  # what this process holds, not what lies on the disk by now

    message = refused(f"{name}.slow")
    assert f"no Python module '{name}.slow'" in message
    assert "./slow.py:FastNorm" in message
    (tmp_path / name / "broken.py").write_text("import no_such_package_anywhere")
    message = refused(f"{name}.broken")
    assert "no_such_package_anywhere" in message
    assert "line 1" in message
    (tmp_path / name / "plain.py").write_text("class FastNorm: ...")
    assert "has no `layers`" in refused(f"{name}.plain")


# --- repositories in the Hub's layout ---------------------------------------------------------------------------------


def test_an_edited_repository_is_refused_because_the_library_keeps_the_old_code(tmp_path):
    repository = write_repository(tmp_path / "a", module_id=f"_edited_{next(ids)}")
    load(repository)
    write_package(repository / "build" / "torch-universal", factor=3)
    message = refused(repository)
    assert "edited" in message
    assert "new process" in message


def test_two_repositories_of_one_id_are_refused(tmp_path):
    first = write_repository(tmp_path / "one", module_id="_taken_id")
    kernel = load(first)
    message = refused(write_repository(tmp_path / "two", module_id="_taken_id"))
    assert "'_taken_id'" in message
    assert str(first) in message
    assert load(first) == kernel


def test_a_variant_for_another_system_is_refused_with_the_trace(tmp_path):
    repository = write_repository(tmp_path / "a", variant="torch-npu")
    message = refused(repository)
    assert "torch-npu" in message
    assert str(repository) in message


def test_a_variant_folder_and_the_backend(tmp_path):
    repository = write_repository(tmp_path / "a", variant="torch-cpu")
    kernel = load(repository / "build" / "torch-cpu")
    assert kernel.origin == str(repository / "build" / "torch-cpu")
    assert load_kernel(KernelReference.parse(f"{repository}:FastNorm"), backend="cpu") == kernel
    with pytest.raises(KernelError, match="'tpu'"):
        load_kernel(KernelReference.parse(f"{repository}:FastNorm"), backend="tpu")


def test_broken_metadata_and_a_broken_import(tmp_path):
    repository = write_repository(tmp_path / "a")
    (repository / "build" / "torch-universal" / "layers.py").write_text("1 / 0")
    assert "ZeroDivisionError" in refused(repository)
    (repository / "build" / "torch-universal" / "metadata.json").write_text("{}")
    assert "missing field" in refused(repository)


# --- the Hub, offline -------------------------------------------------------------------------------------------------

COMMITS = {"v1": "1" * 40, "v2": "2" * 40, "main": "3" * 40}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the Hub that holds versions 1 and 2 of a repository and another main branch."""
    return hub_cache(tmp_path / "hub", monkeypatch, "owner/fast-norm", COMMITS)


def factor(kernel):
    return kernel.forward_class.forward(None, torch.ones(1)).item()


def test_a_hub_reference_means_version_1(hub):
    kernel = load("owner/fast-norm")
    assert factor(kernel) == 1
    assert (kernel.reference, kernel.digest) == ("owner/fast-norm:FastNorm", COMMITS["v1"])
    assert kernel.origin == str(hub / "snapshots" / COMMITS["v1"] / "build" / "torch-universal")
    assert kernel.layout.__name__ == "FastNormLayout"
    assert load("owner/fast-norm", version=1) == kernel


def test_version_and_revision_are_passed_through(hub):
    assert factor(load("owner/fast-norm", version=2)) == 2
    assert factor(load("owner/fast-norm@main")) == 3
    assert factor(load("owner/fast-norm", revision=COMMITS["v2"])) == 2
    kernel = load("owner/fast-norm", version=2)
    assert kernel.reference == "owner/fast-norm@v2:FastNorm"
    assert load_kernel(KernelReference.parse(kernel.reference)) == kernel
    kernel = load("owner/fast-norm@main")
    assert (kernel.reference, kernel.digest) == ("owner/fast-norm@main:FastNorm", COMMITS["main"])


def test_what_the_hub_does_not_have(hub, tmp_path, monkeypatch):
    message = refused("owner/fast-norm", version=9)
    assert "'owner/fast-norm' at version 9" in message
    assert "available versions: 1, 2" in message
    assert "revision 'nowhere'" in refused("owner/fast-norm@nowhere")
    (tmp_path / "owner" / "elsewhere").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "'./owner/elsewhere:FastNorm'" in refused("owner/elsewhere")
    assert "Did you mean 'owner/fast-norm:FastNorm'?" in refused("owner/fast-norm", "FastNrm")


@pytest.mark.parametrize("trust", [False, True, ["owner/fast-norm"]])
def test_trust_is_passed_through_and_never_widened(monkeypatch, trust):
    asked = {}

    def get_kernel(repository, **kwargs):
        asked.update(kwargs, repository=repository)
        raise ValueError("is not from a trusted publisher")

    monkeypatch.setattr(kernels, "get_kernel", get_kernel)
    assert "trusted publisher" in refused("owner/fast-norm", version=3, trust_remote_code=trust)
    assert asked == {
        "repository": "owner/fast-norm",
        "revision": None,
        "version": 3,
        "backend": None,
        "trust_remote_code": trust,
    }


def test_an_untrusted_publisher_is_refused_by_the_library_itself(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.get_organization_overview", lambda self, name: object())
    assert "not from a trusted publisher" in refused("owner/fast-norm")


def test_local_kernels_stand_in_for_the_hub(hub, tmp_path, monkeypatch):
    local = write_repository(tmp_path / "local", factor=7)
    monkeypatch.setenv("LOCAL_KERNELS", f"owner/fast-norm={local}")
    kernel = load("owner/fast-norm")
    assert factor(kernel) == 7
    assert kernel.reference == "owner/fast-norm:FastNorm"
    assert (kernel.origin, kernel.digest) == (
        str(local / "build" / "torch-universal"),
        digest_of(local / "build" / "torch-universal"),
    )
    write_package(local / "build" / "torch-universal", factor=8)
    assert "edited" in refused("owner/fast-norm")


def test_repository_objects_load_themselves(hub, tmp_path):
    repository = kernels.LayerRepository("owner/fast-norm", layer_name="FastNorm", version=2)
    kernel = load_kernel(repository)
    assert (factor(kernel), kernel.reference, kernel.digest) == (2, "owner/fast-norm@v2:FastNorm", COMMITS["v2"])
    assert kernel == load("owner/fast-norm", version=2)
    assert kernel.layout.__name__ == "FastNormLayout"

    local = write_repository(tmp_path / "local")
    kernel = load_kernel(kernels.LocalLayerRepository(local, layer_name="FastNorm"))
    assert (kernel.reference, kernel.layout.__name__) == (f"{local}:FastNorm", "FastNormLayout")
    assert kernel == load(local)

    with pytest.raises(KernelError, match=r"owner/fast-norm@v2:Missing.*not found"):
        load_kernel(kernels.LayerRepository("owner/fast-norm", layer_name="Missing", version=2))

    class Strange:
        def load(self):
            return 3

    with pytest.raises(KernelError, match=r"gave 3, which is neither"):
        load_kernel(Strange())


# --- places that hold no kernel ---------------------------------------------------------------------------------------


def test_a_missing_path_names_its_neighbours(tmp_path):
    write_file(tmp_path)
    assert "'fast.py'" in refused(tmp_path / "fest.py")
    assert str(tmp_path / "no") in refused(tmp_path / "no" / "such.py")


def test_places_that_are_no_repository(tmp_path):
    message = refused(tmp_path)
    assert "no kernel repository" in message
    assert "nothing" in message
    (tmp_path / "notes.txt").write_text("")
    assert "'notes.txt'" in refused(tmp_path)
    assert "no Python file" in refused(tmp_path / "notes.txt")
    write_file(tmp_path)
    assert f"{tmp_path / 'fast.py'}:FastNorm" in refused(tmp_path)
    (tmp_path / "build").mkdir()
    assert "build variant" in refused(tmp_path)


def test_no_layers_shows_the_classes_and_how_to_list_them(tmp_path):
    message = refused(write_file(tmp_path, layers=""))
    assert "has no `layers`" in message
    assert "'FastNorm', 'Bare'" in message
    assert "class layers:\n      FastNorm = FastNorm" in message
    folder = write_package(tmp_path / "a")
    (folder / "__init__.py").write_text("")
    assert "from . import layers" in refused(folder)


def test_a_name_that_layers_does_not_have(tmp_path):
    place = write_file(tmp_path, layers="class layers:\n    FastNorm = FastNorm\n    limit = 3\n")
    message = refused(place, "FastNrm")
    assert f"Did you mean '{place}:FastNorm'?" in message
    assert "Its kernels are 'FastNorm'." in message
    assert "write `Bare = Bare` in its `layers`" in refused(place, "Bare")
    assert "it is 3" in refused(place, "limit")


def test_a_fusion_needs_a_layout(tmp_path):
    place = write_file(tmp_path)
    with pytest.raises(KernelError) as error:
        require_layout(load(place, "Bare"))
    for word in (f"{place}:Bare", "'BareLayout'", "'FastNormLayout', 'FastNorm', 'Bare'", "def __init__(self, first"):
        assert word in str(error.value)
    with pytest.raises(KernelError, match="is a function"):
        require_layout(load(place, "rotary"))


def test_the_layout_must_be_a_module_class(tmp_path):
    place = tmp_path / "x.py"
    place.write_text(source(layers="BareLayout = 3\n" + textwrap.dedent(LAYERS)))
    assert "its layout is 3" in refused(place, "Bare")
