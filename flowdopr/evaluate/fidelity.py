"""Distances between generated and real images, computed from features by torch-fidelity.

Shapes: images uint8 `(N, C, H, W)`; features `(N, D)` and logits `(N, K)` on the CPU.
"""

import hashlib
from collections.abc import Collection, Sequence
from statistics import fmean, linear_regression
from typing import Any

import torch
import torch_fidelity
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from flowdopr.data import ImageDataset
from flowdopr.disk import cache_folder
from flowdopr.evaluate.cache import cached_tensors
from flowdopr.evaluate.extractors import Extractor, Features
from flowdopr.evaluate.moments import Moments, Statistics
from flowdopr.terminal import counting

TOGETHER = 64  # real images in one call of an extractor
KID_SUBSETS, LARGEST_KID_SUBSET = 100, 1000
PRC_NEIGHBOURS = 3
HALVINGS, FEWEST_BY_IMAGES = 3, 64

NEED_MOMENTS = frozenset({"fd", "fd_by_images"})  # of the real images
NEED_ALL_FEATURES = frozenset({"fd_by_images", "kid", "isc", "prc"})
# torch-fidelity's names -> ours; the extractor names the Frechet distance, "fd" or "fid".
NAMES = {
    torch_fidelity.KEY_METRIC_KID_MEAN: "kid_mean",
    torch_fidelity.KEY_METRIC_KID_STD: "kid_std",
    torch_fidelity.KEY_METRIC_ISC_MEAN: "isc_mean",
    torch_fidelity.KEY_METRIC_ISC_STD: "isc_std",
    torch_fidelity.KEY_METRIC_PRECISION: "precision",
    torch_fidelity.KEY_METRIC_RECALL: "recall",
    torch_fidelity.KEY_METRIC_F_SCORE: "f_score",
}


def check_numbers(metrics: Collection[str], generated: int, reference: int) -> None:
    """Check that there are enough images for the `metrics`, before any is drawn.

    Raises:
        ValueError: there are too few.
    """
    needed = PRC_NEIGHBOURS + 2 if "prc" in metrics else 2
    if metrics and min(generated, reference) < needed:
        few = generated < needed
        remedy = "raise evaluate.fid_num_images" if few else "take them out of evaluate.metrics"
        raise ValueError(
            f"evaluate.metrics: {', '.join(metrics)} need at least {needed} generated and real "
            f"images, there are {generated} and {reference}; {remedy}"
        )


def reference_features(reference: ImageDataset, fingerprint: str, extractor: Extractor) -> Tensor:
    """The features of the real images, cached for their `fingerprint` and the extractor's weights.

    A cache file that is damaged is made again.
    """
    key = repr((fingerprint, len(reference), extractor.weights_sha256, str(extractor.dtype)))
    name = f"reference-{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"

    def make() -> tuple[Tensor]:
        parts = []
        with counting("features of the real images", len(reference)) as progress:
            for indices in torch.arange(len(reference)).split(TOGETHER):
                parts.append(extractor(reference.batch(indices)[0]).features)
                progress(len(indices))
        return (torch.cat(parts),)

    return cached_tensors(cache_folder() / "features" / name, ("features",), make)[0]


def fidelity(
    generated: Features,
    reference: Tensor,
    extractor: Extractor,
    metrics: Collection[str],
    *,
    moments: tuple[Moments, Statistics] | None = None,
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """The chosen `metrics` (fd, fd_by_images, kid, isc, prc) of generated against real images.

    Args:
        generated: of the generated images; may be none for metrics that need only `moments`.
        reference: features of the real images; may be none for metrics that need only `moments`.
        extractor: that of all features.
        moments: of the generated images, and mean and covariance of the real ones, where they are
            known; otherwise computed now.

    Returns:
        The metrics: "fd" or "fid" (by the extractor), the same with "_by_images" and "_infinity"
        (see `fd_by_images`), "kid_mean", "kid_std", "isc_mean", "isc_std", "precision", "recall",
        "f_score" (3 neighbours). And for the card, how they were measured:
        KID's subsets. "kid_std" is their standard deviation; None if each of them has all
        generated or all real images, because it would then leave out what varies between those.

    Raises:
        ValueError: too few images for a metric.
    """
    found, ours, how, features = {}, {}, {}, generated.features
    count = moments[0].count if moments else len(features)
    check_numbers(metrics, count, len(reference) or (count if moments else 0))
    if NEED_MOMENTS & set(metrics):
        own, real = moments or (Moments.of(features), Moments.of(reference).statistics())
        if "fd" in metrics:
            found[torch_fidelity.KEY_METRIC_FID] = own.statistics().distance(real)
        if "fd_by_images" in metrics:
            points = fd_by_images(features, real)
            ours[f"{extractor.distance}_by_images"] = points
            ours[f"{extractor.distance}_infinity"] = extrapolated(points)
    if "kid" in metrics:
        fewest = min(len(features), len(reference))
        size = min(LARGEST_KID_SUBSET, fewest)
        subsets = {"kid_subsets": KID_SUBSETS, "kid_subset_size": size}
        found |= kid_features_to_metric(features, reference, verbose=False, **subsets)
        how["kid"] = {"subsets": KID_SUBSETS, "subset_size": size}
        if size == fewest:
            found[torch_fidelity.KEY_METRIC_KID_STD] = None
            how["kid"] |= {"std": f"none: each subset has all {size} images of one side"}
    if "isc" in metrics:
        found |= isc_features_to_metric(generated.logits, splits=min(10, len(features)))
    if "prc" in metrics:  # nearest neighbours in blocks, to save memory
        options = {"prc_neighborhood": PRC_NEIGHBOURS, "save_cpu_ram": True, "verbose": False}
        found |= prc_features_to_metric(features, reference, **options)
    names = NAMES | {torch_fidelity.KEY_METRIC_FID: extractor.distance}
    return {names[key]: value for key, value in found.items()} | ours, how


def fd_by_images(features: Tensor, reference: Statistics) -> list[tuple[int, float]]:
    """The Frechet distance of n, n/2, n/4 and n/8 images, as pairs (number, distance), ascending.

    Each is the mean over as many disjoint parts of the n images as there are. Numbers below 64, or
    below twice the dimension of the features, are left out: there, the bias is not linear in 1/n.

    Args:
        features: (n, D).
        reference: of the real images.
    """
    total, dimension = features.shape
    sizes = {total // 2**halving for halving in range(HALVINGS + 1)}
    fewest = max(FEWEST_BY_IMAGES, 2 * dimension)
    points = []
    for size in sorted(size for size in sizes if size >= fewest or size == total):
        parts = [part for part in features.split(size) if len(part) == size]
        points.append((size, fmean(Moments.of(p).statistics().distance(reference) for p in parts)))
    return points


def extrapolated(points: Sequence[tuple[int, float]]) -> float | None:
    """The distance of infinitely many images: where the least-squares line through `points` in 1/n
    meets 1/n = 0 (Chong & Forsyth 2020, arXiv 1911.07023). None from a single point."""
    if len(points) < 2:
        return None
    numbers, distances = zip(*points, strict=True)
    return linear_regression([1 / number for number in numbers], distances).intercept
