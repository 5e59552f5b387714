"""The real images of a data set in a feature space: what metrics compare generated images with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from flowdopr.config.schema import EvaluateConfig
from flowdopr.data import Datasets
from flowdopr.disk import cache_folder
from flowdopr.evaluate.extractors import Extractor, classifier_extractor, inception_extractor
from flowdopr.evaluate.fidelity import reference_features
from flowdopr.evaluate.moments import Moments, Statistics, read_statistics, write_statistics
from flowdopr.evaluate.pretrained import NETWORKS, pretrained_extractor
from flowdopr.evaluate.spectrum import PrincipalDirections, principal_directions


@dataclass(frozen=True)
class RealImages:
    """Each property is computed at its first use, and kept for the evaluations after it.

    Raises:
        ValueError: see `build_extractor`.
    """

    pixels: Datasets
    chosen: EvaluateConfig
    """Its `extractor` names the feature space."""
    device: torch.device

    @cached_property
    def extractor(self) -> Extractor:
        return build_extractor(self.chosen, self.pixels, self.device)

    @cached_property
    def features(self) -> Tensor:
        """Of the training images, (N, D), from the cache or computed now."""
        fingerprint = self.pixels.info.fingerprint
        return reference_features(self.pixels.reference, fingerprint, self.extractor)

    @cached_property
    def statistics(self) -> Statistics:
        """Mean and covariance of `features`, or those in the file `evaluate.reference`.

        Raises:
            ValueError: the file cannot be read, or is not of this feature space.
        """
        if self.chosen.reference is None:
            return Moments.of(self.features).statistics()
        one = self.extractor(self.pixels.reference.batch(torch.tensor([0]))[0]).features
        file = Path(self.chosen.reference)
        return read_statistics(file, one.shape[1], self.extractor.weights_sha256)

    def write_statistics(self, path: Path) -> None:
        """Write mean and covariance of `features`, for `evaluate.reference` or other programs."""
        write_statistics(path, Moments.of(self.features), self.extractor.weights_sha256)

    @cached_property
    def held_out_features(self) -> Tensor:
        name = f"held out beside {self.pixels.info.fingerprint}"
        return reference_features(self.pixels.held_out, name, self.extractor)

    @cached_property
    def directions(self) -> PrincipalDirections:
        """The principal directions of the training images."""
        folder, fingerprint = cache_folder() / "spectra", self.pixels.info.fingerprint
        return principal_directions(self.pixels.reference, folder, fingerprint)

    def prepare(self) -> None:
        """Compute what metrics need of real images, for other processes to find in the cache."""
        _ = self.statistics, self.held_out_features
        if "spectrum" in self.chosen.metrics:
            _ = self.directions


def build_extractor(chosen: EvaluateConfig, pixels: Datasets, device: torch.device) -> Extractor:
    """The feature space that `evaluate.extractor` names.

    Raises:
        ValueError: no classes to train a classifier on, or missing weights or packages.
    """
    extractor = chosen.extractor
    if extractor.name == "inception":
        return inception_extractor(extractor.weights, device)
    if extractor.name in NETWORKS:
        return pretrained_extractor(extractor.name, getattr(extractor, "weights", None), device)
    return classifier_extractor(pixels, device)
