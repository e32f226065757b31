"""Errors of training and evaluation; each message is one line that says what to do."""

from __future__ import annotations

from edgeclip.errors import EdgeclipError


class ModelError(EdgeclipError):
    """A model or checkpoint that cannot be read, or does not fit."""


class DataError(EdgeclipError):
    """A data set that is missing, unknown or malformed."""


class SettingsError(EdgeclipError):
    """Settings that contradict each other, or do not fit the model, the data or the run."""
