"""What can go wrong outside the caller's code. Wrong arguments are ValueError and TypeError."""


class EdgeclipError(Exception):
    """Base class; its message is one line that says what to do."""


class BundleError(EdgeclipError):
    """A bundle that is missing, incomplete, altered, or of another schema version."""


class ImageError(EdgeclipError):
    """An image that cannot be read, or that is larger than the limit."""


class LabelError(EdgeclipError, ValueError):
    """A label file, label list or template that cannot be used."""


class DeviceError(EdgeclipError):
    """A device or precision that is not available here."""
