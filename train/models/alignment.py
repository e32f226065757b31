"""CLIP from an image classifier and a sentence encoder, by a projection in closed form.

An image is the mean of its classes' texts, weighted by the classifier (ConSE, Norouzi et al., ICLR
2014, arXiv 1312.5650). With logits l (K,) and class texts T (K, D), the embedding is

    e = GELU(FLOOR) m + sum over k of GELU(SHARPNESS (l_k - threshold)) T_k

where m is the mean class text, and the threshold a high logit, such as the fourth highest, the mean over
images. A picture of nothing has no class above the threshold: its embedding is m, where it would be zero.
GELU is smooth, yet so sharp here that it hides gradients: attack along smoother heads too. This is
open_clip's MLP projection: the classifier is its hidden layer. All texts lose their component along the
mean of the class names.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
import torch.nn.functional as F
from open_clip.tokenizer import HFTokenizer
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from train.data import class_names
from train.errors import ModelError
from train.models.architectures import CONFIG, build_model, find_architecture
from train.models.classifier import TEXT_BATCH, Output
from train.models.transformers_text import FOLDER, save
from train.models.weight_files import read_weights
from train.models.word_net import hypernyms, read_nouns
from train.progress import brief, quiet, say

# Factor of the logits in GELU: with 1, the many classes below the threshold weigh too much.
SHARPNESS = 3.0
FLOOR = 1.0  # against ten and more for the sum
# Number of hypernyms, weight of the nearest, and factor of each further one.
HYPERNYMS, SHARE, DECAY = 4, 0.3, 0.8


@dataclass(frozen=True)
class Classes:
    """Synonyms of each class of a classifier, and its hypernyms, nearest first."""

    synonyms: tuple[tuple[str, ...], ...]
    hypernyms: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the first synonym of each class."""
        return tuple(words[0] for words in self.synonyms)


class ImageClassifier(nn.Module):
    """Classifier from timm, for images (B, 3, H, W) in [0, 1]; its embedding is the pooled feature."""

    mean: Tensor
    std: Tensor
    trunk: Any

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.trunk = trunk
        for name in ("mean", "std"):
            values = torch.tensor(trunk.pretrained_cfg[name]).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> Output:
        features = self.trunk.forward_features((images - self.mean) / self.std)
        embedding = self.trunk.forward_head(features, pre_logits=True)
        classifier: nn.Module = self.trunk.get_classifier()
        return Output(classifier(embedding), embedding, None)


def load_classifier(name: str, weights: str | None) -> ImageClassifier:
    """Load an image classifier of timm, in evaluation mode.

    weights: a file whose tensors have timm's names, or other names and timm's order and shapes; None
    downloads timm's. Raises ModelError.
    """
    state = None if weights is None else read_weights(weights).state
    trunk: Any  # timm's own type lacks the methods of its models
    try:
        with quiet():
            if state is None:
                trunk = timm.create_model(name, pretrained=True)
            else:
                trunk = timm.create_model(name, num_classes=_class_count(name, state))
    except Exception as err:  # unknown names and failed downloads raise anything
        raise ModelError(f"timm cannot make {name!r}: {brief(err)}") from err
    if state is not None:
        trunk.load_state_dict(_match(trunk.state_dict(), state, str(weights)))
    if not isinstance(trunk.get_classifier(), nn.Linear):
        raise ModelError(f"{name} has no linear classifier: choose a classification model of timm")
    return ImageClassifier(trunk.eval())


def _class_count(name: str, state: Mapping[str, Tensor]) -> int:
    """Return the length of the classifier's bias, which is the last tensor under other names."""
    settings = timm.get_pretrained_cfg(name)
    bias = f"{settings.classifier}.bias" if settings else ""
    return (state[bias] if bias in state else list(state.values())[-1]).numel()


def _match(
    expected: dict[str, Tensor], state: Mapping[str, Tensor], file: str
) -> dict[str, Tensor]:
    """Return the state under the expected names. Raises ModelError."""
    if state.keys() == expected.keys():
        return dict(state)
    if [v.shape for v in state.values()] != [v.shape for v in expected.values()]:
        raise ModelError(f"{file} does not hold this image tower's weights, by name or in order")
    say(f"{file} names its tensors in another way: they are taken in order")
    return dict(zip(expected, state.values(), strict=True))


