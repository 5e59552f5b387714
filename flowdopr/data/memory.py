"""The two calls every data set answers, and data sets held whole in memory.

Shapes: images uint8 `(N, C, H, W)`, labels int64 `(N,)`.
"""

import torch
from torch import Tensor
from torch.utils.data import Dataset


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


class ImageTensor(ImageDataset):
    """Images `(N, C, H, W)` uint8 and labels `(N,)` that lie in memory."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]
