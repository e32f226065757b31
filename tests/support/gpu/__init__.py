"""Fake and emulated GPU software."""
