"""The papers' protocols: complete, of known data sets, and clear about what is missing."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest

from tests.support.data import data_sets
from train.data.catalog import SOURCES
from train.errors import SettingsError
from train.robustness.protocols import PROTOCOLS, Protocol, describe, find, missing

ATTACKS = {"apgd-ce", "apgd-t", "fab-t", "square", "autoattack", "pgd", "cw", "feature"}


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty default folder of data sets, and replace packages that are not installed."""
    monkeypatch.setenv("EDGECLIP_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "h5py", types.ModuleType("h5py"))
    monkeypatch.setattr(
        "torchvision.datasets.cifar.check_integrity", lambda path, md5: os.path.isfile(path)
    )
    return tmp_path


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_protocols_can_be_run(protocol: Protocol) -> None:
    assert set(protocol.data) <= set(SOURCES)
    assert len(set(protocol.data)) == len(protocol.data)
    assert set(protocol.attacks) <= ATTACKS
    assert ("pgd" in protocol.attacks) == (protocol.step_size is not None)
    assert protocol.step_size is None or 0 < protocol.step_size < 1
    assert protocol.steps == 100
    assert protocol.samples is None or protocol.samples >= 1000
    assert all(radius.norm in ("linf", "l2") and 0 < radius.eps < 1 for radius in protocol.radii)
    assert all(template.count("{}") == 1 for template in protocol.templates or ())
    assert protocol.purify in (None, "cos")
    assert "arXiv 2" in protocol.about


def test_data_sets_of_the_papers() -> None:
    assert set(PROTOCOLS) == {"tga-zsr-16", "clipure-13", "clipure-cifar10", "clipure-imagenet"}
    sixteen, thirteen = PROTOCOLS["tga-zsr-16"].data, PROTOCOLS["clipure-13"].data
    assert (len(sixteen), len(thirteen)) == (16, 13)
    assert set(SOURCES) - set(sixteen) - set(thirteen) == {"fashion-mnist"}
    assert set(thirteen) - set(sixteen) == {"imagenet-r", "imagenet-sketch"}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_everything_is_missing(name: str, root: Path) -> None:
    lines = missing(PROTOCOLS[name])
    assert tuple(lines) == PROTOCOLS[name].data
    for key, line in lines.items():
        assert line.startswith(f"no {SOURCES[key].title} in {root}: ")
        assert str(root / SOURCES[key].folder) in line
        assert "\n" not in line


def test_present_data_sets_are_not_missing(root: Path) -> None:
    data_sets.cifar10(root)
    assert missing(PROTOCOLS["clipure-cifar10"]) == {}
    lines = missing(PROTOCOLS["tga-zsr-16"])
    assert len(lines) == 15
    assert "cifar10" not in lines


def test_images_are_not_decoded(root: Path) -> None:
    data_sets.imagenet(root)
    for file in root.glob("imagenet/val/*/*.JPEG"):
        file.write_bytes(b"no image")
    assert missing(PROTOCOLS["clipure-imagenet"]) == {}


def test_missing_packages_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert missing(PROTOCOLS["tga-zsr-16"])["pcam"] == "PCAM needs h5py: pip install h5py"


def test_downloads_are_explicit(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[tuple[str, bool, bool]] = []
    monkeypatch.setattr(
        "train.data.dataset.load",
        lambda spec, *, train, download: requests.append((spec, train, download)),
    )
    protocol = PROTOCOLS["clipure-cifar10"]
    assert missing(protocol) == missing(protocol, download=True) == {}
    describe(protocol)
    assert requests == [("cifar10", False, download) for download in (False, True, False)]


def test_described(root: Path) -> None:
    data_sets.cifar10(root)
    text = describe(PROTOCOLS["tga-zsr-16"])
    assert "arXiv 2410.21802" in text.splitlines()[0]
    assert "1 of 16 available: cifar10" in text
    assert all(line in text for line in missing(PROTOCOLS["tga-zsr-16"]).values())
    assert f"{root} (set EDGECLIP_DATA" in text
    assert "pgd, autoattack; 100 steps, pgd in steps of 1/255" in text
    assert "linf 1/255" in text
    assert "all of each data set's test split" in text
    assert "This is a photo of a {}" in text
    assert "42.09% TGA-ZSR, pgd" in text


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_described_in_full(protocol: Protocol) -> None:
    text = describe(protocol)
    assert f"0 of {len(protocol.data)} available\n" in text
    for name in (*protocol.attacks, *protocol.published, *protocol.assumed):
        assert name in text
    assert all(f"{value:.2f}%" in text for value in protocol.published.values())
    assert all(f"  radius     {radius}\n" in text for radius in protocol.radii)


def test_described_radii_and_purification() -> None:
    text = describe(PROTOCOLS["clipure-cifar10"])
    assert "linf 8/255" in text
    assert "l2 0.5" in text
    assert "1000 of each data set's test split" in text
    assert "purified   cos" in text
    assert "pgd" not in text


def test_find() -> None:
    assert find("clipure-13") is PROTOCOLS["clipure-13"]
    with pytest.raises(SettingsError) as caught:
        find("clipure-14")
    names = ", ".join(PROTOCOLS)
    assert str(caught.value) == (
        f"unknown protocol 'clipure-14', did you mean clipure-13? choose one of {names}"
    )
    with pytest.raises(SettingsError, match="unknown protocol 'x'; choose one of tga-zsr-16,"):
        find("x")
