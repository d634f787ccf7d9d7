"""What kernelgraft raises: one family, `KernelGraftError`.

Every message says what was asked, what was found, and what to write instead. Errors about what the caller wrote are
also `ValueError` or `TypeError`, so that code which knows nothing of this package can catch them.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernelgraft.verify.report import Report


class KernelGraftError(Exception):
    """Base class of everything that this package raises on purpose."""


class ConfigError(KernelGraftError, ValueError):
    """A `KernelConfig`, or a file it is read from, says something that cannot be meant."""


class ConfigTypeError(KernelGraftError, TypeError):
    """A `KernelConfig` got an object of a type that it does not take."""


class KernelError(KernelGraftError, ValueError):
    """A kernel reference cannot be resolved, or what it leads to is not a kernel."""


class PlanError(KernelGraftError, ValueError):
    """A plan was refused. Nothing has been changed."""


class ConversionError(KernelGraftError, ValueError):
    """A rule of a `conversion_mapping` or `packing` cannot be read, applied or reversed."""


class CheckpointError(KernelGraftError, ValueError):
    """A checkpoint is missing, broken, or does not fit the model."""


class SaveError(KernelGraftError, OSError):
    """A checkpoint could not be written. What was there before is there still."""


class ReportError(KernelGraftError, ValueError):
    """A report page cannot be made of what was given: a file that holds no report, or the report of another graft."""


class GraftError(KernelGraftError, RuntimeError):
    """A graft cannot do what was asked in the state that the model is in."""


class AuthoringError(KernelGraftError, ValueError):
    """A kernel repository cannot be made, checked, exported or locked as was asked."""


class VerificationError(KernelGraftError, RuntimeError):
    """A grafted model does not answer as the original does, or this cannot be tried.

    Attributes:
        report: The `kernelgraft.verify.Report` of what was tried; `None` if nothing could be.
    """

    def __init__(self, message: str, report: "Report | None" = None) -> None:
        super().__init__(message)
        self.report = report
