"""Tiny data sets in their published formats.

Each writer fills a root folder and returns its contents: for the training (True) and the test split
(False), the class of every image, by its pixels. The pictures are PNG whatever their suffix, so that
decoding is lossless; Pillow ignores the suffix.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo

Classes = dict[bytes, str]  # the class of every image, by its pixels
Splits = dict[bool, Classes]

WNIDS = ImageNetInfo().label_names()
_rng = np.random.default_rng(0)


def picture(height: int = 3, width: int = 4) -> np.ndarray:
    """Draw a random picture, uint8 (H, W, 3)."""
    return _rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    """Encode a picture as PNG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def put(path: Path) -> bytes:
    """Write a new picture; return its pixels."""
    image = picture()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(image))
    return image.tobytes()


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _cifar(folder: Path, batches: dict[bool, list[str]], meta: str, names: list[str]) -> Splits:
    fine = "fine_" if len(names) == 100 else ""
    folder.mkdir()
    # Python 2's NumPy wrote the dtype's flags as integers, and named an older module.
    flags, old_flags = b"\x89\x88\x87", b"K\x00K\x01\x87"
    splits: Splits = {}
    for train, files in batches.items():
        splits[train] = {}
        for file in files:
            images, labels = _rng.integers(0, 256, (2, 32, 32, 3), np.uint8), [3, len(names) - 1]
            batch = {"data": images.transpose(0, 3, 1, 2).reshape(2, -1), f"{fine}labels": labels}
            pickled = pickle.dumps(batch, protocol=2)
            assert pickled.count(flags) == 1
            old = pickled.replace(flags, old_flags).replace(b"numpy._core.", b"numpy.core.")
            (folder / file).write_bytes(old)
            for image, label in zip(images, labels, strict=True):
                splits[train][image.tobytes()] = names[label].replace("_", " ")
    (folder / meta).write_bytes(pickle.dumps({f"{fine}label_names": names}, protocol=2))
    return splits


def cifar10(root: Path) -> Splits:
    files = {True: [f"data_batch_{i}" for i in range(1, 6)], False: ["test_batch"]}
    return _cifar(root / "cifar-10-batches-py", files, "batches.meta", list("abcdefghij"))


def cifar100(root: Path) -> Splits:
    names = [f"fine_class_{i}" for i in range(100)]
    files = {True: ["train"], False: ["test"]}
    return _cifar(root / "cifar-100-python", files, "meta", names)


