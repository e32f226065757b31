"""Evaluation protocols of the papers, by name: data sets, attacks, sizes and prompts.

Two figures compare only if all of this is the same. `assumed` lists the settings that were not found
in the text of the paper, and the reason for our choice. The attacked model is not part of a protocol.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from train.data import dataset
from train.data.samples import default_root
from train.errors import DataError, SettingsError


@dataclass(frozen=True)
class Radius:
    """Limit to the change of an image: a norm, and eps in units of [0, 1] under either norm."""

    norm: str
    eps: float

    def __str__(self) -> str:
        return f"{self.norm} {_of_255(self.eps) if self.norm == 'linf' else f'{self.eps:g}'}"


@dataclass(frozen=True)
class Protocol:
    """Evaluation by every attack, within every radius, on every data set.

    about: description and paper. data: names for train.data.dataset, in the paper's order.
    attacks: names for train.evaluate. steps: of each attack that has steps. step_size: for pgd, in
    units of [0, 1]. samples: images of each data set; None for its whole test split. templates: None
    for the model's own. purify: as in edgeclip.Runtime. published: figures in percent, averaged over
    the data sets, by name. assumed: settings of our own choice, with the reason.
    """

    about: str
    data: tuple[str, ...]
    radii: tuple[Radius, ...]
    attacks: tuple[str, ...]
    steps: int
    step_size: float | None
    samples: int | None
    templates: tuple[str, ...] | None
    purify: str | None
    published: Mapping[str, float]
    assumed: tuple[str, ...]


_CLIPURE = "CLIPure, Zhang et al., ICLR 2025, arXiv 2502.18176"
_CLIPURE_PROMPT = ("a photo of a {}.",)  # from its abstract
_CLIPURE_ASSUMED = (
    "prompt: one, from the abstract; whether several are averaged was not found",
    "published figures: from the abstract, which names neither the variant nor the norm",
)

PROTOCOLS = {
    "tga-zsr-16": Protocol(
        about="zero-shot robustness on 16 data sets (TGA-ZSR, Yu et al., NeurIPS 2024, "
        "arXiv 2410.21802)",
        data=(
            "tiny-imagenet", "cifar10", "cifar100", "stl10", "sun397", "food101", "pets",
            "flowers102", "dtd", "eurosat", "fgvc-aircraft", "imagenet", "caltech101", "caltech256",
            "cars", "pcam",
        ),
        radii=(Radius("linf", 1 / 255),),
        attacks=("pgd", "autoattack"),
        steps=100,
        step_size=1 / 255,
        samples=None,
        templates=("This is a photo of a {}",),
        purify=None,
        published={
            "TGA-ZSR, clean": 56.44,
            "TGA-ZSR, pgd": 42.09,
            "TGA-ZSR trained with beta 0.009, autoattack": 30.86,
            "CLIP, pgd": 4.90,
            "CLIP, autoattack": 0.09,
            "TeCoA, pgd": 28.06,
            "TeCoA, autoattack": 26.55,
            "PMG-AFT, pgd": 32.51,
            "PMG-AFT, autoattack": 30.78,
            "FARE, pgd": 18.25,
            "FARE, autoattack": 19.78,
        },
        assumed=(
            "images: all, since no draw of some was found",
            "AutoAttack: its standard version, since none was found",
        ),
    ),
    "clipure-13": Protocol(
        about=f"zero-shot robustness on 13 data sets ({_CLIPURE})",
        data=(
            "caltech101", "cars", "cifar10", "cifar100", "dtd", "eurosat", "fgvc-aircraft",
            "flowers102", "imagenet-r", "imagenet-sketch", "pcam", "pets", "stl10",
        ),
        radii=(Radius("linf", 4 / 255),),
        attacks=("autoattack",),
        steps=100,
        step_size=None,
        samples=1000,
        templates=_CLIPURE_PROMPT,
        purify="cos",
        published={
            "CLIPure above the best before it, robust, relative": 108.0,
            "CLIP ViT-L/14, clean (arXiv 2402.12336)": 73.1,
            "CLIP ViT-L/14, robust (arXiv 2402.12336)": 0.0,
            "TeCoA-4 ViT-L/14, clean (arXiv 2402.12336)": 54.2,
            "TeCoA-4 ViT-L/14, robust (arXiv 2402.12336)": 31.9,
            "FARE-4 ViT-L/14, clean (arXiv 2402.12336)": 61.1,
            "FARE-4 ViT-L/14, robust (arXiv 2402.12336)": 32.4,
        },
        # FARE's public evaluation is of the same 13 data sets, within 2/255 and 4/255.
        assumed=(
            "AutoAttack, its radius, 1000 images: FARE's (arXiv 2402.12336) for these data sets",
            *_CLIPURE_ASSUMED,
        ),
    ),
    "clipure-cifar10": Protocol(
        about=f"CIFAR-10 under two norms ({_CLIPURE})",
        data=("cifar10",),
        radii=(Radius("linf", 8 / 255), Radius("l2", 0.5)),
        attacks=("autoattack",),
        steps=100,
        step_size=None,
        samples=1000,
        templates=_CLIPURE_PROMPT,
        purify="cos",
        published={"CLIPure, robust": 91.1, "the best before it, robust": 71.7},
        assumed=(
            "AutoAttack and its radii: RobustBench's for this data set (arXiv 2010.09670)",
            "images: 1000, as with the 13 data sets",
            *_CLIPURE_ASSUMED,
        ),
    ),
    "clipure-imagenet": Protocol(
        about=f"ImageNet ({_CLIPURE})",
        data=("imagenet",),
        radii=(Radius("linf", 4 / 255),),
        attacks=("autoattack",),
        steps=100,
        step_size=None,
        samples=1000,
        templates=_CLIPURE_PROMPT,
        purify="cos",
        published={"CLIPure, robust": 72.6, "the best before it, robust": 59.6},
        assumed=(
            "AutoAttack and its radius: RobustBench's for this data set (arXiv 2010.09670)",
            "images: 1000, as with the 13 data sets",
            *_CLIPURE_ASSUMED,
        ),
    ),
}  # fmt: skip


def find(name: str) -> Protocol:
    """Return a protocol by name. Raises SettingsError for an unknown name."""
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    near = difflib.get_close_matches(name, PROTOCOLS, n=1)
    raise SettingsError(
        f"unknown protocol {name!r}"
        + (f", did you mean {near[0]}?" if near else ";")
        + f" choose one of {', '.join(PROTOCOLS)}"
    )


def missing(protocol: Protocol, download: bool = False) -> dict[str, str]:
    """Return one line for each data set that cannot be loaded: what is missing, and what to do."""
    return {name: problem for name, problem in _problems(protocol, download) if problem}


def _problems(protocol: Protocol, download: bool) -> list[tuple[str, str]]:
    """Return each data set's name and why it cannot be loaded, or ""; no image is decoded."""
    problems = []
    for name in protocol.data:
        problem = ""
        try:
            dataset.load(name, train=False, download=download)
        except DataError as err:
            problem = str(err)
        problems.append((name, problem))
    return problems


