"""Data sets and their loader."""
