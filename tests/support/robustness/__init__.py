"""Trials, threats and reports of evaluations under attack."""
