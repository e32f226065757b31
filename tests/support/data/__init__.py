"""Data sets, folders and image files."""
