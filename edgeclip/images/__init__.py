"""Images from files, bytes and arrays, and the folders that hold them."""

from edgeclip.images.decoding import CudaFrame, ImageSource, decode

__all__ = ["CudaFrame", "ImageSource", "decode"]
