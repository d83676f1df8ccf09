"""The one error tree: every message names what went wrong and what to do about it."""

from __future__ import annotations


class GdnsqError(Exception):
    """Base of every error that this library raises on purpose."""


class ConfigError(GdnsqError, ValueError):
    """A setting is out of its domain, such as a bit-width outside 1..16."""


class PatternError(ConfigError):
    """A name pattern of a ``QuantConfig`` matches no layer of the model."""


class BatchStructureError(GdnsqError, TypeError):
    """A batch has neither the structure of the example input nor that plus targets."""


class DeviceMismatchError(GdnsqError, ValueError):
    """Model and input lie on different devices."""


class CaptureError(GdnsqError, RuntimeError):
    """The model could not be captured as a graph, or the graph differs from eager."""


class NothingToQuantizeError(GdnsqError, ValueError):
    """No operation of the model was selected for quantization."""


class NotQuantizedError(GdnsqError, ValueError):
    """``strict=True``, and something stays in floating point that nobody excluded."""


class CalibrationError(GdnsqError, ValueError):
    """Calibration data are missing, not finite, or were never seen."""


class PassError(GdnsqError, RuntimeError):
    """A pass was applied to a graph that lacks what it requires, or it failed."""


class TrainingDivergedError(GdnsqError, RuntimeError):
    """The loss or a gradient became NaN or infinite; the last good state was restored.

    Attributes:
        step: the optimizer step (from 0) at which it happened.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class BudgetError(GdnsqError, RuntimeError):
    """A bit budget cannot be, or was not, met."""


class FileFormatError(GdnsqError, ValueError):
    """A file is truncated, foreign, or does not fit the model it is loaded into."""


class ExportError(GdnsqError, RuntimeError):
    """An exporter refuses a model; the message has its cause."""


class CheckpointError(GdnsqError, RuntimeError):
    """A fine-tuning run cannot be resumed: its checkpoint is of another run."""


class CompilerError(GdnsqError, RuntimeError):
    """A compiler or runtime outside this library failed on a deployed model."""


class MissingExtraError(GdnsqError, ImportError):
    """An optional dependency is not installed; the message names the extra."""


class CalibrationWarning(UserWarning):
    """Levels were placed from other values than those that the edge will carry."""


class CheckpointWarning(UserWarning):
    """A checkpoint is damaged; an earlier one, or none, is used instead."""


class CaptureWarning(UserWarning):
    """The captured graph holds for fewer inputs than the model does."""


class ClassNeededWarning(UserWarning):
    """A saved model holds what no file can: reading it takes the original class."""
