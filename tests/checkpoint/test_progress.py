"""The bar: bytes and rate on a terminal, and silence elsewhere."""

import io
import sys

import pytest

from kernelgraft.checkpoint.progress import progress_bar

GB = 1 << 30


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, total, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(total) as on_progress:
        on_progress(total // 2)
        on_progress(total - total // 2)
    return stream.getvalue()


def test_a_terminal_sees_bytes_and_rate(monkeypatch):
    text = shown(monkeypatch, 4 * GB, Terminal())
    assert "Reading weights" in text
    assert "100%" in text
    assert "4.29G" in text
    assert "B/s" in text


@pytest.mark.parametrize(("total", "stream"), [(4 * GB, io.StringIO()), (1000, Terminal())], ids=["a log", "a moment"])
def test_elsewhere_there_is_silence(total, stream, monkeypatch):
    assert shown(monkeypatch, total, stream) == ""


@pytest.mark.transformers
def test_who_switched_the_bars_of_transformers_off_sees_none(monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(logging, "_tqdm_active", False)
    assert shown(monkeypatch, 4 * GB, Terminal()) == ""
