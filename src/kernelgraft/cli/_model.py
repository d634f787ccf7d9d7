"""The model and the kernels that a command is about, from its arguments."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kernelgraft.errors import ConfigError, KernelGraftError

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
    """The class of Transformers that the config of a model names first among its architectures.

    Raises:
        ConfigError: There is no model of that name.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{model!r} is no model: {str(error).splitlines()[0]} Write a folder with a config.json, or a Hub id such "
            f"as Qwen/Qwen3-0.6B."
        ) from error
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModel


def load_model(model: str, kernels: Path | None, *, device: str, dtype: str, **kwargs: Any) -> Any:
    """A model with kernels in it, in eval mode; without `kernels` the plain one.

    Raises:
        ConfigError: There is no such model, it has no weights, or the dtype is none that one can be loaded in.
    """
    from kernelgraft.auto import from_pretrained

    if dtype not in _DTYPES:
        raise ConfigError(f"--dtype {dtype} is not known. Write one of {', '.join(_DTYPES)}.")
    _check_device(device)
    config = None if kernels is None else read_config(kernels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            with _bars_on_a_terminal():
                loaded = from_pretrained(
                    model_class(model), model, kernel_config=config, dtype=dtype, device_map=device, **kwargs
                )
        except OSError as error:
            if isinstance(error, KernelGraftError):
                raise
            raise ConfigError(f"{model!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return loaded.eval()


@contextmanager
def _bars_on_a_terminal() -> Iterator[None]:
    """Inside, libraries show no progress bars where nobody watches."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {device} cannot be used: {str(error).splitlines()[0]}. `kernelgraft info` lists what is here."
        ) from error


def skeleton_of(model: str) -> Any:
    """The model on the meta device: its modules and shapes, and no weights."""
    import torch

    from kernelgraft.recording import recorded

    cls = model_class(model)
    config = cls.config_class.from_pretrained(model)
    with recorded(), torch.device("meta"):
        return cls(config)
