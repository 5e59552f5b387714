"""The spectrum of rollouts: their variance along the principal directions of the data.

Gradient training fits directions of large variance first, and those of small variance late, where
the loss shows little of it (arXiv 2603.02337). With the principal directions u_k of the training
images, by falling variance s_k, and images x of the rollouts,

    r_k = Var(u_k . x) / s_k,        spectrum_error = mean over k of |log r_k|.

Images are taken as levels 0 to 255, and those larger than 32x32 are first averaged down to it.
Directions in which the data vary less than the rounding to levels does are left out.

Shapes: images uint8 `(N, C, H, W)`; D = C H W after averaging; K directions.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from flowdopr.data import ImageDataset
from flowdopr.evaluate.cache import cached_tensors

LARGEST_SIDE = 32
ROUNDING = 1 / 12  # variance of a number's distance to the nearest level
GROUPS = 32
CENTRE = 127.5  # subtracted before squares are summed, so that fewer digits cancel
TOGETHER = 2048  # images in one product


@dataclass(frozen=True)
class PrincipalDirections:
    """mean: (D,) levels. directions: (D, K), orthonormal columns. variances: (K,), falling, in
    squared levels."""

    mean: Tensor
    directions: Tensor
    variances: Tensor

    def moments(self, images: Tensor) -> Tensor:
        """(2, K): sums over `images` of u_k . (x - mean) and of its square, in float64."""
        along = ((_levels(images) - self.mean) @ self.directions).double()
        return torch.stack([along.sum(0), along.square().sum(0)])


def principal_directions(
    images: ImageDataset, cache: Path, fingerprint: str
) -> PrincipalDirections:
    """Those of `images`, from the folder `cache` or computed now.

    Args:
        fingerprint: of the images; part of the file's name.

    Raises:
        ValueError: all images are equal.
    """
    key = hashlib.sha256(repr((fingerprint, len(images), LARGEST_SIDE)).encode()).hexdigest()

    def make() -> tuple[Tensor, Tensor, Tensor]:
        parts = torch.arange(len(images)).split(TOGETHER)
        mean, covariance = _mean_and_covariance(images.batch(part)[0] for part in parts)
        variances, directions = torch.linalg.eigh(covariance)
        kept = variances > ROUNDING
        if not kept.any():
            raise ValueError("evaluate.metrics: spectrum needs training images that differ")
        directions = directions[:, kept].flip(1).float().contiguous()
        return mean.float(), directions, variances[kept].flip(0).float()

    names = ("mean", "directions", "variances")
    path = cache / f"directions-{key[:24]}.safetensors"
    return PrincipalDirections(*cached_tensors(path, names, make))


def _mean_and_covariance(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """(D,) and (D, D) of the images of all batches, in float64."""
    count, total, products = 0, torch.zeros(()), torch.zeros(())
    for images in batches:
        x = _levels(images).double() - CENTRE
        count, total, products = count + len(x), total + x.sum(0), products + x.T @ x
    mean = total / count
    return mean + CENTRE, products / count - mean[:, None] * mean


def _levels(images: Tensor) -> Tensor:
    """(N, D) float levels of images, averaged down to 32x32 if they are larger."""
    height, width = (min(side, LARGEST_SIDE) for side in images.shape[2:])
    return F.adaptive_avg_pool2d(images.float(), (height, width)).flatten(1)


def spectrum(
    moments: Tensor, count: int, data: PrincipalDirections
) -> dict[str, float | list[float]]:
    """Metrics of rollouts, for a card.

    Args:
        moments: `PrincipalDirections.moments`, summed over all `count` images.

    Returns:
        "spectrum_error": the mean of |log r_k|; "spectrum_error_lowest": that over the third of the
        directions with the smallest variances; "spectrum": the geometric mean of r_k in up to 32
        groups of neighbouring directions, by falling variance. A direction in which the rollouts do
        not vary counts as rounding.
    """
    total, squares = moments
    variances = (squares - total**2 / count) / (count - 1)
    logs = (variances.clamp(min=ROUNDING) / data.variances).log()
    lowest = logs[-math.ceil(len(logs) / 3) :]
    groups = logs.tensor_split(min(GROUPS, len(logs)))
    return {
        "spectrum_error": logs.abs().mean().item(),
        "spectrum_error_lowest": lowest.abs().mean().item(),
        "spectrum": [group.mean().exp().item() for group in groups],
    }
