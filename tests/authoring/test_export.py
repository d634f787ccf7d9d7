"""What `export` writes is what the `kernels` library loads and whose digests it accepts."""

import json
import shutil
from pathlib import Path

import kernels
import pytest
from kernels._rust import Digest, DigestAlgorithm, DigestValidationError, Metadata
from made import edit

import tiny
from kernelgraft.authoring.export import export
from kernelgraft.authoring.new import new
from kernelgraft.errors import AuthoringError

pytestmark = pytest.mark.transformers


def validate(build):
    metadata = Metadata.read_from_file(build / "metadata.json")
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, build))
    return metadata


def test_an_edit_is_exported_under_another_id(tmp_path):
    made = new("exported", replaces="RMSNorm", folder=tmp_path)
    build = Path(made.folder) / "build" / "torch-cpu"
    before = validate(build).id
    edit(made, "# Right", "# Still right")
    (build / "left over.py").write_text("")
    done = export(made.folder)
    assert done.variants == ("build/torch-cpu", "build/torch-cuda")
    assert validate(build).id != before
    assert "# Still right" in (build / "kernel.py").read_text()
    assert not (build / "left over.py").exists()
    assert set(done.digests["build/torch-cpu"]) == {"__init__.py", "kernel.py", "layers.py", "reference.py"}
    assert kernels.get_local_kernel(tmp_path / "exported", backend="cpu").__name__ == validate(build).id
    assert json.loads(json.dumps(done.to_json()))["digests"] == done.digests
    assert sorted(each.name for each in build.parent.iterdir()) == ["torch-cpu", "torch-cuda"]

    (build / "kernel.py").write_text("changed = True")
    with pytest.raises(DigestValidationError):
        validate(build)


def test_the_same_code_gives_the_same_bytes(tmp_path):
    made = new("same", replaces="RMSNorm", folder=tmp_path)
    first = (tmp_path / "same/build/torch-cuda/metadata.json").read_bytes()
    export(made.folder)
    assert (tmp_path / "same/build/torch-cuda/metadata.json").read_bytes() == first


def test_a_repository_that_is_only_a_build_gets_its_digests(tmp_path):
    folder = shutil.copytree(tiny.EXAMPLE, tmp_path / "my-kernel", ignore=shutil.ignore_patterns("__pycache__"))
    build = folder / "build" / "torch-universal"
    before = json.loads((build / "metadata.json").read_text())
    assert export(folder).variants == ("build/torch-universal",)
    after = json.loads((build / "metadata.json").read_text())
    assert {**after, "digest": None} == {**before, "digest": None}
    validate(build)


def test_a_plain_package(tmp_path):
    package = tmp_path / "plain-norm"
    shutil.copytree(tiny.EXAMPLE / "build" / "torch-universal", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "metadata.json").unlink()
    (package / "tests").mkdir()
    assert export(package).variants == ("build/torch-cpu", "build/torch-cuda")
    build = package / "build" / "torch-cpu"
    assert str(validate(build).name) == "plain-norm"
    assert not (build / "tests").exists()
    assert kernels.get_local_kernel(package, backend="cpu").layers.CustomRMSNorm


@pytest.mark.parametrize("what", ["source", "table"])
def test_compiled_kernels_are_kernel_builders_job(what, tmp_path):
    made = new("compiled", replaces="RMSNorm", folder=tmp_path)
    shutil.rmtree(tmp_path / "compiled" / "build")
    if what == "source":
        (tmp_path / "compiled" / "norm.cu").write_text("__global__ void norm() {}")
    else:
        toml = tmp_path / "compiled" / "build.toml"
        toml.write_text(toml.read_text() + '\n[kernel.norm]\nbackend = "cuda"\nsrc = []\n')
    with pytest.raises(AuthoringError, match=r"kernel-builder") as error:
        export(made.folder)
    assert ("norm.cu" if what == "source" else "[kernel.norm]") in str(error.value)
    assert not (tmp_path / "compiled" / "build").exists()


def test_what_the_library_refuses_leaves_the_old_build(tmp_path):
    made = new("refused", replaces="RMSNorm", folder=tmp_path)
    toml = tmp_path / "refused" / "build.toml"
    before = (tmp_path / "refused/build/torch-cpu/metadata.json").read_bytes()
    toml.write_text(toml.read_text().replace('name = "refused"', 'name = "Not_A_Name"'))
    with pytest.raises(AuthoringError, match=r"Invalid kernel name"):
        export(made.folder)
    toml.write_text("[general\n")
    with pytest.raises(AuthoringError, match=r"TOML"):
        export(made.folder)
    assert (tmp_path / "refused/build/torch-cpu/metadata.json").read_bytes() == before
    assert sorted(each.name for each in (tmp_path / "refused/build").iterdir()) == ["torch-cpu", "torch-cuda"]
