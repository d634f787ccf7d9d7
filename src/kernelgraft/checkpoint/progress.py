"""A bar for reading and writing: bytes and rate, on a terminal, where it takes long enough to be looked at."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Less than this is done before a bar could be read.
_WORTH_A_BAR = 1 << 30


@contextmanager
def progress_bar(total: int, what: str = "Reading weights") -> Iterator[Callable[[int], None]]:
    """Shows how many of `total` bytes are done; the function that it gives is called with each next number of bytes.

    Silent if stderr is no terminal, and where the bars of Transformers or of huggingface_hub are switched off.
    """
    if total < _WORTH_A_BAR or not sys.stderr.isatty() or not _wanted():
        yield lambda _: None
        return
    from huggingface_hub import utils  # `import kernelgraft` needs torch alone

    bars: Any = utils
    with bars.tqdm(total=total, desc=what, unit="B", unit_scale=True) as bar:
        yield bar.update


def _wanted() -> bool:
    logging: Any = sys.modules.get("transformers.utils.logging")
    return logging is None or bool(logging.is_progress_bar_enabled())
