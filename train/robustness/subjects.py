"""Subjects of a measurement: a model in PyTorch, or a bundle, by its own files or by its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edgeclip.bundle import EMBEDDED, MANIFEST, Bundle
from edgeclip.labels import check_templates
from edgeclip.purify import DiffPurifier, Purifier, check_prior
from edgeclip.runtime import Runtime
from train.errors import SettingsError
from train.models.architectures import is_model_folder
from train.models.checkpoints import Source, load
from train.models.classifier import Classifier, class_embeddings
from train.models.trained_prior import TrainedPrior, load_prior, null_context
from train.models.wording import null_text, wording
from train.robustness.bundle_source import bundle_source
from train.robustness.defence import Defence
from train.robustness.purification import NullPrior

FLOAT_PRECISIONS = ("fp32", "int8-weights")
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
    """Open a bundle by folder or name, a run's folder, or a model of open_clip with `pretrained` weights.

    checkpoint: weights of a bundle, as a run's folder or a file; None searches beside the bundle, and
    else attacks the bundle's own graph.
    templates: replace the model's own. prior: a run of train.diffusion_prior, or a file. visual,
    quick_gelu: as for `load`. Raises ModelError, BundleError and LabelError, and SettingsError for
    weights that are not the bundle's.
    """
    folder = Path(subject)
    trained = load_prior(Path(prior)) if prior else None
    if subject not in EMBEDDED and not (folder / MANIFEST).is_file():
        if checkpoint:
            raise SettingsError(f"--checkpoint goes with a bundle, and {subject} is not one")
        source = load(subject, pretrained, visual=visual, quick_gelu=quick_gelu)
        words = wording(source, templates=templates)
        return Subject(source, words.templates, words.null_templates, prior=trained)
    bundle = Bundle(subject)
    manifest = bundle.manifest
    tower = manifest.source.get("visual")
    checkpoint = checkpoint or _beside(bundle)
    if checkpoint is None:
        source = bundle_source(bundle, _float_precision(bundle))
    else:
        if tower and not visual:
            raise SettingsError(
                f"{subject} has the image tower {tower}: name its file with --visual"
            )
        source = _weights(bundle, checkpoint, visual, quick_gelu)
        if source.weights_sha256 != manifest.source.get("weights_sha256"):
            raise SettingsError(
                f"{subject} was exported from other weights than those of {source.name}: name its "
                "weights with --checkpoint"
            )
    chosen = tuple(templates or manifest.templates)
    check_templates(chosen)
    spec = manifest.prior
    if trained and (spec is None or spec.weights_sha256 != trained.weights_sha256):
        raise SettingsError(
            f"{subject} does not contain the prior {prior}: export it with --prior {prior}"
        )
    return Subject(source, chosen, manifest.null_templates, bundle, trained)


def _beside(bundle: Bundle) -> str | None:
    """Return the folder of a model that a bundle lies in, or beside."""
    parent = bundle.path.resolve().parent
    folders = (parent, parent / bundle.manifest.source.get("model", ""))
    return next((str(folder) for folder in folders if is_model_folder(folder)), None)


def _weights(
    bundle: Bundle, checkpoint: str, visual: str | None, quick_gelu: bool | None
) -> Source:
    """Load a bundle's checkpoint: a folder, or a file for the architecture that the bundle names."""
    model, file = checkpoint, None
    if not Path(checkpoint).is_dir():
        model, file = bundle.manifest.source.get("model", ""), checkpoint
    return load(model, file, visual=visual, quick_gelu=quick_gelu)


def _float_precision(bundle: Bundle) -> str:
    """Return the precision whose graph is attacked: one that computes in float32."""
    names = [name for name in FLOAT_PRECISIONS if name in bundle.manifest.precisions]
    if not names:
        raise SettingsError(
            f"{bundle.path} has no precision of {', '.join(FLOAT_PRECISIONS)}, whose graph has a "
            "gradient: name its weights with --checkpoint"
        )
    return names[0]


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
