"""Measurements: speed as ratios against a peer in the same run, accuracy on real data."""