def stl10(root: Path) -> Splits:
    folder = root / "stl10_binary"
    names = list("abcdefghij")
    write_lines(folder / "class_names.txt", names)
    splits: Splits = {}
    for train, split in ((True, "train"), (False, "test")):
        images = _rng.integers(0, 256, (3, 96, 96, 3), np.uint8)
        labels = np.array([1, 10, 4], np.uint8)
        (folder / f"{split}_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
        (folder / f"{split}_y.bin").write_bytes(labels.tobytes())
        pairs = zip(images, labels, strict=True)
        splits[train] = {image.tobytes(): names[label - 1] for image, label in pairs}
    (folder / "unlabeled_X.bin").write_bytes(bytes(3 * 96 * 96))
    return splits


def sun397(root: Path) -> Splits:
    folder = root / "SUN397"
    names = {
        "/a/abbey": "abbey",
        "/a/apartment_building/outdoor": "outdoor apartment building",
        "/m/mountain_snowy": "snowy mountain",
        "/t/train_station/platform": "train station platform",
    }
    names |= {f"/x/place_{i}": f"place {i}" for i in range(393)}
    write_lines(folder / "ClassName.txt", names)
    return {False: {put(folder / path[1:] / "sun_a.jpg"): name for path, name in names.items()}}


def food101(root: Path) -> Splits:
    folder = root / "food-101"
    names = ["apple_pie", *(f"dish_{i}" for i in range(100))]
    splits: Splits = {}
    for train, split in ((True, "train"), (False, "test")):
        files = {name: [f"{name}/{split}{i}" for i in range(2)] for name in reversed(names)}
        write_lines(folder / "meta" / f"{split}.json", [json.dumps(files)])
        splits[train] = {
            put(folder / "images" / f"{path}.jpg"): name.replace("_", " ")
            for name, paths in files.items()
            for path in paths
        }
    return splits


def pets(root: Path) -> Splits:
    folder = root / "oxford-iiit-pet"
    breeds = ["Abyssinian", "american_bulldog", *(f"breed_{i}" for i in range(35))]
    splits: Splits = {}
    for train, split in ((True, "trainval"), (False, "test")):
        ids = [f"{breed}_{split}" for breed in breeds]  # as in Abyssinian_100
        write_lines(
            folder / "annotations" / f"{split}.txt",
            [f"{name} {index} 1 1" for index, name in enumerate(ids, 1)],
        )
        splits[train] = {
            put(folder / "images" / f"{name}.jpg"): breed.replace("_", " ").title()
            for name, breed in zip(ids, breeds, strict=True)
        }
    return splits


def flowers102(root: Path) -> Splits:
    from scipy.io import savemat

    folder = root / "flowers-102"
    pixels = [put(folder / "jpg" / f"image_{i:05d}.jpg") for i in range(1, 7)]
    savemat(folder / "imagelabels.mat", {"labels": [[1, 102, 60, 1, 2, 102]]})
    savemat(folder / "setid.mat", {"trnid": [[1, 3]], "valid": [[2, 4]], "tstid": [[5, 6]]})
    return {
        True: {pixels[0]: "pink primrose", pixels[2]: "pink-yellow dahlia"},
        False: {pixels[4]: "hard-leaved pocket orchid", pixels[5]: "blackberry lily"},
    }


def dtd(root: Path) -> Splits:
    folder = root / "dtd" / "dtd"
    splits: Splits = {}
    for train, split in ((True, "train"), (False, "test")):
        paths = [f"texture{i}/texture{i}_{split}.jpg" for i in range(47)]
        write_lines(folder / "labels" / f"{split}1.txt", paths)
        splits[train] = {put(folder / "images" / path): path.partition("/")[0] for path in paths}
    return splits


def eurosat(root: Path) -> Splits:
    names = {
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
    folder = root / "eurosat" / "2750"
    return {False: {put(folder / key / f"{key}_1.jpg"): name for key, name in names.items()}}


def fgvc_aircraft(root: Path) -> Splits:
    folder = root / "fgvc-aircraft-2013b" / "data"
    names = ["707-320", "F/A-18", *(f"Variant {i}" for i in range(98))]
    write_lines(folder / "variants.txt", names)
    splits: Splits = {}
    for train, split in ((True, "trainval"), (False, "test")):
        files = {f"{split}{i}": name for i, name in enumerate(names[:3])}
        rows = [f"{file} {name}" for file, name in files.items()]
        write_lines(folder / f"images_variant_{split}.txt", rows)
        splits[train] = {
            put(folder / "images" / f"{file}.jpg"): name for file, name in files.items()
        }
    return splits


def caltech101(root: Path) -> Splits:
    folder = root / "caltech101" / "101_ObjectCategories"
    names = {"Faces": "off-center face", "car_side": "side of a car", "Leopards": "leopard"}
    names |= {f"sea_animal{i}": f"sea animal{i}" for i in range(98)}
    put(folder / "BACKGROUND_Google" / "image_0001.jpg")
    return {
        False: {
            put(folder / key / f"image_{i:04d}.jpg"): name
            for key, name in names.items()
            for i in (1, 2)
        }
    }


def caltech256(root: Path) -> Splits:
    folder = root / "caltech256" / "256_ObjectCategories"
    names = {"001.ak47": "AK-47", "002.american-flag": "american flag", "056.dog": "dog"}
    names |= {"198.spider": "spider", "232.t-shirt": "t-shirt", "240.watch-101": "watch"}
    free = [i for i in range(1, 257) if f"{i:03d}" not in {key[:3] for key in names}]
    names |= {f"{i:03d}.some-thing{i}": f"some thing{i}" for i in free}
    classes = {put(folder / key / f"{key[:3]}_0001.jpg"): name for key, name in names.items()}
    put(folder / "257.clutter" / "257_0001.jpg")
    # The real archive has these two stray entries.
    put(folder / "056.dog" / "greg" / "vision309" / "056_0001.jpg")
    (folder / "198.spider" / "RENAME2").write_text("#!/bin/sh\n")
    return {False: classes}


def cars(root: Path) -> Splits:
    from scipy.io import savemat

    folder = root / "stanford_cars"
    names = ["AM General Hummer SUV 2000", *(f"Make Model {i}" for i in range(195))]
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array([names], object)})
    files = {True: "devkit/cars_train_annos.mat", False: "cars_test_annos_withlabels.mat"}
    splits: Splits = {}
    for train, file in files.items():
        split = "cars_train" if train else "cars_test"
        rows = [("00001.jpg", 1), ("00002.jpg", 196), ("00003.jpg", 2)]
        kind = [("bbox_x1", object), ("class", object), ("fname", object)]
        table = np.array([(1, np.uint8(label), name) for name, label in rows], kind)
        savemat(folder / file, {"annotations": table[None]})
        splits[train] = {put(folder / split / name): names[label - 1] for name, label in rows}
    return splits


