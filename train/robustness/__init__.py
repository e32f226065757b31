"""Evaluation under attack: threat, defence, checks, measurements and their results."""