def describe(protocol: Protocol) -> str:
    """Return the protocol as text, with the data sets that are available."""
    problems = _problems(protocol, download=False)
    available = [name for name, problem in problems if not problem]
    pace = f", pgd in steps of {_of_255(protocol.step_size)}" if protocol.step_size else ""
    templates = protocol.templates
    rows = [
        (
            "data",
            f"{len(available)} of {len(problems)} available"
            + (f": {', '.join(available)}" if available else ""),
        ),
        *(("missing", problem) for _, problem in problems if problem),
        ("folder", f"{default_root()} (set EDGECLIP_DATA for another)"),
        ("attacks", f"{', '.join(protocol.attacks)}; {protocol.steps} steps{pace}"),
        *(("radius", str(radius)) for radius in protocol.radii),
        ("images", f"{protocol.samples or 'all'} of each data set's test split"),
        *(("prompt", text) for text in templates or ("the model's own",)),
        ("purified", protocol.purify or "no"),
        *(("published", f"{value:.2f}% {name}") for name, value in protocol.published.items()),
        *(("assumed", text) for text in protocol.assumed),
    ]
    return "\n".join([protocol.about, *(f"  {key:11}{text}" for key, text in rows)])


def _of_255(size: float) -> str:
    return f"{size * 255:g}/255"
