"""Folders of the checkout."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
EXAMPLES = ROOT / "examples"
GARMENTS = ROOT / "edgeclip" / "bundles" / "fashion"
VECTORS = TESTS / "vectors"
