"""Metrics of generated images: distances to the real ones, their spectrum, and what real held-out
images get in the same metrics.

Shapes: images uint8 `(N, C, H, W)`, labels `(N,)` int64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from flowdopr.config.schema import EvaluateConfig
from flowdopr.data import Datasets
from flowdopr.data.loader import picks_between
from flowdopr.disk import cache_folder
from flowdopr.evaluate.cache import cached_numbers
from flowdopr.evaluate.exact import Measured
from flowdopr.evaluate.extractors import CLASSIFIER, Extractor, Features
from flowdopr.evaluate.fidelity import NEED_MOMENTS, TOGETHER, check_numbers, fidelity
from flowdopr.evaluate.gallery import MOST_HELD_OUT, Gallery, nearest
from flowdopr.evaluate.generate import ImageSampler, mean_nfe
from flowdopr.evaluate.real import RealImages
from flowdopr.evaluate.spectrum import PrincipalDirections, spectrum
from flowdopr.terminal import counting

NEED_FEATURES = frozenset({"fd", "fd_by_images", "kid", "isc", "prc"})
FEWEST_FOR_FLOOR = 8  # real held-out images
FLOOR_VERSION = 1  # part of the cache key: raise it with any change of what a metric is


class Drawn(NamedTuple):
    """What is kept of the generated images, of which there may be more than memory holds.

    first: the first `evaluate.gallery` of them. moments: along the principal directions, if the
    spectrum is measured. nfe: their mean NFE.
    """

    first: Tensor
    features: Features
    moments: Tensor
    nfe: int | float


@dataclass(frozen=True)
class ImageMetrics:
    """The chosen metrics of images, and the `real` ones that they compare with."""

    chosen: EvaluateConfig
    real: RealImages
    extractor: Extractor | None
    """None if no metric needs features."""
    directions: PrincipalDirections | None
    """None if the spectrum is not measured."""

    @classmethod
    def build(cls, chosen: EvaluateConfig, real: RealImages) -> ImageMetrics:
        """Train, load or download what the metrics need.

        Raises:
            ValueError: too few images, or as `build_extractor`.
        """
        info = real.pixels.info
        check_numbers(chosen.metrics, chosen.fid_num_images, info.num_train)
        needs_labels = chosen.extractor.name == "classifier" and info.num_classes > 1
        needs_features = needs_labels or NEED_FEATURES & set(chosen.metrics)
        extractor = real.extractor if needs_features else None
        return cls(
            chosen, real, extractor, real.directions if "spectrum" in chosen.metrics else None
        )

    @property
    def pixels(self) -> Datasets:
        return self.real.pixels

    def draw(
        self, sampler: ImageSampler, labels: Tensor | None, decode: Callable[[Tensor], Tensor]
    ) -> Drawn:
        """Draw `evaluate.fid_num_images` images, shared out over the processes; the result is the
        same in all of them."""
        main = sampler.state.is_main_process
        batches, found = sampler.share(range(self.chosen.fid_num_images)), []
        with counting("sampling", sum(map(len, batches)), shown=main) as progress:
            for batch in batches:
                images, nfe = sampler.draw(batch, labels, seed=self.chosen.seed, decode=decode)
                first = images[: max(0, self.chosen.gallery - batch[0])]
                found.append((batch, first, self._features(images), self._moments(images), nfe))
                progress(len(batch))
        if sampler.state.num_processes > 1:
            found = sorted(gather_object(found), key=lambda item: item[0][0])
        batches, first, features, moments, calls = zip(*found, strict=True)
        joined = Features(*(torch.cat(column) for column in zip(*features, strict=True)))
        nfe = mean_nfe(dict(zip(batches, calls, strict=True)))
        return Drawn(torch.cat(first), joined, torch.stack(moments).sum(0), nfe)

    def _features(self, images: Tensor) -> Features:
        if self.extractor is None:
            return Features(torch.zeros(len(images), 0), torch.zeros(len(images), 0))
        return self.extractor(images)

    def _moments(self, images: Tensor) -> Tensor:
        return torch.zeros(2, 0) if self.directions is None else self.directions.moments(images)

    def measure(self, drawn: Drawn, labels: Tensor | None) -> Measured:
        """The metrics of generated images of these labels; the settings include the `floor`."""
        metrics, how = self._distances(drawn.features)
        metrics |= self._spectrum(drawn.moments, self.chosen.fid_num_images)
        if (
            labels is not None
            and self.chosen.labels == "balanced"
            and self.extractor is not None
            and self.extractor.name == CLASSIFIER
        ):
            right = drawn.features.logits.argmax(1) == labels
            metrics["label_accuracy"] = right.double().mean().item()
        return metrics, how | {"floor": self.floor()} if metrics else how

    def write_gallery(self, drawn: Drawn, labels: Tensor | None, card: Path) -> dict[str, Any]:
        """Write the gallery beside the file `card`; returns its field of the card, or nothing."""
        if not self.chosen.gallery:
            return {}
        gallery, file = self._gallery(drawn, labels), Gallery.beside(card)
        gallery.write(file)
        return {"gallery": {"file": file.name, **gallery.to_dict()}}

    def _gallery(self, drawn: Drawn, labels: Tensor | None) -> Gallery:
        """The first generated images, with the nearest training images if features are needed."""
        num = len(drawn.first)
        found = Gallery(drawn.first, None if labels is None else labels[:num])
        if self.extractor is None or not self._needed():
            return found
        real = self.real.features
        distances, indices = nearest(drawn.features.features[:num], real)
        held_out = self.real.held_out_features[self._held_out(MOST_HELD_OUT)]
        return replace(
            found,
            nearest=self.pixels.reference.batch(indices)[0],
            distances=distances,
            held_out_distances=nearest(held_out, real)[0],
        )

    def floor(self) -> dict[str, Any]:
        """The metrics of real held-out images, as many as are generated if there are so many.

        They are what a perfect model would get: metrics of few images are biased. They are measured
        once for all checkpoints and runs.
        """
        chosen = self._held_out(self.chosen.fid_num_images)
        if len(chosen) < FEWEST_FOR_FLOOR:
            return {"num_images": len(chosen)}
        extractor, info = self.extractor, self.pixels.info
        features = (extractor.weights_sha256, str(extractor.dtype)) if extractor else None
        metrics = sorted(self.chosen.metrics)
        key = repr((FLOOR_VERSION, info.fingerprint, len(chosen), metrics, features))
        name = f"floor-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
        return cached_numbers(cache_folder() / "floors" / name, lambda: self._floor(chosen))

    def _floor(self, chosen: Tensor) -> dict[str, Any]:
        num = len(chosen)
        parts = (self.pixels.held_out.batch(part)[0] for part in chosen.split(TOGETHER))
        moments = torch.stack([self._moments(part) for part in parts]).sum(0)
        found = {"num_images": num} | self._spectrum(moments, num)
        if self.extractor is not None and self._needed():
            own = self.real.held_out_features[chosen]
            distances, _ = self._distances(Features(own, own[:, :0]), without=("isc",))
            found |= distances
        return found

    def _held_out(self, most: int) -> Tensor:
        """Indices of up to `most` held-out images, always the same."""
        total = len(self.pixels.held_out)
        return picks_between(0, total, 0, min(most, total)).indices

    def _needed(self) -> list[str]:
        return sorted(NEED_FEATURES & set(self.chosen.metrics))

    def _distances(self, features: Features, without: tuple[str, ...] = ()) -> Measured:
        if self.extractor is None or not self._needed():
            return {}, {}
        wanted = [one for one in self._needed() if one not in without]
        moments = self.real.moments if NEED_MOMENTS & set(wanted) else None
        return fidelity(features, self.real.features, self.extractor, wanted, moments=moments)

    def _spectrum(self, moments: Tensor, num: int) -> dict[str, Any]:
        return {} if self.directions is None else spectrum(moments, num, self.directions)

    def reference(self) -> dict[str, Any]:
        """The real images of the distances, for the card."""
        info = self.pixels.info
        return {
            "name": f"{info.name} train",
            "fingerprint": info.fingerprint,
            "num_images": info.num_train,
        }
