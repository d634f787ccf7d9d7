"""A lock pins Hub kernels to a commit and its files, and with it nothing else is loaded. The Hub is a local cache."""

import json
import pickle
import types

import huggingface_hub
import pytest
import torch

from kernel_repositories import hub_cache, write_repository
from kernelgraft import KernelConfig
from kernelgraft.errors import AuthoringError, ConfigError, KernelError
from kernelgraft.kernel import load_kernel
from kernelgraft.lock import Lock, lock, lock_path, read_lock

COMMITS = {"v1": "a" * 40, "v2": "b" * 40, "main": "c" * 40}
NAME = "owner/locked-norm"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the Hub with two versions of a repository and a main branch."""
    return hub_cache(tmp_path / "hub", monkeypatch, NAME, COMMITS)


@pytest.fixture
def config(tmp_path, hub):
    path = tmp_path / "kernels.toml"
    path.write_text(
        f'[[kernel]]\nreplaces = "RMSNorm"\nuse = "{NAME}:FastNorm"\n\n'
        f'[[kernel]]\nreplaces = "LayerNorm"\nuse = "{NAME}:FastNorm"\nversion = 2\n'
        f'device = "cpu"\nmode = "training"\n\n'
        f'[[kernel]]\nreplaces = "Other"\nuse = "./here:Kernel"\n'
    )
    return path


def use_of(path, target="RMSNorm"):
    (entry,) = [entry for entry in KernelConfig.from_file(path).entries if entry.target == target]
    return entry.choices[0].use


def factor(path, target="RMSNorm"):
    return load_kernel(use_of(path, target)).forward_class.forward(None, torch.ones(1)).item()


def refused(path, target="RMSNorm"):
    with pytest.raises(KernelError) as error:
        load_kernel(use_of(path, target))
    return str(error.value)


def test_a_lock_holds_commits_and_files(config):
    made = lock(config)
    assert made.path == str(config) + ".lock" == str(lock_path(config))
    assert [(each.repository, each.revision, each.commit) for each in made.kernels] == [
        (NAME, "v1", COMMITS["v1"]),
        (NAME, "v2", COMMITS["v2"]),
    ]
    folder = "build/torch-universal"
    expected = {f"{folder}/{name}" for name in ("__init__.py", "fast.py", "layers.py", "metadata.json")}
    assert set(made.kernels[0].files) == expected
    assert read_lock(made.path) == made
    assert isinstance(made, Lock)


def test_the_locked_kernels_are_loaded(config):
    plain = KernelConfig.from_file(config)
    lock(config)
    assert KernelConfig.from_file(config) == plain
    assert (factor(config), factor(config, "LayerNorm")) == (1, 2)
    assert load_kernel(use_of(config)).digest == COMMITS["v1"]
    assert load_kernel(use_of(config)).reference == f"{NAME}:FastNorm"
    again = pickle.loads(pickle.dumps(KernelConfig.from_file(config)))
    assert again.entries[0].choices[0].use.pin == use_of(config).pin


def test_a_branch_that_moved_on_is_not_followed(config, hub):
    lock(config)
    (hub / "refs" / "v1").write_text(COMMITS["main"])
    assert factor(config) == 1
    assert [each.commit for each in lock(config).kernels] == [COMMITS["main"], COMMITS["v2"]]
    assert factor(config) == 3


def test_other_content_is_refused_and_not_imported(config, hub):
    lock(config)
    code = hub / "snapshots" / COMMITS["v1"] / "build" / "torch-universal" / "fast.py"
    marker = hub / "ran"
    good = code.read_text()
    code.write_text(good + f"\nopen({str(marker)!r}, 'w')\n")
    message = refused(config)
    assert "build/torch-universal/fast.py has another content" in message
    assert "kernelgraft lock" in message
    (code.parent / "more.py").write_text("")
    code.unlink()
    message = refused(config)
    assert "fast.py is missing" in message
    assert "more.py is not in the lock" in message
    assert not marker.exists()
    (code.parent / "more.py").unlink()
    code.write_text(good)
    assert factor(config) == 1


def test_a_kernel_that_is_not_in_the_lock_is_refused(config):
    lock(config)
    config.write_text(config.read_text().replace("version = 2", 'revision = "main"'))
    message = refused(config, "LayerNorm")
    assert f"{NAME}@main:FastNorm" in message
    assert f"kernelgraft lock {config}" in message
    assert factor(config) == 1


def test_a_commit_that_is_gone(config, hub):
    lock(config)
    (hub / "snapshots" / COMMITS["v1"]).rename(hub / "gone")
    assert COMMITS["v1"] in refused(config)


def test_local_kernels_do_not_stand_in_for_a_locked_one(config, tmp_path, monkeypatch):
    lock(config)
    monkeypatch.setenv("LOCAL_KERNELS", f"{NAME}={write_repository(tmp_path / 'mine', factor=9)}")
    assert "LOCAL_KERNELS" in refused(config)


def test_a_kernel_that_loads_others_is_refused(config, hub):
    metadata = hub / "snapshots" / COMMITS["v1"] / "build" / "torch-universal" / "metadata.json"
    said = json.loads(metadata.read_text())
    metadata.write_text(json.dumps({**said, "kernel-depends": [{"repo-id": "owner/other", "version": 1}]}))
    lock(config)
    assert "owner/other" in refused(config)


def test_without_a_lock_nothing_is_pinned(config):
    assert use_of(config).pin is None
    assert factor(config) == 1


@pytest.mark.parametrize("text", ["", "{}", '{"format": 2, "kernels": []}', '{"format": 1, "kernels": [{}]}'])
def test_a_lock_that_cannot_be_read(config, text):
    lock_path(config).write_text(text)
    with pytest.raises(ConfigError, match=r"kernelgraft lock"):
        KernelConfig.from_file(config)
    lock(config)
    assert factor(config) == 1


def test_what_is_not_there_leaves_the_old_lock(config):
    lock(config)
    before = lock_path(config).read_text()
    config.write_text(config.read_text().replace("version = 2", "version = 7"))
    with pytest.raises(AuthoringError, match=r"owner/locked-norm' at 'v7'"):
        lock(config)
    assert lock_path(config).read_text() == before


def test_online_small_files_are_hashed_and_large_ones_known(config, hub, monkeypatch):
    """The Hub's answers are made of the cache; a large file is one of which the Hub says the sha256."""
    offline = lock(config)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def refs(self, repository, **kwargs):
        branches = [types.SimpleNamespace(name=name, target_commit=commit) for name, commit in COMMITS.items()]
        return types.SimpleNamespace(branches=branches, tags=[])

    def tree(self, repository, path, *, recursive, revision, **kwargs):
        root = hub / "snapshots" / revision
        for file in sorted((root / path).rglob("*.*")):
            name = file.relative_to(root).as_posix()
            known = {kernel.commit: kernel.files for kernel in offline.kernels}[revision][name]
            large = {"size": 1, "oid": known, "pointerSize": 1} if name.endswith("fast.py") else None
            yield huggingface_hub.hf_api.RepoFile(path=name, size=1, oid="0", lfs=large)

    def download(self, repository, path, *, revision, **kwargs):
        assert not path.endswith("fast.py")
        return str(hub / "snapshots" / revision / path)

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_refs", refs)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_tree", tree)
    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", download)
    assert lock(config) == offline
    config.write_text(config.read_text().replace("version = 2", "version = 7"))
    with pytest.raises(AuthoringError, match=r"no branch or tag 'v7'; it has main, v1, v2"):
        lock(config)
