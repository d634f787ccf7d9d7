"""The model and the kernels that a command is about, from its arguments."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kernelgraft.errors import ConfigError

if TYPE_CHECKING:
    from kernelgraft.config import KernelConfig

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder with a model of Transformers, or a Hub id.")]
Kernels = Annotated[
    Path,
    typer.Option("--kernels", "-k", metavar="FILE", help="The kernel config, a TOML file.", show_default=False),
]
Device = Annotated[str, typer.Option("--device", "-d", help="Where the model is, as torch writes it: cpu, cuda:1.")]
Dtype = Annotated[str, typer.Option("--dtype", help="bfloat16, float16, float32, or auto for the checkpoint's.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of text.")]

_DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")


def read_config(kernels: Path) -> "KernelConfig":
    """The kernel config of a TOML file."""
    from kernelgraft.config import KernelConfig

    return KernelConfig.from_file(kernels)


def model_class(model: str) -> Any:
    """The class of Transformers that the config of a model names first among its architectures."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(model)
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModel


def load_model(model: str, kernels: Path | None, *, device: str, dtype: str, **kwargs: Any) -> Any:
    """A model with kernels in it, in eval mode; without `kernels` the plain one.

    Raises:
        ConfigError: The dtype is none that a model can be loaded in.
    """
    from kernelgraft.auto import from_pretrained

    if dtype not in _DTYPES:
        raise ConfigError(f"--dtype {dtype} is not known. Write one of {', '.join(_DTYPES)}.")
    config = None if kernels is None else read_config(kernels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        loaded = from_pretrained(
            model_class(model), model, kernel_config=config, dtype=dtype, device_map=device, **kwargs
        )
    return loaded.eval()


def skeleton_of(model: str) -> Any:
    """The model on the meta device: its modules and shapes, and no weights."""
    import torch

    from kernelgraft.recording import recorded

    cls = model_class(model)
    config = cls.config_class.from_pretrained(model)
    with recorded(), torch.device("meta"):
        return cls(config)
