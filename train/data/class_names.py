"""Class names of the public data sets, in everyday words.

Most names come from the data sets' files or from torchvision; this module corrects the others.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

EUROSAT = {
    "AnnualCrop": "annual crop land",
    "Forest": "forest",
    "HerbaceousVegetation": "herbaceous vegetation",
    "Highway": "highway or road",
    "Industrial": "industrial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings",
    "River": "river",
    "SeaLake": "sea or lake",
}
PCAM = ("lymph node", "lymph node containing metastatic tumor tissue")

_CALTECH = {
    "Faces": "off-center face",
    "Faces_easy": "centered face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
    "airplanes": "airplane",
    "binocular": "binoculars",
    "car_side": "side of a car",
    "water_lilly": "water lily",
    # Caltech-256
    "ak47": "AK-47",
    "airplanes-101": "airplane",
    "car-side-101": "side of a car",
    "cd": "CD",
    "dumb-bell": "dumbbell",
    "faces-easy-101": "centered face",
    "head-phones": "headphones",
    "joy-stick": "joystick",
    "leopards-101": "leopard",
    "light-house": "lighthouse",
    "motorbikes-101": "motorbike",
    "pci-card": "PCI card",
    "speed-boat": "speedboat",
    "t-shirt": "t-shirt",
    "tower-pisa": "tower of Pisa",
    "tweezer": "tweezers",
    "vcr": "VCR",
    "yo-yo": "yo-yo",
}

# Kinds that follow the name of a place, as in "bakery shop"; others precede it, as in "indoor church".
_SUFFIXES = {
    "backseat",
    "barrel_storage",
    "bottle_storage",
    "coral_reef",
    "door",
    "frontseat",
    "platform",
    "shop",
}
_SUN397 = {
    "batters_box": "batter's box",
    "butchers_shop": "butcher's shop",
    "childs_room": "child's room",
    "dentists_office": "dentist's office",
    "kindergarden_classroom": "kindergarten classroom",
    "mountain_snowy": "snowy mountain",
    "theater/indoor_procenium": "indoor proscenium theater",
    "theater/indoor_seats": "indoor theater seats",
    "veterinarians_office": "veterinarian's office",
    "videostore": "video store",
}


def words(name: str) -> str:
    """Replace underscores by spaces: `apple_pie` -> apple pie."""
    return " ".join(name.replace("_", " ").split())


def fold(name: str) -> str:
    """Remove differences that CLIP ignores: case, white space, Unicode form."""
    composed = unicodedata.normalize("NFC", name)
    return " ".join(unicodedata.normalize("NFC", composed.casefold()).split())


def caltech(folder: str) -> str:
    """Return the class name of a folder of Caltech-101 or -256: `103.soccer-ball` -> soccer ball."""
    name = folder.partition(".")[2] or folder
    return _CALTECH.get(name) or words(name.removesuffix("-101").replace("-", " ")).lower()


def flower(name: str) -> str:
    """Correct torchvision's name of a class of Flowers-102: one ends in a question mark."""
    return name.rstrip("?")


def sun397(name: str) -> str:
    """Return the class name of a scene: `apartment_building/outdoor` -> outdoor apartment building."""
    place, _, kind = name.partition("/")
    order = (place, kind) if kind in _SUFFIXES else (kind, place)
    return _SUN397.get(name) or words(" ".join(order))


def imagenet(wnids: Sequence[str], others: Mapping[str, str] | None = None) -> list[str]:
    """Return open_clip's names, curated by OpenAI's authors, of WordNet ids such as n01440764.

    Where open_clip has one name for two classes (missile, sunglasses), WordNet's first word is
    used: names are unique. `others` names ids that are not among ImageNet's 1000. Raises KeyError
    for an id in neither.
    """
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data.imagenet_info import ImageNetInfo

    info: Any = ImageNetInfo()  # type annotations are missing in timm
    known: dict[str, str] = dict(zip(info.label_names(), IMAGENET_CLASSNAMES, strict=True))
    count = Counter(known.values())

    def name(wnid: str) -> str:
        if wnid not in known and others is not None:
            return others[wnid]
        if count[known[wnid]] > 1:
            description: str = info.label_name_to_description(wnid)
            return description.partition(",")[0]
        return known[wnid]

    return [name(wnid) for wnid in wnids]