def choose_classes(trunk: Any, names: Sequence[str] | None, nouns: Path | None) -> Classes:
    """Return the classes of a classifier: the given names, or those of its ImageNet subset.

    ImageNet's classes have open_clip's names and the first words of WordNet. nouns: WordNet's data.noun,
    for the hypernyms. Raises ModelError.
    """
    count = trunk.num_classes
    if names is not None:
        if nouns is not None:
            raise ModelError("--hypernyms needs ImageNet's own classes: leave out --classes")
        if len(names) != count:
            raise ModelError(f"the classifier has {count} classes, --classes {len(names)}")
        return Classes(tuple((name,) for name in names), ((),) * count)
    subset = infer_imagenet_subset(trunk)
    if subset is None:
        raise ModelError(f"the classifier has {count} classes of unknown names: give --classes")
    info: Any = ImageNetInfo(subset)  # type annotations are missing in timm
    ids = list(info.label_names())
    first = [info.label_name_to_description(wnid).partition(",")[0] for wnid in ids]
    pairs = zip(class_names.imagenet(ids), first, strict=True)
    synonyms = tuple(
        tuple({class_names.fold(name): name for name in pair}.values()) for pair in pairs
    )
    table = read_nouns(nouns) if nouns else None
    chains = (tuple(hypernyms(table, wnid, HYPERNYMS)) if table else () for wnid in ids)
    return Classes(synonyms, tuple(chains))


