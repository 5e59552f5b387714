"""Random numbers for image i that depend only on a seed and i, whatever batch the image is in."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def image_generator(seed: int, index: int) -> torch.Generator:
    """The CPU generator of image `index`, determined by (seed, index).

    >>> torch.equal(*(torch.rand(3, generator=image_generator(0, 7)) for _ in range(2)))
    True

    Raises:
        ValueError: when either is negative.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed={seed}, image index={index}: neither may be negative")
    state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


class ImageNoise:
    """Streams of random numbers (B, *shape) for the images of these B indices.

    Each call continues every stream, so call k gives image i the same numbers in any batch.

    >>> noise = ImageNoise(0, [5, 2], (1, 4, 4))
    >>> noise.normal().shape
    torch.Size([2, 1, 4, 4])
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        shape: tuple[int, ...],
        device: torch.device | str = "cpu",
    ) -> None:
        self.streams = [image_generator(seed, index) for index in indices]
        self.shape, self.device = shape, device

    def normal(self) -> Tensor:
        """Standard normal numbers."""
        return self._stack([torch.randn(self.shape, generator=g) for g in self.streams])

    def uniform(self) -> Tensor:
        """Numbers uniform in [0, 1)."""
        return self._stack([torch.rand(self.shape, generator=g) for g in self.streams])

    def signs(self) -> Tensor:
        """-1 or 1 with equal probability (Rademacher)."""
        return (self.uniform() < 0.5) * 2.0 - 1.0

    def _stack(self, rows: list[Tensor]) -> Tensor:
        return torch.stack(rows).to(self.device)
