"""Feature extractors for torch-fidelity: our classifier, registered under a name, and Inception.

Shapes: images uint8 `(B, C, H, W)`; a feature layer gives `(B, D)`.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor

from flowdopr.data import Datasets
from flowdopr.disk import file_sha256
from flowdopr.evaluate.classifier import load_classifier, trained_classifier

CLASSIFIER, INCEPTION = "flowdopr-classifier", "inception-v3-compat"


@dataclass(frozen=True)
class Extractor:
    """A feature space in which distances are measured."""

    name: str
    """Name in torch-fidelity's registry."""
    space: str
    """Description for the card."""
    weights: Path
    weights_sha256: str
    channels: int | None
    """Channels that its input must have; None: as many as the data set has."""
    distance: str
    """Name of the Frechet distance in this space, "fd" or "fid"."""
    held_out_accuracy: float | None = None

    def to_dict(self) -> dict[str, str | float | None]:
        """The fields that a card holds."""
        kept = ("name", "space", "weights_sha256", "held_out_accuracy")
        return {name: getattr(self, name) for name in kept}


class ClassifierFeatures(FeatureExtractorBase):
    """The classifier of `evaluate.classifier` behind torch-fidelity's interface.

    Features are float64, because torch-fidelity takes means in their type and a float32 mean over
    many thousand images loses digits.
    """

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | Path = "",
        **_: object,
    ):
        super().__init__(name, features_list)
        self.classifier = load_classifier(feature_extractor_weights_path)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """uint8 `(B, C, H, W)` -> the layers of `features_list`, in its order."""
        features, logits = self.classifier(input)
        layers = {"features": features.double(), "logits": logits.double()}
        return tuple(layers[name] for name in self.features_list)


register_feature_extractor(CLASSIFIER, ClassifierFeatures)


def classifier_extractor(datasets: Datasets) -> Extractor:
    """The data set's own classifier, trained now if it is not in the cache.

    Raises:
        ValueError: the data set has no classes.
    """
    trained = trained_classifier(datasets)
    return Extractor(
        name=CLASSIFIER,
        space=f"penultimate layer of a classifier of {datasets.info.name}",
        weights=trained.path,
        weights_sha256=trained.weights_sha256,
        channels=None,
        distance="fd",
        held_out_accuracy=trained.held_out_accuracy,
    )


def inception_extractor(weights: str | None) -> Extractor:
    """torch-fidelity's Inception with the weights in `weights`, downloaded if None.

    The weights are loaded here to find out that they are missing or wrong before sampling.

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
        create_feature_extractor(
            INCEPTION,
            ["2048"],
            cuda=False,
            verbose=False,
            feature_extractor_weights_path=weights,
        )
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        failed = "cannot be read" if path.is_file() else "could not be downloaded"
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"evaluate.extractor.weights: '{path}' {failed} ({reason}); {alternatives}"
        ) from None
    return Extractor(
        name=INCEPTION,
        space="Inception v3 pool features",
        weights=path,
        weights_sha256=file_sha256(path),
        channels=3,
        distance="fid",
    )