def build_clip(
    trunk: Any,
    name: str,
    text: str,
    *,
    pooling: str,
    context_length: int,
    projection: str,
    size: int | None = None,
) -> tuple[Any, HFTokenizer, dict[str, Any]]:
    """Build a CLIP of both towers with their weights, its tokenizer and its configuration.

    trunk: image tower from timm of the given name. text: folder or hub name of a sentence encoder of
    transformers. pooling: mean or cls. projection: mlp or linear; its weights are still random.
    size: of input images, in pixels; None for the trunk's own.
    Raises ModelError.
    """
    from transformers import AutoModel, AutoTokenizer

    try:
        with quiet():
            tower = AutoModel.from_pretrained(text, add_pooling_layer=False)
            AutoTokenizer.from_pretrained(text)
            tokenizer = HFTokenizer(text, context_length=context_length)
    except Exception as err:  # transformers raises anything
        raise ModelError(f"the sentence encoder {text} cannot be loaded: {brief(err)}") from err
    width = int(tower.config.hidden_size)
    settings = trunk.pretrained_cfg
    config: dict[str, Any] = {
        "model_cfg": {
            # open_clip's MLP has twice as many hidden units: one for each class, and the floor's.
            "embed_dim": max(width, 8 * -(-(trunk.num_classes + 1) // 16)),
            "vision_cfg": {
                "timm_model_name": name,
                "timm_model_pretrained": False,
                "timm_pool": "avg",
                "timm_proj": projection,
                "image_size": size or settings["input_size"][-1],
            },
            "text_cfg": {
                "hf_model_name": FOLDER,
                "hf_model_pretrained": False,
                "hf_tokenizer_name": FOLDER,
                "hf_pooler_type": {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}[
                    pooling
                ],
                "hf_proj_type": "linear",
                "context_length": context_length,
                "tokenizer_kwargs": {"subfolder": FOLDER},
            },
            "quick_gelu": False,
        },
        "preprocess_cfg": {
            "mean": list(settings["mean"]),
            "std": list(settings["std"]),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    with TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        save(Path(folder), tower.config, tokenizer)
        architecture = find_architecture(folder)
        model = build_model(architecture, False, config["preprocess_cfg"])
    model.text.transformer.load_state_dict(tower.state_dict())
    set_trunk(model, trunk)
    config["preprocess_cfg"] = model.visual.preprocess_cfg
    return model, tokenizer, config


def set_trunk(model: Any, trunk: Any) -> None:
    """Copy the weights of an image tower from timm into a CLIP, without the classifier."""
    state = {name: trunk.state_dict()[name] for name in model.visual.trunk.state_dict()}
    model.visual.trunk.load_state_dict(state)


@torch.no_grad()
def set_text_projection(
    model: Any, tokenizer: HFTokenizer, classes: Classes, templates: Sequence[str]
) -> Tensor:
    """Set the text projection, which removes the classes' mean; return the class texts (K, D).

    The text of a class is the mean of its synonyms, and SHARE * DECAY^i of its hypernyms, normalised.
    """
    weight = model.text.proj.weight  # (D, width)
    width = weight.shape[1]
    weight.copy_(torch.eye(*weight.shape))
    words = list(dict.fromkeys(itertools.chain(*classes.synonyms, *classes.hypernyms)))
    pooled = _pool(model, tokenizer, words, templates)
    plain = dict(zip(words, _unit_means(pooled), strict=True))
    mean = F.normalize(_mean_rows(classes.synonyms, plain).mean(0), dim=0)
    weight -= torch.outer(mean, mean[:width])
    rows = dict(zip(words, _unit_means(pooled - (pooled @ mean)[..., None] * mean), strict=True))
    texts = _mean_rows(classes.synonyms, rows)
    for row, chain in zip(texts, classes.hypernyms, strict=True):
        for i, word in enumerate(chain):
            row += SHARE * DECAY**i * rows[word]
    return F.normalize(texts, dim=1)


def _mean_rows(synonyms: Sequence[Sequence[str]], rows: Mapping[str, Tensor]) -> Tensor:
    """Return the unit means (K, D) of each class's synonyms."""
    means = [torch.stack([rows[word] for word in words]).mean(0) for words in synonyms]
    return F.normalize(torch.stack(means), dim=1)


def _unit_means(pooled: Tensor) -> Tensor:
    """Return the unit means (K, D) of the unit embeddings of (K, templates, D)."""
    return F.normalize(F.normalize(pooled, dim=-1).mean(1), dim=-1)


def _pool(
    model: Any, tokenizer: HFTokenizer, names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Return the text embeddings (K, templates, D) of names, not normalised."""
    ids = tokenizer([template.replace("{}", name) for name in names for template in templates])
    lengths = (ids != model.text.config.pad_token_id).sum(1)
    rows = torch.empty(len(ids), model.text.output_dim)
    for batch in lengths.argsort().split(
        TEXT_BATCH
    ):  # of similar length: padding changes no embedding
        rows[batch] = model.encode_text(ids[batch, : lengths[batch].max()])
    return rows.view(len(names), len(templates), -1)


@torch.no_grad()
def set_image_projection(
    model: Any, linear: nn.Linear, texts: Tensor, threshold: float, features: Tensor
) -> None:
    """Set the image projection from the classifier's last layer and the class texts (K, D).

    An MLP has the embedding of the module's equation. A linear projection is fitted to it on
    features (N, F) of images, by least squares with the features' variance as a ridge.
    """
    hidden = SHARPNESS * linear.weight, SHARPNESS * (linear.bias - threshold)
    head = model.visual.head
    if hasattr(head, "mlp"):
        first, second = head.mlp.fc1, head.mlp.fc2
        for parameter in (first.weight, first.bias, second.weight):
            parameter.zero_()
        first.weight[: len(texts)], first.bias[: len(texts)] = hidden
        second.weight[:, : len(texts)] = texts.T
        first.bias[len(texts)] = FLOOR
        second.weight[:, len(texts)] = F.normalize(texts.mean(0), dim=0)
        return
    target = F.normalize(F.gelu(F.linear(features, *hidden)) @ texts, dim=1)
    gram = features.T @ features / len(features)
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    weights = torch.linalg.solve(gram + ridge, features.T @ target / len(features))
    head.proj.weight.copy_(weights.T)


@torch.no_grad()
def fit_scale(embeddings: Tensor, texts: Tensor, logits: Tensor) -> float:
    """Return the factor of cosines whose probabilities are nearest to the classifier's.

    embeddings (N, D), texts (K, D); logits (N, K) of the classifier. Nearest in the mean
    Kullback-Leibler divergence, among whole numbers from 5 to 100.
    """
    cosines = F.normalize(embeddings, dim=1) @ texts.T
    target = F.log_softmax(logits, 1)

    def distance(scale: int) -> float:
        trained = F.log_softmax(scale * cosines, 1)
        return F.kl_div(trained, target, log_target=True, reduction="batchmean").item()

    return float(min(range(5, 101), key=distance))
