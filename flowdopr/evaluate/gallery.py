"""The gallery of an evaluation: its first images, and the training image nearest to each of them.

It is a file of tensors beside the card. Image i has the same noise in all runs whose settings of
sampling are the same, so galleries of several runs can be laid side by side. Where a model copies
training images, `distances` are well below `held_out_distances`.

Shapes: images uint8 `(K, C, H, W)`, labels `(K,)` int64, features `(N, D)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowdopr.config.schema import EvaluateConfig
from flowdopr.disk import replacing_shared, write_tensors
from flowdopr.models.weights import tensors_sha256

REFERENCES_TOGETHER = 4096  # features in one block of distances
MOST_HELD_OUT = 1000  # real images whose distances are measured


@dataclass(frozen=True)
class Gallery:
    """distances: (K,) from each image to its `nearest` training image in the feature space.
    held_out_distances: (M,) the same of real held-out images. All three are None where no metric
    needed features. labels: None for an unconditional model."""

    images: Tensor
    labels: Tensor | None = None
    nearest: Tensor | None = None
    distances: Tensor | None = None
    held_out_distances: Tensor | None = None

    @staticmethod
    def beside(card: Path) -> Path:
        """The file of the gallery that belongs to the card's file."""
        return card.with_suffix(".safetensors")

    @classmethod
    def read(cls, path: Path) -> Gallery | None:
        """The gallery in the file `path`, which runs no code; None if it is missing or damaged."""
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                said = (file.metadata() or {}).get("sha256")
            found = cls(**tensors)
        except (OSError, SafetensorError, TypeError, ValueError):  # also of a name that is no path
            return None
        sound = said in (None, tensors_sha256(tensors))  # earlier versions wrote none
        return found if sound and found._fits() else None

    def _fits(self) -> bool:
        """Whether the tensors have the shapes above."""
        pictures = [one for one in (self.images, self.nearest) if one is not None]
        lists = [one for one in (self.labels, self.distances) if one is not None]
        return (
            all(one.dtype == torch.uint8 and one.ndim == 4 for one in pictures)
            and all(one.shape == self.images.shape for one in pictures)
            and self.images.shape[1] in (1, 3)
            and self.images.numel() > 0
            and all(one.shape == self.images.shape[:1] for one in lists)
            and (self.distances is None) == (self.nearest is None)
            and (self.distances is None) == (self.held_out_distances is None)
        )

    def write(self, path: Path) -> None:
        """Write the file whole or not at all, into a folder that is made if needed."""
        tensors = {name: one for name, one in vars(self).items() if one is not None}
        with replacing_shared(path) as part:
            write_tensors(part, tensors, {"sha256": tensors_sha256(tensors)})

    @property
    def ratios(self) -> Tensor | None:
        """(K,) `distances` over the median distance of real held-out images; a copy has 0."""
        if self.distances is None or self.held_out_distances is None:
            return None
        return self.distances / self.held_out_distances.median()

    def to_dict(self) -> dict[str, Any]:
        """For the card: how many images there are, and the median of their `ratios`."""
        ratios = self.ratios
        median = None if ratios is None else ratios.median().item()
        return {"num_images": len(self.images), "nearest_ratio": median}


def has_gallery(card: Path, chosen: EvaluateConfig) -> bool:
    """Whether a gallery as large as it is `chosen`, or larger, lies beside the card's file."""
    wanted = min(chosen.gallery, chosen.fid_num_images)
    if wanted == 0:
        return True
    found = Gallery.read(Gallery.beside(card))
    return found is not None and len(found.images) >= wanted


def nearest(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """For each of K features the Euclidean distance to the nearest of `reference`, `(K,)` float64,
    and its index `(K,)`."""
    best = torch.full((len(features),), torch.inf, dtype=torch.float64)
    where = torch.zeros(len(features), dtype=torch.int64)
    for number, block in enumerate(reference.split(REFERENCES_TOGETHER)):
        distances, indices = torch.cdist(features.double(), block.double()).min(1)
        closer = distances < best
        best[closer] = distances[closer]
        where[closer] = indices[closer] + number * REFERENCES_TOGETHER
    return best, where
