"""Runs the command line in this process, as a terminal would."""

import json
from dataclasses import dataclass
from typing import Any

import pytest

from kernelgraft import cli


@dataclass
class Ran:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run(capfd, monkeypatch, *arguments):
    """`run(capfd, monkeypatch, "plan", folder, "-k", file)`; with capfd, as libraries write to the descriptors."""
    monkeypatch.setattr("sys.argv", ["kernelgraft", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    return Ran(ended.value.code or 0, out, err)
