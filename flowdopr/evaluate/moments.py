"""Mean and covariance of features, and the Frechet distance of two sets of images, which needs no
more of them.

They are read from and written to files as pytorch-fid, clean-fid and ADM's evaluator use them: npz
with `mu` (D,) and `sigma` (D, D). Those written here also name the network, by the SHA-256 of its
weights, and the number of images.

Shapes: D the dimension of the features.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch_fidelity
from numpy.lib.npyio import NpzFile
from torch import Tensor
from torch_fidelity.metric_fid import fid_statistics_to_metric

from flowdopr.disk import file_sha256, reading, replacing_shared

REMEDY = "let evaluate.reference name an npz file with mu (D,) and sigma (D, D), or set it to null"


class Statistics(NamedTuple):
    """The mean (D,) and covariance (D, D) of features, in float64."""

    mu: np.ndarray
    sigma: np.ndarray

    def distance(self, other: Statistics) -> float:
        """The Frechet distance of two sets of images."""
        both = self._asdict(), other._asdict()
        return fid_statistics_to_metric(*both, verbose=False)[torch_fidelity.KEY_METRIC_FID]


class Moments(NamedTuple):
    """Sums over the features x of images, in float64: their number, x (D,), x x^T (D, D).

    Processes that share the images add up theirs.
    """

    count: int
    total: Tensor
    products: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Those of features (N, D)."""
        x = features.double()
        return cls(len(x), x.sum(0), x.T @ x)

    def plus(self, other: Moments) -> Moments:
        """Those of the images of both."""
        sums = self.total + other.total, self.products + other.products
        return Moments(self.count + other.count, *sums)

    def statistics(self) -> Statistics:
        """Mean and unbiased covariance."""
        mean = self.total / self.count
        covariance = (self.products - self.total[:, None] * mean) / (self.count - 1)
        return Statistics(mean.numpy(), covariance.numpy())


def write_statistics(path: Path, moments: Moments, weights_sha256: str) -> None:
    """Write those of `moments`; `weights_sha256` is that of the features' network."""
    about = {"num_images": moments.count, "weights_sha256": weights_sha256}
    with replacing_shared(path) as part, open(part, "wb") as file:
        np.savez(file, **moments.statistics()._asdict(), **about)


def read_statistics(path: Path, dimension: int, weights_sha256: str) -> Statistics:
    """Those in a file, for features of `dimension` D of the network with `weights_sha256`.

    Raises:
        ValueError: the file is missing or damaged, has another dimension, or names another network.
    """
    with reading(path, REMEDY), path.open("rb") as raw, NpzFile(raw, allow_pickle=False) as file:
        # Neither texts nor complex numbers become real ones.
        mu, sigma = (file[name].astype(np.float64, casting="same_kind") for name in ("mu", "sigma"))
        network = str(file["weights_sha256"]) if "weights_sha256" in file else weights_sha256
        if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
            raise ValueError(f"its mu is {list(mu.shape)} and its sigma {list(sigma.shape)}")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError("it has numbers that are not finite")
        if not np.allclose(sigma, sigma.T) or sigma.diagonal().min() < 0:
            raise ValueError("its sigma is not symmetric, or has negative variances")
    wrong = f"{len(mu)} features, and evaluate.extractor has {dimension}"
    if len(mu) == dimension:
        wrong = "" if network == weights_sha256 else "another network than evaluate.extractor's"
    if wrong:
        raise ValueError(
            f"evaluate.reference: {path} is of {wrong}; choose the extractor that it was made with"
        )
    return Statistics(mu, sigma)


def file_record(path: Path) -> dict[str, str]:
    """Which file of statistics a number was measured with, for its card."""
    with reading(path, REMEDY):
        return {"name": path.name, "sha256": file_sha256(path)}
