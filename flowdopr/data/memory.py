"""The interface of all data sets, and a data set that is held in memory.

Shapes: images uint8 `(N, C, H, W)`, labels int64 `(N,)`. Latents are float32 `(N, L, h, w)`.
"""

from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowdopr.data.transforms import mirror, to_float


class Picks(NamedTuple):
    """The images of one batch: `(B,)` indices int64, mirrored or not bool, and epochs int64."""

    indices: Tensor
    mirrored: Tensor
    epochs: Tensor


class Batch(NamedTuple):
    """A batch on its way to the device, where it becomes floats: a quarter of the bytes to move.

    Images `(B, C, H, W)` uint8, or float32 latents; labels `(B,)` int64; and `(B,)` bool, which
    images are still to be mirrored, None for none.
    """

    images: Tensor
    labels: Tensor
    mirrored: Tensor | None = None

    def part(self, rows: slice) -> "Batch":
        mirrored = None if self.mirrored is None else self.mirrored[rows]
        return Batch(self.images[rows], self.labels[rows], mirrored)

    def on(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """x_1 `(B, C, H, W)` float32, images in [-1, 1], and y `(B,)`; the host does not wait."""
        images, labels = (part.to(device, non_blocking=True) for part in (self.images, self.labels))
        if self.mirrored is not None:
            images = mirror(images, self.mirrored.to(device, non_blocking=True))
        return to_float(images), labels


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images with labels: `dataset[i]` -> (uint8 `(C, H, W)`, int), never augmented.

    `labels` `(N,)` int64 is known without decoding any image; all 0 where there are no classes.
    """

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images `(B, C, H, W)` uint8 and labels `(B,)` of `indices` `(B,)` int64."""
        images = torch.stack([self[index][0] for index in indices.tolist()])
        return images, self.labels[indices]

    def drawn(self, picks: Picks, seed: int) -> Batch:
        """The training batch of `picks`. Random numbers depend only on (`seed`, epoch, image)."""
        return Batch(*self.batch(picks.indices), picks.mirrored)


class ImageTensor(ImageDataset):
    """Images `(N, C, H, W)` uint8 and labels `(N,)` in memory."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


def free_memory() -> int:
    """Bytes of memory that are free, within the limit of the container if there is one."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    return min([psutil.virtual_memory().available, *([int(text)] if text.isdigit() else [])])
