"""Subjects of a measurement: a model in PyTorch, or a bundle with the weights it was exported from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edgeclip.bundle import MANIFEST, Bundle
from edgeclip.labels import check_templates
from edgeclip.purify import DiffPurifier, Purifier, check_prior
from edgeclip.runtime import Runtime
from train.errors import ModelError, SettingsError
from train.models.architectures import is_model_folder
from train.models.checkpoints import Source, load
from train.models.classifier import Classifier, class_embeddings
from train.models.trained_prior import TrainedPrior, load_prior, null_context
from train.models.wording import null_text, wording
from train.robustness.defence import Defence
from train.robustness.purification import NullPrior

AGREEMENT = 1e-2  # difference in probability between a bundle's runtime and its checkpoint


@dataclass(frozen=True)
class Subject:
    """Model with its prompts, and the bundle exported from it, if any."""

    source: Source
    templates: tuple[str, ...]
    null_templates: tuple[str, ...]
    bundle: Bundle | None = None
    prior: TrainedPrior | None = None  # for CLIPure-Diff

    @property
    def prior_gradient(self) -> str:
        """Gradient that a step of the prior follows: the bundle's, or exact without a bundle."""
        spec = self.bundle.manifest.prior if self.bundle else None
        return spec.gradient if spec else "exact"

    def defence(self, classes: Sequence[str], purifier: Purifier) -> Defence:
        """Return the model in PyTorch for white-box attacks. Raises SettingsError without a prior."""
        embeddings = class_embeddings(self.source, classes, self.templates)
        null = torch.from_numpy(null_text(self.source, self.null_templates))
        model = Classifier(self.source, embeddings, tokens=False)
        return Defence(model, null, purifier, self._null_prior(purifier)).eval()

    def _null_prior(self, purifier: Purifier) -> NullPrior | None:
        if not isinstance(purifier, DiffPurifier):
            return None
        if self.prior is None:
            raise SettingsError(
                "--purify diff needs the weights of a prior: name its run with --prior"
            )
        prior = self.prior.model
        check_prior(purifier, prior.shape.timesteps)
        context = null_context(prior, self.source, self.null_templates)
        return NullPrior(prior, context, exact=self.prior_gradient == "exact")


def open_subject(
    subject: str,
    pretrained: str | None = None,
    checkpoint: str | None = None,
    templates: Sequence[str] | None = None,
    prior: str | None = None,
    visual: str | None = None,
    quick_gelu: bool | None = None,
) -> Subject:
    """Open a bundle's folder, a run's folder, or a model by open_clip's name with `pretrained` weights.

    checkpoint: weights of a bundle, as a run's folder or a file; None searches beside the bundle.
    templates: replace the model's own. prior: a run of train.diffusion_prior, or a file. visual,
    quick_gelu: as for `load`. Raises ModelError, BundleError and LabelError, and SettingsError for
    weights that are not the bundle's.
    """
    folder = Path(subject)
    trained = load_prior(Path(prior)) if prior else None
    if not (folder / MANIFEST).is_file():
        if checkpoint:
            raise SettingsError(f"--checkpoint goes with a bundle, and {subject} is not one")
        source = load(subject, pretrained, visual=visual, quick_gelu=quick_gelu)
        words = wording(source, templates=templates)
        return Subject(source, words.templates, words.null_templates, prior=trained)
    bundle = Bundle(folder)
    manifest = bundle.manifest
    tower = manifest.source.get("visual")
    if tower and not visual:
        raise SettingsError(f"{subject} has the image tower {tower}: name its file with --visual")
    source = _weights(bundle, checkpoint, visual, quick_gelu)
    if source.weights_sha256 != manifest.source.get("weights_sha256"):
        raise SettingsError(
            f"{subject} was exported from other weights than those of {source.name}: name its weights "
            "with --checkpoint"
        )
    chosen = tuple(templates or manifest.templates)
    check_templates(chosen)
    spec = manifest.prior
    if trained and (spec is None or spec.weights_sha256 != trained.weights_sha256):
        raise SettingsError(
            f"{subject} does not contain the prior {prior}: export it with --prior {prior}"
        )
    return Subject(source, chosen, manifest.null_templates, bundle, trained)


def _weights(
    bundle: Bundle, checkpoint: str | None, visual: str | None, quick_gelu: bool | None
) -> Source:
    def load_with(model: str, pretrained: str | None = None) -> Source:
        return load(model, pretrained, visual=visual, quick_gelu=quick_gelu)

    name = bundle.manifest.source.get("model", "")
    if checkpoint:
        return load_with(checkpoint) if Path(checkpoint).is_dir() else load_with(name, checkpoint)
    parent = bundle.path.resolve().parent
    for folder in (parent, parent / name):
        if is_model_folder(folder):
            return load_with(str(folder))
    try:
        return load_with(name, bundle.manifest.source.get("pretrained"))
    except ModelError as err:
        raise SettingsError(
            f"the weights of {bundle.path} are not beside it: white-box attacks need them, name "
            "the run or the file with --checkpoint"
        ) from err


class BundleClassifier:
    """Bundle run by its runtime, in one precision, for the classes of a data set."""

    def __init__(
        self, subject: Subject, classes: Sequence[str], purifier: Purifier, precision: str
    ) -> None:
        self.runtime = Runtime(subject.bundle, device="cpu", precision=precision, purify=purifier)
        self.labels = self.runtime.labels(list(classes), subject.templates)

    def probabilities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the probabilities (N, K) of uint8 images (H, W, 3)."""
        return self.runtime.scores(images, self.labels)

    def classes(self, images: torch.Tensor) -> torch.Tensor:
        """Return the classes (B,) of images (B, 3, H, W) in [0, 1] at the encoder's input size."""
        spec = self.runtime.bundle.manifest.image
        mean, std = (np.array(x, np.float32)[:, None, None] for x in (spec.mean, spec.std))
        pixels = (images.cpu().numpy() - mean) / std
        scores = self.runtime.pixel_scores(pixels, self.labels)
        return torch.from_numpy(scores.argmax(1)).to(images.device)


def agreement(
    classifier: BundleClassifier,
    defence: Defence,
    raw: Sequence[np.ndarray],
    images: torch.Tensor,
) -> float:
    """Return the largest difference in probability between the runtime and PyTorch.

    raw: uint8 images (H, W, 3). images: the same at the encoder's input size, as attacks see them.
    Raises SettingsError above AGREEMENT: then the figures would not apply to the bundle.
    """
    with torch.no_grad():
        logits = torch.cat([defence(batch) for batch in torch.split(images, 32)])
    expected = logits.softmax(1).cpu().numpy()
    difference = float(np.abs(classifier.probabilities(raw) - expected).max())
    if not difference <= AGREEMENT:
        raise SettingsError(
            f"{classifier.runtime.bundle.path} does not compute what its checkpoint computes: "
            f"probabilities differ by {difference:.2g}, more than {AGREEMENT:g}: export it again"
        )
    return difference
