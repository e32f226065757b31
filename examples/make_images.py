"""Example images, made from the first test image of each class of Fashion-MNIST (MIT).

    python -m examples.make_images

The PNGs have the original 28 x 28 pixels. The JPEGs are three of these images, enlarged and coloured
on white or light backgrounds, like photos in a shop.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from edgeclip import storage
from train.data import augment, fashion_mnist

HERE = Path(__file__).parent
COLOURED = {"ankle boot": 1, "trousers": 2, "dress": 3}  # class -> seed of its colours


def main() -> None:
    """Write the images."""
    split = fashion_mnist.load_split("fashion-mnist", train=False)
    for index, name in enumerate(split.classes):
        first = int((split.labels == index).nonzero()[0])
        grey = split.images[first]
        stem = name.replace(" ", "-")
        with storage.writing(HERE / f"{stem}.png") as file:
            Image.fromarray(grey.numpy()).save(file, "PNG")
        if name in COLOURED:
            rng = torch.Generator().manual_seed(COLOURED[name])
            picture = augment.recolour(grey[None], rng)[0].permute(1, 2, 0).numpy()
            image = Image.fromarray((picture * 255).round().astype(np.uint8))
            image = image.resize((336, 336), Image.Resampling.BICUBIC)
            with storage.writing(HERE / f"coloured-{stem}.jpg") as file:
                image.save(file, "JPEG", quality=90)


if __name__ == "__main__":
    main()
