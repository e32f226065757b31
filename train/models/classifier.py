"""CLIP as a classifier for training and evaluation: images in [0, 1] in, logits of the classes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from torch import nn

from train.errors import DataError
from train.models.checkpoints import Source
from train.models.towers import PooledImageEncoder, image_encoder

TEXT_BATCH = 256  # prompts encoded at a time
Attack = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # images, labels, seeds


class Output(NamedTuple):
    """Output of a classifier for B images."""

    logits: torch.Tensor  # (B, K)
    embedding: torch.Tensor  # (B, D), not normalised
    tokens: torch.Tensor | None  # (B, prefix + P, D); None where the encoder has no patch tokens


class Classifier(nn.Module):
    """Image encoder with one text embedding per class.

    Takes float images (B, 3, H, W) in [0, 1] at the encoder's input size. The normalisation is
    inside, so an attack perturbs pixels in [0, 1].
    """

    mean: torch.Tensor
    std: torch.Tensor
    logit_scale: torch.Tensor

    def __init__(
        self,
        source: Source,
        classes: torch.Tensor,
        *,
        train_classes: bool = False,
        bfloat16: bool = False,
        tokens: bool = True,
    ) -> None:
        """Build the classifier.

        classes: unit text embeddings (K, D); train_classes makes them a trainable weight.
        bfloat16: run the encoder's matrix products in bfloat16; outputs keep the dtype of `classes`.
        tokens: compute patch tokens, if the encoder has them.
        """
        super().__init__()
        self.use_bfloat16 = bfloat16
        self.encoder, self.token_spec = (
            image_encoder(source.model) if tokens else (PooledImageEncoder(source.model), None)
        )
        preprocess = PreprocessCfg(**source.model.visual.preprocess_cfg)
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(3, 1, 1), persistent=False)
        scale = source.model.logit_scale.detach().exp()
        self.register_buffer("logit_scale", scale, persistent=False)
        if train_classes:
            self.classes = nn.Parameter(classes.clone())
        else:
            self.register_buffer("classes", classes.clone(), persistent=False)

    def forward(self, images: torch.Tensor) -> Output:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.use_bfloat16):
            embedding, *rest = self.encoder((images - self.mean) / self.std)
        dtype = self.classes.dtype
        embedding, tokens = embedding.to(dtype), rest[0].to(dtype) if rest else None
        return Output(self.scores(embedding), embedding, tokens)

    def scores(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, K) of embeddings (B, D) of any norm."""
        cosines = F.normalize(embedding, dim=-1) @ F.normalize(self.classes, dim=-1).T
        return self.logit_scale * cosines


@torch.no_grad()
def class_embeddings(
    source: Source, names: Sequence[str], templates: Sequence[str]
) -> torch.Tensor:
    """Return unit text embeddings (K, D): the normalised mean over the templates, as in a bundle.

    Raises DataError for two classes whose prompts are the same tokens.
    """
    prompts = [template.replace("{}", name) for name in names for template in templates]
    ids = source.tokenizer(prompts)
    _check_tokens(names, ids.view(len(names), -1))
    rows = [
        source.model.encode_text(chunk, normalize=True).float() for chunk in ids.split(TEXT_BATCH)
    ]
    per_class = torch.cat(rows).view(len(names), len(templates), -1)
    return F.normalize(per_class.mean(1), dim=-1)


def _check_tokens(names: Sequence[str], ids: torch.Tensor) -> None:
    """Raise DataError where two classes have equal rows of token ids."""
    first: dict[bytes, int] = {}
    for i, row in enumerate(ids):
        j = first.setdefault(row.numpy().tobytes(), i)
        if j != i:
            raise DataError(
                f"classes {names[j]!r} and {names[i]!r} cannot be told apart: the model reads both "
                "as the same tokens; rename or merge them"
            )


def count_right(
    model: Classifier, loader: Iterable[Sequence[torch.Tensor]], attack: Attack
) -> tuple[int, int]:
    """Count the images that the model classifies correctly, before and after the attack."""
    counts = [0, 0]
    for batch in loader:
        images, labels, seeds = (x.to(model.mean.device) for x in batch)
        attacked = attack(images, labels, seeds)
        with torch.no_grad():
            for i, pixels in enumerate((images, attacked)):
                counts[i] += int((model(pixels).logits.argmax(1) == labels).sum())
    return counts[0], counts[1]
