"""Data sets, and the batches of them."""
