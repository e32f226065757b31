"""Adversarial example for `edgeclip explain`, written to attacked/.

    python -m examples.make_attacked runs/fashion-robust dress

The attack is PGD with 100 steps on the weights of a run, L-inf eps 8/255, rounded to the 8-bit levels
of a PNG.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from edgeclip import storage
from edgeclip.labels import read_labels
from train.attacks import pgd
from train.data.dataset import DataSet
from train.data.loader import Pictures
from train.data.samples import ImageFiles
from train.models.checkpoints import load
from train.models.classifier import Classifier, class_embeddings
from train.models.wording import wording

HERE = Path(__file__).parent
EPS = 8 / 255


def main() -> None:
    """Attack one example and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", help="folder of the run to attack")
    parser.add_argument("label", help="label of the example, one of labels.txt")
    args = parser.parse_args()
    names = [label.name for label in read_labels(str(HERE / "labels.txt"))]
    truth, stem = names.index(args.label), args.label.replace(" ", "-")
    source = load(args.run, None)
    classes = class_embeddings(source, names, wording(source).templates)
    model = Classifier(source, classes).eval()
    files = ImageFiles.of([str(HERE / f"{stem}.png")], [truth])
    pictures = Pictures(DataSet("examples", tuple(names), (), files), source.model.visual)
    image, label = pictures[0, 0][0][None], torch.tensor([truth])
    attacked = pgd(
        lambda x: model(x).logits,
        image,
        label,
        eps=EPS,
        step_size=EPS / 4,
        steps=100,
        loss="cw",
        generator=torch.Generator().manual_seed(0),
    )
    pixels = (attacked[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    (HERE / "attacked").mkdir(exist_ok=True)
    with storage.writing(HERE / "attacked" / f"{stem}.png") as file:
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")


if __name__ == "__main__":
    main()
