"""The pictures of the report that show images: samples of every arm, and their nearest neighbours.

They are made from the gallery beside the card of each arm's first reported run.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import to_pil_image

from flowdopr.compare.formats import number
from flowdopr.compare.study import Study
from flowdopr.evaluate import Gallery
from flowdopr.pictures import grid

SMALLEST, LARGEST = 48, 128  # side of an image in the report, in pixels
WIDEST = 1600  # pixels of one row of images
PAIRS = 8  # images shown beside their nearest training image


@dataclass(frozen=True)
class Picture:
    """A PNG as a URI, with the text beside it."""

    title: str
    image: str


@dataclass(frozen=True)
class Neighbours:
    """Images of an arm beside the training images nearest to them, titled by the ratio of that
    distance to the median of real held-out images."""

    arm: str
    count: int
    median: str
    pairs: list[Picture]


def rows_of_samples(study: Study) -> list[Picture]:
    """A row of images for each arm; those below one another have the same noise and label."""
    return [Picture(arm, to_uri(_row(gallery.images))) for arm, gallery in _galleries(study)]


def sample_grids(study: Study) -> list[Picture]:
    """The last sample grid of each arm's training."""
    return [
        Picture(arm.name, to_uri(run.sample_grid.read_bytes()))
        for arm in study.arms
        for run in arm.reported.runs[:1]
        if run.sample_grid
    ]


def neighbours(study: Study) -> list[Neighbours]:
    """For each arm, the images that are nearest to a training image, for their distance."""
    found = []
    for arm, gallery in _galleries(study):
        ratios, nearest = gallery.ratios, gallery.nearest
        if ratios is None or nearest is None:
            continue
        pairs = []
        for index in ratios.argsort()[:PAIRS].tolist():
            pair = torch.stack([gallery.images[index], nearest[index]])
            pairs.append(Picture(number(ratios[index].item(), 2), to_uri(_row(pair))))
        found.append(Neighbours(arm, len(ratios), number(ratios.median().item(), 2), pairs))
    return found


def _galleries(study: Study) -> Iterator[tuple[str, Gallery]]:
    for arm in study.arms:
        for run in arm.reported.runs[:1]:
            gallery = Gallery.read(run.gallery) if run.gallery else None
            if gallery is not None:
                yield arm.name, gallery


def _row(images: Tensor) -> bytes:
    """Images `(N, C, H, W)` beside each other, as many as fit, as a PNG: small ones magnified pixel
    by pixel, large ones averaged down."""
    side = max(images.shape[2:])
    if side > LARGEST:
        size = [max(1, LARGEST * length // side) for length in images.shape[2:]]
        images = interpolate(images, size, mode="bilinear", antialias=True)
    columns = min(len(images), WIDEST // max(SMALLEST, images.shape[3]))
    buffer = io.BytesIO()
    to_pil_image(grid(images[:columns], columns, SMALLEST)).save(buffer, format="png")
    return buffer.getvalue()


def to_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
