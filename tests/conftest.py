"""Saved checkpoints of tiny models, made once for a run."""

import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint("qwen3")` is the folder of a saved tiny model of that kind; made at the first call."""
    tiny = pytest.importorskip("tiny")
    folders = {}

    def folder_of(kind, **changes):
        key = (kind, *sorted(changes.items()))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(kind)
            tiny.model(kind, **changes).save_pretrained(folders[key])
        return folders[key]

    return folder_of


@pytest.fixture(scope="session")
def qwen3_folder(checkpoint):
    return checkpoint("qwen3")
