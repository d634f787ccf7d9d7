"""Every code block of README.md and of docs/ runs, offline and on the CPU.

The blocks of a page are one session, in its order: they share their names and a folder of their own. What a reader has
and a test has not is replaced, by the table `STANDS_IN` and by nothing else. A comment `<!-- test: code -->` before a
block is run before it: that is how a page says which model or graft its block is about.

    python      is run; if the sentence before names a file in bold (**`fused.py`**), it is also added to that file
    sh          `kernelgraft` is run in this process, `make` with -n, all else by the shell
    toml, json  is written to the file that the sentence before names, and read; TOML as a kernel config
    no language the output of what stands before: it is looked at by nobody

A block of another kind is an error, so that none is left out without a word.
"""

import json
import re
import shlex
import subprocess
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

import kernelgraft
import tiny
from kernelgraft import cli

pytestmark = [
    pytest.mark.transformers,
    pytest.mark.filterwarnings("ignore:.*generation flags:UserWarning"),
]

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]

STANDS_IN = {
    "Qwen/Qwen3-0.6B": "{checkpoint}",
    "your/model": "{checkpoint}",
    "new/weights": "{checkpoint}",
    '("owner/my-kernel:RMSNormMLP", {"version": 2})': f'"{tiny.EXAMPLE}:RMSNormMLP"',
    "owner/my-kernel": str(tiny.EXAMPLE),
    'device_map="cuda"': 'device_map="cpu"',
    "graft.benchmark()": "graft.benchmark(tokens=(1, 4), repeats=1)",
    "graft.benchmark(verified=report)": "graft.benchmark(tokens=(1, 4), repeats=1, verified=report)",
}
"""What a page names, and what is there instead: a tiny model for a Hub id, the example repository for an owner's, the
CPU for a GPU, and short benchmarks."""

PART = re.compile(
    r"<!-- test: (?P<given>.*?) -->|^(?P<fence>```+)(?P<language>[^\n]*)\n(?P<code>.*?)^(?P=fence)[ ]*$",
    re.DOTALL | re.MULTILINE,
)
NAMED = re.compile(r"\*\*`([^`]+)`\*\*[^`]*\Z")


@dataclass
class Block:
    line: int
    language: str
    code: str
    file: str


def blocks_of(text):
    """The blocks of a page in its order; a hidden comment is a block of Python."""
    for part in PART.finditer(text):
        line = text.count("\n", 0, part.start()) + 1
        if part["given"]:
            yield Block(line, "python", part["given"], "")
        else:
            before = text[: part.start()].rstrip().rpartition("\n\n")[2]
            named = NAMED.search(before)
            yield Block(line + 1, part["language"].strip(), part["code"], named[1] if named else "")


@dataclass
class Session:
    """What the blocks of one page share."""

    page: Path
    names: dict
    monkeypatch: pytest.MonkeyPatch

    def run(self, block):
        kind = {"python": self.python, "sh": self.shell, "toml": self.toml, "json": self.json}
        if block.language in ("", "{toctree}", "{eval-rst}"):
            return
        assert block.language in kind, f"{self.page.name}:{block.line}: what to do with {block.language!r}?"
        kind[block.language](block)

    def python(self, block):
        code = textwrap.dedent(block.code)
        if block.file:
            add(block.file, block.code)
            if "/" in block.file:  # a module of a package: it is imported from there
                return
        # The lines before make a traceback name the line of the page.
        exec(compile("\n" * (block.line - 1) + code, str(self.page), "exec"), self.names)

    def shell(self, block):
        for line in block.code.splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            if words[0] == "kernelgraft":
                assert self.command(words) == 0, f"{self.page.name}: {line}"
            elif words[0] == "make":
                subprocess.run(["make", "-n", "-C", str(ROOT), *words[1:]], check=True, capture_output=True)
            else:
                subprocess.run(line, shell=True, check=True)

    def command(self, words):
        with self.monkeypatch.context() as patched:
            patched.setattr("sys.argv", words)
            with pytest.raises(SystemExit) as ended:
                cli.main()
        return ended.value.code or 0

    def toml(self, block):
        name = block.file or "kernels.toml"
        add(name, block.code)
        assert kernelgraft.KernelConfig.from_file(name).entries

    def json(self, block):
        add(block.file, block.code)
        assert json.loads(block.code)


def add(name, code):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    with open(name, "a", encoding="utf-8") as file:
        file.write(code + "\n")


def plain():
    """A model without kernels."""
    return tiny.model("qwen3")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page, qwen3_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    for found, instead in STANDS_IN.items():
        text = text.replace(found, instead.format(checkpoint=qwen3_folder))
    session = Session(page, {"__name__": page.stem, "plain": plain, "tiny": tiny}, monkeypatch)
    for block in blocks_of(text):
        session.run(block)


def test_every_page_is_there_and_no_fence_is_overlooked():
    assert {"README.md", "users.md", "kernel-authors.md", "tutorial-users.md"} <= {page.name for page in PAGES}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE))
        found = [part for part in PART.finditer(text) if part["fence"]]
        assert fences == 2 * len(found), page.name


def test_what_stands_in_is_written_somewhere():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [found for found in STANDS_IN if found not in text] == []
