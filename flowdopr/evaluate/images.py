"""Metrics of generated images: distances to the real ones, their spectrum, and what real held-out
images get in the same metrics.

Shapes: images uint8 `(N, C, H, W)`, labels `(N,)` int64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowdopr.config.schema import EvaluateConfig
from flowdopr.data import Datasets
from flowdopr.data.loader import picks_between
from flowdopr.disk import cache_folder
from flowdopr.evaluate.cache import cached_numbers
from flowdopr.evaluate.exact import Measured
from flowdopr.evaluate.extractors import CLASSIFIER, Extractor, Features
from flowdopr.evaluate.fidelity import (
    NEED_ALL_FEATURES,
    NEED_MOMENTS,
    TOGETHER,
    check_numbers,
    fidelity,
)
from flowdopr.evaluate.gallery import MOST_HELD_OUT, Gallery, nearest
from flowdopr.evaluate.generate import ImageSampler, mean_nfe
from flowdopr.evaluate.moments import Moments, file_record
from flowdopr.evaluate.real import RealImages
from flowdopr.evaluate.spectrum import PrincipalDirections, spectrum
from flowdopr.processes import gathered
from flowdopr.terminal import counting

NEED_FEATURES = frozenset({"fd", "fd_by_images", "kid", "isc", "prc"})
FEWEST_FOR_FLOOR = 8  # real held-out images
FLOOR_VERSION = 1  # part of the cache key: raise it with any change of what a metric is


class Sums(NamedTuple):
    """What adds up over images and processes.

    features: for the Frechet distance, of no coordinates where that is not measured. spectrum:
    along the principal directions, if they are measured. right: images that the extractor gives
    their label.
    """

    features: Moments
    spectrum: Tensor
    right: int

    def plus(self, other: Sums) -> Sums:
        """The sums over the images of both."""
        features = self.features.plus(other.features)
        return Sums(features, self.spectrum + other.spectrum, self.right + other.right)


class Drawn(NamedTuple):
    """What is kept of the generated images, of which there may be more than memory holds.

    first: the first `evaluate.gallery` of them; first_features: theirs. features: of all images,
    or of none where no metric needs more than `sums`. nfe: their mean NFE.
    """

    first: Tensor
    first_features: Tensor
    features: Features
    sums: Sums
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
        if chosen.reference is not None:
            _ = real.statistics  # a file that does not fit is refused before images are drawn
        return cls(
            chosen, real, extractor, real.directions if "spectrum" in chosen.metrics else None
        )

    @property
    def pixels(self) -> Datasets:
        return self.real.pixels

    def draw(
        self, sampler: ImageSampler, labels: Tensor | None, decode: Callable[[Tensor], Tensor]
    ) -> Drawn | None:
        """Draw `evaluate.fid_num_images` images, shared out over the processes, which add up what
        adds up; the first one alone gets the result, the others None."""
        main = sampler.state.is_main_process
        batches, found, own = sampler.share(range(self.chosen.fid_num_images)), [], []
        with counting("sampling", sum(map(len, batches)), shown=main) as progress:
            for batch in batches:
                images, nfe = sampler.draw(batch, labels, seed=self.chosen.seed, decode=decode)
                features = self._features(images)
                of_batch = None if labels is None else labels[list(batch)]
                own = [reduce(Sums.plus, [*own, self._sums(images, features, of_batch)])]
                first = slice(max(0, self.chosen.gallery - batch[0]))
                kept = Features(*(part[slice(self._kept)].clone() for part in features))
                beginning = images[first].clone(), features.features[first].clone()
                found.append((batch, *beginning, kept, nfe))
                progress(len(batch))
        every = gathered((found, own), sampler.state)
        if every is None:
            return None
        found = sorted((item for part, _ in every for item in part), key=lambda item: item[0][0])
        batches, first, first_features, features, calls = zip(*found, strict=True)
        joined = Features(*(torch.cat(column) for column in zip(*features, strict=True)))
        sums = reduce(Sums.plus, (one for _, part in every for one in part))
        nfe = mean_nfe(dict(zip(batches, calls, strict=True)))
        return Drawn(torch.cat(first), torch.cat(first_features), joined, sums, nfe)

    def _features(self, images: Tensor) -> Features:
        if self.extractor is None:
            return Features(torch.zeros(len(images), 0), torch.zeros(len(images), 0))
        return self.extractor(images)

    @property
    def _kept(self) -> int | None:
        """How many features of a batch are kept: all (None) or none."""
        return None if NEED_ALL_FEATURES & set(self.chosen.metrics) else 0

    def _sums(self, images: Tensor, features: Features, labels: Tensor | None) -> Sums:
        x = features.features if "fd" in self.chosen.metrics else features.features[:, :0]
        judged = labels is not None and features.logits.shape[1] > 0
        right = int((features.logits.argmax(1) == labels).sum()) if judged else 0
        return Sums(Moments.of(x), self._moments(images), right)

    def _moments(self, images: Tensor) -> Tensor:
        return torch.zeros(2, 0) if self.directions is None else self.directions.moments(images)

    def measure(self, drawn: Drawn, labels: Tensor | None) -> Measured:
        """The metrics of generated images of these labels; the settings include the `floor`."""
        number = self.chosen.fid_num_images
        metrics, how = self._distances(drawn.features, drawn.sums.features)
        metrics |= self._spectrum(drawn.sums.spectrum, number)
        if (
            labels is not None
            and self.chosen.labels == "balanced"
            and self.extractor is not None
            and self.extractor.name == CLASSIFIER
        ):
            metrics["label_accuracy"] = drawn.sums.right / number
        return metrics, how | {"floor": self.floor()} if metrics else how

    def write_gallery(self, drawn: Drawn, labels: Tensor | None, card: Path) -> dict[str, Any]:
        """Write the gallery beside the file `card`; returns its field of the card, or nothing."""
        if not self.chosen.gallery:
            return {}
        gallery, file = self._gallery(drawn, labels), Gallery.beside(card)
        gallery.write(file)
        return {"gallery": {"file": file.name, **gallery.to_dict()}}

    def _gallery(self, drawn: Drawn, labels: Tensor | None) -> Gallery:
        """The first generated images, with the nearest training images if metrics need these."""
        num = len(drawn.first)
        found = Gallery(drawn.first, None if labels is None else labels[:num])
        if self.extractor is None or not self._needed() or self.chosen.reference is not None:
            return found
        real = self.real.features
        distances, indices = nearest(drawn.first_features, real)
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
        parts = (FLOOR_VERSION, info.fingerprint, len(chosen), metrics, features)
        key = repr(parts if self.chosen.reference is None else (*parts, self.reference()))
        name = f"floor-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
        return cached_numbers(cache_folder() / "floors" / name, lambda: self._floor(chosen))

    def _floor(self, chosen: Tensor) -> dict[str, Any]:
        num = len(chosen)
        parts = (self.pixels.held_out.batch(part)[0] for part in chosen.split(TOGETHER))
        moments = torch.stack([self._moments(part) for part in parts]).sum(0)
        found = {"num_images": num} | self._spectrum(moments, num)
        if self.extractor is not None and self._needed():
            own = self.real.held_out_features[chosen]
            features = Features(own, own[:, :0])
            distances, _ = self._distances(features, Moments.of(own), without=("isc",))
            found |= distances
        return found

    def _held_out(self, most: int) -> Tensor:
        """Indices of up to `most` held-out images, always the same."""
        total = len(self.pixels.held_out)
        return picks_between(0, total, 0, min(most, total)).indices

    def _needed(self) -> list[str]:
        return sorted(NEED_FEATURES & set(self.chosen.metrics))

    def _distances(
        self, features: Features, moments: Moments, without: tuple[str, ...] = ()
    ) -> Measured:
        if self.extractor is None or not self._needed():
            return {}, {}
        wanted = [one for one in self._needed() if one not in without]
        both = (moments, self.real.statistics) if NEED_MOMENTS & set(wanted) else None
        real = self.real.features if self.chosen.reference is None else features.features[:0]
        return fidelity(features, real, self.extractor, wanted, moments=both)

    def _spectrum(self, moments: Tensor, num: int) -> dict[str, Any]:
        return {} if self.directions is None else spectrum(moments, num, self.directions)

    def reference(self) -> dict[str, Any]:
        """The real images of the distances, or the file of their statistics, for the card."""
        if self.chosen.reference is not None:
            return file_record(Path(self.chosen.reference))
        info = self.pixels.info
        return {
            "name": f"{info.name} train",
            "fingerprint": info.fingerprint,
            "num_images": info.num_train,
        }