def pcam(root: Path) -> Splits:
    import h5py

    names = ("lymph node", "lymph node containing metastatic tumor tissue")
    (root / "pcam").mkdir()
    splits: Splits = {}
    for train, split in ((True, "train"), (False, "test")):
        images = _rng.integers(0, 256, (3, 96, 96, 3), np.uint8)
        labels = np.array([1, 0, 1], np.uint8)
        stem = root / "pcam" / f"camelyonpatch_level_2_split_{split}"
        with h5py.File(f"{stem}_x.h5", "w") as file:
            file["x"] = images
        with h5py.File(f"{stem}_y.h5", "w") as file:
            file["y"] = labels.reshape(-1, 1, 1, 1)
        pairs = zip(images, labels, strict=True)
        splits[train] = {image.tobytes(): names[label] for image, label in pairs}
    return splits


def tiny_imagenet(root: Path) -> Splits:
    folder = root / "tiny-imagenet-200"
    names = {"n01443537": "goldfish", "n00000000": "made-up thing"}
    wnids = [*names, *(wnid for wnid in WNIDS if wnid not in names)][:200]
    write_lines(folder / "wnids.txt", wnids)
    write_lines(
        folder / "words.txt",
        ["n01443537\tcarp, Carassius auratus", "n00000000\tmade-up thing, another word"],
    )
    train = {
        put(folder / "train" / wnid / "images" / f"{wnid}_0.JPEG"): names.get(wnid, "")
        for wnid in wnids
    }
    rows = [(f"val_{i}.JPEG", wnid) for i, wnid in enumerate(names)]
    write_lines(
        folder / "val" / "val_annotations.txt",
        [f"{file}\t{wnid}\t0\t32\t44\t62" for file, wnid in rows],
    )
    val = {put(folder / "val" / "images" / file): names[wnid] for file, wnid in rows}
    return {True: {key: name for key, name in train.items() if name}, False: val}


# Ids at the ends and in the middle of ImageNet's order, and the four whose names are not unique.
NAMED = {
    "n01440764": "tench",
    "n02123045": "tabby cat",
    "n03773504": "missile",
    "n04008634": "projectile",
    "n04355933": "sunglass",
    "n04356056": "sunglasses",
    "n15075141": "toilet paper",
}


def wordnet(folder: Path, count: int) -> Classes:
    """Write class folders of ImageNet; return the images of the classes in `NAMED`."""
    wnids = sorted([*NAMED, *(wnid for wnid in WNIDS if wnid not in NAMED)][:count])
    return {
        pixels: NAMED[wnid]
        for wnid in wnids
        if (pixels := put(folder / wnid / f"{wnid}_1.JPEG")) and wnid in NAMED
    }


def imagenet(root: Path) -> Splits:
    folder = root / "imagenet"
    return {True: wordnet(folder / "train", 1000), False: wordnet(folder / "val", 1000)}


def imagenet_r(root: Path) -> Splits:
    write_lines(root / "imagenet-r" / "README.txt", ["as in the real archive"])
    return {False: wordnet(root / "imagenet-r", 200)}


def imagenet_sketch(root: Path) -> Splits:
    return {False: wordnet(root / "sketch", 1000)}


WRITERS = {
    "tiny-imagenet": tiny_imagenet,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "stl10": stl10,
    "sun397": sun397,
    "food101": food101,
    "pets": pets,
    "flowers102": flowers102,
    "dtd": dtd,
    "eurosat": eurosat,
    "fgvc-aircraft": fgvc_aircraft,
    "imagenet": imagenet,
    "imagenet-r": imagenet_r,
    "imagenet-sketch": imagenet_sketch,
    "caltech101": caltech101,
    "caltech256": caltech256,
    "cars": cars,
    "pcam": pcam,
}


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write a uint8 array in the MNIST family's IDX format, compressed."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), mtime=0))


def write_shard(path: Path, samples: dict[str, tuple[np.ndarray, int]], kind: str = "png") -> None:
    members: dict[str, bytes] = {}
    for key, (image, label) in samples.items():
        members[f"{key}.cls"] = str(label).encode()
        members[f"{key}.json"] = b"{}"
        members[f"{key}.{kind}"] = png(image)
    write_tar(path, members)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, raw in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
