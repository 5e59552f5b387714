"""Distances between generated and real images, all computed by torch-fidelity.

Shapes: images uint8 `(N, C, H, W)` on the CPU.
"""

import hashlib
from collections.abc import Collection

import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset

from flowdopr.data import ImageDataset
from flowdopr.evaluate.classifier import cache_folder
from flowdopr.evaluate.extractors import Extractor
from flowdopr.linalg import full_float32

LARGEST_KID_SUBSET = 1000
PRC_NEIGHBOURS = 3

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


class BareImages(Dataset[Tensor]):
    """The images of a data set without labels; grey images are repeated to fill `channels`."""

    def __init__(self, images: ImageDataset, channels: int | None = None):
        self.images, self.channels = images, channels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image = self.images[index][0]
        if self.channels is None or image.shape[0] == self.channels:
            return image
        return image.expand(self.channels, -1, -1)


def fidelity(
    generated: ImageDataset,
    reference: ImageDataset,
    extractor: Extractor,
    metrics: Collection[str],
    *,
    reference_fingerprint: str,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
) -> dict[str, float]:
    """The chosen `metrics` (among fd, kid, isc, prc) of `generated` against `reference`.

    Features of the reference are cached under a hash of its fingerprint and of the extractor's
    weights; those of the generated images are not cached.

    Returns:
        "fd" or "fid" (by the extractor), "kid_mean", "kid_std" (over 100 subsets of up to 1,000
        images), "isc_mean", "isc_std", "precision", "recall", "f_score" (3 neighbours).

    Raises:
        ValueError: too few images for a metric.
    """
    if not metrics:
        return {}
    fewest = min(len(generated), len(reference))
    needed = PRC_NEIGHBOURS + 2 if "prc" in metrics else 2
    if fewest < needed:
        raise ValueError(
            f"evaluate.metrics: {', '.join(metrics)} need at least {needed} generated and real "
            f"images, there are {len(generated)} and {len(reference)}; raise "
            "evaluate.fid_num_images"
        )
    with full_float32():
        found = torch_fidelity.calculate_metrics(
            input1=BareImages(generated, extractor.channels),
            input2=BareImages(reference, extractor.channels),
            input2_cache_name=_cache_name(reference_fingerprint, len(reference), extractor),
            cache_root=str(cache_folder() / "features"),
            fid="fd" in metrics,
            kid="kid" in metrics,
            isc="isc" in metrics,
            prc="prc" in metrics,
            feature_extractor=extractor.name,
            feature_extractor_weights_path=str(extractor.weights),
            kid_subset_size=min(LARGEST_KID_SUBSET, fewest),
            isc_splits=min(10, len(generated)),
            prc_neighborhood=PRC_NEIGHBOURS,
            batch_size=batch_size,
            cuda=torch.device(device).type == "cuda",
            save_cpu_ram=True,  # no loader processes; nearest neighbours in blocks
            verbose=False,
        )
    names = NAMES | {torch_fidelity.KEY_METRIC_FID: extractor.distance}
    return {names[key]: value for key, value in found.items()}


def _cache_name(fingerprint: str, num_images: int, extractor: Extractor) -> str:
    """A cache key with the images and the weights, which torch-fidelity's own key leaves out."""
    parts = (fingerprint, num_images, extractor.weights_sha256, torch_fidelity.__version__)
    return "reference-" + hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
