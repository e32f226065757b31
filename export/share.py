"""Command `python -m export.share`: bundles with the same text tower keep one copy of it.

    python -m export.share bundles/everyday-robust everyday

The first bundle's tokenizer and text encoders are deleted, and its manifest names the second bundle,
which must have the same files. It lies in the same directory, and the two travel together; or it is
embedded in edgeclip.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from edgeclip import storage
from edgeclip.bundle import EMBEDDED, MANIFEST, Bundle, is_text
from edgeclip.cli.command import run_command
from export import ExportError

EPILOG = """examples:
  python -m export.share bundles/everyday-robust everyday
  python -m export.share bundles/small bundles/large
"""


def share(folder: Path, owner: str | Path) -> int:
    """Delete the text tower of the bundle in `folder` in favour of the owner's; return the bytes saved.

    owner: a directory, or the name of an embedded bundle. Both bundles are verified first. Raises
    BundleError, and ExportError if they cannot share.
    """
    embedded = isinstance(owner, str) and owner in EMBEDDED
    bundle = Bundle(folder.resolve())
    other = Bundle(owner if embedded else Path(owner).resolve())
    text_from = str(owner) if embedded else other.path.name
    beside = embedded or bundle.path.parent == other.path.parent
    if bundle.path == other.path or not beside:
        raise ExportError(f"{folder} and {owner} are not two bundles in one directory: move one")
    for checked in (bundle, other):
        if checked.manifest.text_from is not None:
            raise ExportError(f"{checked.path} has no text tower of its own: name another bundle")
        checked.verify()
    names = [name for name in bundle.manifest.files if is_text(name)]
    for name in names:
        if other.manifest.files.get(name) != bundle.manifest.files[name]:
            raise ExportError(f"{other.path} does not have the same {name}: export both again")
    manifest = dataclasses.replace(bundle.manifest, text_from=text_from)
    # Before the files are deleted, so that the bundle is complete at any time.
    storage.write(bundle.path / MANIFEST, manifest.to_json())
    saved = 0
    for path in (bundle.path / name for name in names):
        saved += path.stat().st_size
        path.unlink()
    Bundle(bundle.path).verify()
    return saved


def _run(arguments: list[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m export.share",
        description="Let a bundle use the text tower of another one in the same directory.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", type=Path, help="bundle directory to delete the files from")
    add(
        "owner",
        metavar="OWNER",
        help="bundle with the same text tower: a directory, or an embedded name",
    )
    options = parser.parse_args(arguments)
    saved = share(options.bundle, options.owner)
    print(f"{options.bundle} uses the text tower of {options.owner}: {saved / 1e6:.1f} MB saved")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    return run_command(_run, arguments)


if __name__ == "__main__":
    sys.exit(main())
