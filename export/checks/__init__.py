"""Checks of an export: parity with PyTorch, fidelity on data, evidence of robustness, latency."""
