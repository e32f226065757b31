"""Export of PyTorch models to bundles that run without PyTorch: `python -m export --help`."""

from edgeclip.errors import EdgeclipError


class ExportError(EdgeclipError):
    """Failed export; the message is one line that says what to do."""
