"""Feature extractors: our classifier of the data set, and torch-fidelity's Inception.

Shapes: images uint8 `(B, C, H, W)`; features `(B, D)`, logits `(B, K)`.
"""

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.hub import load_state_dict_from_url
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)

from flowdopr.data import Datasets
from flowdopr.disk import file_sha256
from flowdopr.evaluate.classifier import load_classifier, trained_classifier
from flowdopr.exits import reason
from flowdopr.linalg import full_float32

CLASSIFIER, INCEPTION = "flowdopr-classifier", "inception-v3-compat"


class Features(NamedTuple):
    """Of some images, on the CPU: features for distances, logits for the inception score."""

    features: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Extractor:
    """A feature space in which distances are measured."""

    name: str
    space: str
    """Description for the card."""
    weights_sha256: str
    network: nn.Module
    """From images to a pair of features and logits."""
    dtype: torch.dtype
    """Of the features. torch-fidelity takes means in it: float32 for FIDs that are comparable with
    published ones; float64 elsewhere, as a float32 mean over many images loses digits."""
    channels: int | None
    """Channels that its input must have; None: as many as the data set has."""
    distance: str
    """Name of the Frechet distance in this space, "fd" or "fid"."""
    held_out_accuracy: float | None = None
    chance: float | None = None
    """The held-out accuracy of a guess."""
    warning: str | None = None
    """What is wrong with this space, in one line."""

    def to_dict(self) -> dict[str, str | float | None]:
        """The fields that a card holds."""
        kept = ("name", "space", "weights_sha256", "held_out_accuracy", "chance", "warning")
        return {name: getattr(self, name) for name in kept}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Computed on the device of the network, in full float32; grey images are repeated to fill
        `channels`."""
        if self.channels is not None and images.shape[1] != self.channels:
            images = images.expand(-1, self.channels, -1, -1)
        device = next(self.network.parameters()).device
        with full_float32():
            found = self.network(images.to(device))
        return Features(*(layer.cpu().to(self.dtype) for layer in found))


def classifier_extractor(datasets: Datasets, device: torch.device | str = "cpu") -> Extractor:
    """The data set's own classifier, trained now if it is not in the cache.

    Raises:
        ValueError: the data set has no classes.
    """
    trained = trained_classifier(datasets)
    return Extractor(
        name=CLASSIFIER,
        space=f"penultimate layer of a classifier of {datasets.info.name}",
        weights_sha256=trained.weights_sha256,
        network=load_classifier(trained.path)[0].to(device),
        dtype=torch.float64,
        channels=None,
        distance="fd",
        held_out_accuracy=trained.held_out_accuracy,
        chance=trained.chance,
        warning=trained.warning,
    )


def inception_extractor(weights: str | None, device: torch.device | str = "cpu") -> Extractor:
    """torch-fidelity's Inception with the weights in the file `weights`, downloaded if None.

    Only tensors are read from the file, so it cannot run code: `weights` may come from the config
    of a stranger's run.

    Raises:
        ValueError: the weights can be neither found nor downloaded nor read.
    """
    hub = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[-1]
    path = Path(weights) if weights else hub
    alternatives = (
        f"set evaluate.extractor.weights to the path of torch-fidelity's {hub.name}, or use "
        "evaluate.extractor=classifier (FD)"
    )
    if weights and not path.is_file():
        raise ValueError(f"evaluate.extractor.weights: there is no file '{path}'; {alternatives}")
    try:
        network = _inception(_inception_weights(weights))
    except (OSError, EOFError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
        failed = "cannot be read" if path.is_file() else "could not be downloaded"
        raise ValueError(
            f"evaluate.extractor.weights: '{path}' {failed} ({reason(error)[:120]}); {alternatives}"
        ) from None
    return Extractor(
        name=INCEPTION,
        space="Inception v3 pool features",
        weights_sha256=file_sha256(path),
        network=network.to(device),
        dtype=torch.float32,
        channels=3,
        distance="fid",
    )


def _inception_weights(path: str | None) -> Mapping[str, Tensor]:
    """The tensors in the file `path`; if None, those of the published file, whose hash is checked
    when it is downloaded."""
    if path is not None:
        return torch.load(path, map_location="cpu", weights_only=True)
    return load_state_dict_from_url(
        URL_INCEPTION_V3, map_location="cpu", progress=False, check_hash=True, weights_only=True
    )


def _inception(weights: Mapping[str, Tensor]) -> nn.Module:
    """torch-fidelity would unpickle any object of a file, so it gets one that is made here."""
    file = io.BytesIO()
    torch.save(weights, file)
    file.seek(0)
    layers = ["2048", "logits_unbiased"]
    return FeatureExtractorInceptionV3(INCEPTION, layers, feature_extractor_weights_path=file)
