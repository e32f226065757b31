"""Models in PyTorch to bundles that a device runs without it: `python -m export --help`."""

from edgeclip.errors import EdgeclipError


class ExportError(EdgeclipError):
    """A model, checkpoint or tokenizer that cannot become a bundle; the message is one line."""
