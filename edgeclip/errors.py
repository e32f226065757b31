"""Errors of files, devices and input. Wrong arguments raise ValueError and TypeError."""


class EdgeclipError(Exception):
    """Base class of all errors; the message is one line that says what to do."""


class BundleError(EdgeclipError):
    """A bundle that is missing, incomplete, altered, or of an unknown schema version."""


class ImageError(EdgeclipError):
    """An image that cannot be read, or exceeds the size limit."""


class LabelError(EdgeclipError, ValueError):
    """A label file, label list or template that cannot be used."""


class DeviceError(EdgeclipError):
    """A device or precision that is not available here."""
