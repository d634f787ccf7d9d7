"""RMS norm with a renamed weight, and RMS norm fused with the gated MLP behind it, in plain torch."""

from . import layers

__all__ = ["layers"]
