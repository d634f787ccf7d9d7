"""Kernel references: what a text means, and what is said about one that means nothing."""

from pathlib import Path

import pytest

from kernelgraft.errors import ConfigError, ConfigTypeError, KernelGraftError
from kernelgraft.reference import KernelReference


@pytest.mark.parametrize(
    ("text", "kind", "location", "name", "revision", "version"),
    [
        ("owner/repo:Name", "hub", "owner/repo", "Name", None, 1),
        ("owner-1/my.repo_2:Name", "hub", "owner-1/my.repo_2", "Name", None, 1),
        ("owner/repo@main:Name", "hub", "owner/repo", "Name", "main", None),
        ("owner/repo@refs/pr/3:Name", "hub", "owner/repo", "Name", "refs/pr/3", None),
        ("/path/to/repo:Name", "path", "/path/to/repo", "Name", None, None),
        ("/path/with@sign and space:Name", "path", "/path/with@sign and space", "Name", None, None),
        ("/path/with:colon:Name", "path", "/path/with:colon", "Name", None, None),
        ("./file.py:Name", "path", "./file.py", "Name", None, None),
        ("file.py:Name", "path", "file.py", "Name", None, None),
        ("folder/file.py:Name", "path", "folder/file.py", "Name", None, None),
        (".:Name", "path", ".", "Name", None, None),
        ("../x:Name", "path", "../x", "Name", None, None),
        ("~/x:Name", "path", "~/x", "Name", None, None),
        (r"C:\kernels\repo:Name", "path", r"C:\kernels\repo", "Name", None, None),
        ("C:/kernels/repo:Name", "path", "C:/kernels/repo", "Name", None, None),
        (r"..\repo:Name", "path", r"..\repo", "Name", None, None),
        ("package:Name", "module", "package", "Name", None, None),
        ("package.module:Name", "module", "package.module", "Name", None, None),
    ],
)
def test_every_form_is_read_and_written_back(text, kind, location, name, revision, version):
    reference = KernelReference.parse(text)
    assert (reference.kind, reference.location, reference.name) == (kind, location, name)
    assert (reference.revision, reference.version) == (revision, version)
    assert reference.trust_remote_code is False
    assert str(reference) == text
    assert KernelReference.parse(str(reference)) == reference
    assert reference.metadata == {}


@pytest.mark.parametrize("text", ["owner/repo:Name", "owner/repo@main:Name", "package.module:Name", "/a/b:Name"])
def test_local_reads_everything_as_a_path(text):
    reference = KernelReference.parse(text, local=True)
    assert reference.kind == "path"
    assert (reference.revision, reference.version) == (None, None)
    assert reference.path == Path(text.removesuffix(":Name")).absolute()
    assert str(reference) == text


def test_path_is_absolute_and_knows_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert KernelReference.parse("~/x:Name").path == tmp_path / "x"
    monkeypatch.chdir(tmp_path)
    assert KernelReference.parse("./x:Name").path == tmp_path / "x"


def test_relative_to_moves_relative_paths_only(tmp_path):
    assert KernelReference.parse("./x.py:Name").relative_to(tmp_path).path == tmp_path / "x.py"
    for text in ("/a/b:Name", "owner/repo:Name", "package:Name"):
        assert KernelReference.parse(text).relative_to(tmp_path) == KernelReference.parse(text)


def test_metadata_is_read_and_said_back():
    reference = KernelReference.parse("owner/repo:Name", metadata={"version": "3", "trust_remote_code": ["owner/repo"]})
    assert (reference.version, reference.trust_remote_code) == (3, ("owner/repo",))
    assert reference.metadata == {"version": 3, "trust_remote_code": ["owner/repo"]}
    assert KernelReference.parse(str(reference), metadata=reference.metadata) == reference
    hash(reference)

    pinned = KernelReference.parse("owner/repo:Name", metadata={"revision": "v2", "trust_remote_code": True})
    assert (str(pinned), pinned.version, pinned.metadata) == ("owner/repo@v2:Name", None, {"trust_remote_code": True})
    assert KernelReference.parse(str(pinned), metadata=pinned.metadata) == pinned

    # Transformers leaves such a dict behind in a config that it has used.
    used = KernelReference.parse("owner/repo:Name", metadata={"revision": None, "trust_remote_code": False})
    assert used == KernelReference.parse("owner/repo:Name")


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "Name", "owner/repo", "owner/repo:", ":Name", "owner/repo:9", "owner/repo:a b", "owner/repo@:Name"),
        *("a/b/c:Name", "C:Name", "owner/re po:Name", "9package:Name", "package..module:Name", "https://a/b/c:Name"),
    ],
)
def test_unreadable_text_is_an_error_that_shows_the_forms(text):
    with pytest.raises(ConfigError) as error:
        KernelReference.parse(text)
    assert repr(text) in str(error.value)
    assert "owner/repo:KernelName" in str(error.value)
    assert "./file.py:KernelName" in str(error.value)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("text", "metadata", "kind", "words"),
    [
        ("owner/repo:N", {"revision": "a", "version": 1}, ConfigError, "Write one of the two"),
        ("owner/repo@a:N", {"version": 1}, ConfigError, "Write it once"),
        ("owner/repo@a:N", {"revision": "b"}, ConfigError, "Write it once"),
        ("owner/repo:N", {"verson": 1}, ConfigError, "'verson'"),
        ("owner/repo:N", {"version": "one"}, ConfigError, "{'version': 1}"),
        ("owner/repo:N", {"version": -1}, ConfigError, "{'version': 1}"),
        ("owner/repo:N", {"version": True}, ConfigTypeError, "{'version': 1}"),
        ("owner/repo:N", {"version": 1.0}, ConfigTypeError, "{'version': 1}"),
        ("owner/repo:N", {"revision": ""}, ConfigError, "{'revision': 'main'}"),
        ("owner/repo:N", {"revision": 3}, ConfigTypeError, "{'revision': 'main'}"),
        ("owner/repo:N", {"trust_remote_code": "yes"}, ConfigTypeError, "['owner/repo']"),
        ("owner/repo:N", {"trust_remote_code": 1}, ConfigTypeError, "['owner/repo']"),
        ("owner/repo:N", {"trust_remote_code": [1]}, ConfigTypeError, "['owner/repo']"),
        ("./x.py:N", {"version": 1}, ConfigError, "a path has none"),
        ("package:N", {"revision": "a"}, ConfigError, "a Python module has none"),
    ],
)
def test_metadata_that_cannot_be_meant(text, metadata, kind, words):
    with pytest.raises(kind) as error:
        KernelReference.parse(text, metadata=metadata)
    assert words in str(error.value)
    assert repr(text) in str(error.value)
    assert isinstance(error.value, KernelGraftError)


def test_a_reference_is_text():
    with pytest.raises(ConfigTypeError, match=r"PosixPath|WindowsPath"):
        KernelReference.parse(Path("/x"))
