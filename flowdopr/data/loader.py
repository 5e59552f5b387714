"""Endless training batches, each a pure function of (seed, step).

Shapes: `(B, C, H, W)` images, `(B,)` labels, B the process's share of the global batch. Images stay
uint8 until `Batch.on` brings them to the device.

The epochs form one endless sequence of images, each epoch in its own order. Step s takes the next
`global_batch_size` images, so a batch may span two epochs, and each epoch shows every image once.
A process takes its contiguous share of them, independent of the number of loader workers. A run can
be resumed at any step.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flowdopr.config import Config
from flowdopr.data.files import ImageFiles
from flowdopr.data.memory import Batch, ImageDataset, ImageTensor, Picks, free_memory
from flowdopr.data.transforms import to_float
from flowdopr.terminal import counting


@lru_cache(maxsize=4)
def epoch_picks(seed: int, epoch: int, num_images: int) -> Picks:
    """One epoch: the images in order, and whether each is mirrored."""
    order = torch.from_numpy(np.random.default_rng((seed, epoch, 0)).permutation(num_images))
    coins = torch.from_numpy(np.random.default_rng((seed, epoch, 1)).random(num_images) < 0.5)
    return Picks(order, coins[order], torch.full_like(order, epoch))


def picks_between(seed: int, num_images: int, start: int, stop: int) -> Picks:
    """Positions [start, stop) of the endless sequence of epochs."""
    parts = []
    for epoch in range(start // num_images, (stop - 1) // num_images + 1):
        window = slice(max(start - epoch * num_images, 0), stop - epoch * num_images)
        parts.append([column[window] for column in epoch_picks(seed, epoch, num_images)])
    return Picks(*(torch.cat(column) for column in zip(*parts, strict=True)))


class _StepSampler:
    """Yields the picks of this process for step `start_step`, the next step, and so on."""

    def __init__(self, seed: int, num_images: int, stride: int, share: slice, start_step: int):
        self.seed, self.num_images, self.stride = seed, num_images, stride
        self.share, self.start_step = share, start_step

    def __iter__(self) -> Iterator[Picks]:
        first = self.start_step * self.stride
        while True:
            start, stop = first + self.share.start, first + self.share.stop
            yield picks_between(self.seed, self.num_images, start, stop)
            first += self.stride


class _Batches(Dataset):
    """`batches[picks]` -> a `Batch`; the unit of work of a loader worker."""

    def __init__(self, dataset: ImageDataset, seed: int, *, flip: bool):
        self.dataset, self.seed, self.flip = dataset, seed, flip

    def __getitem__(self, picks: Picks) -> Batch | ValueError:
        if not self.flip:
            picks = picks._replace(mirrored=torch.zeros_like(picks.mirrored))
        try:
            return self.dataset.drawn(picks, self.seed)
        except ValueError as error:
            # Raised in a worker, it would arrive with the worker's traceback as its message.
            return error


def build_loader(
    config: Config,
    dataset: ImageDataset,
    *,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
) -> Iterator[Batch]:
    """Endless batches of steps `start_step`, `start_step + 1`, ..., on the CPU (pinned for CUDA).

    B = `train.global_batch_size` / `world_size`: all the accumulation steps of one optimizer step
    together. Images are mirrored with probability 1/2 if `data.horizontal_flip`, depending on
    (seed, epoch, image) alone.

    Raises:
        ValueError: the batch does not divide over the processes; images that do not fit into
            memory for `data.cache`; later, an unreadable image.
    """
    size = config.train.global_batch_size
    if size % world_size:
        raise ValueError(
            f"train.global_batch_size {size} is not a multiple of the number of processes "
            f"{world_size}"
        )
    share = slice(rank * size // world_size, (rank + 1) * size // world_size)
    if config.data.cache == "memory" and isinstance(dataset, ImageFiles):
        dataset = in_memory(dataset, config.data.num_workers)
    sampler = _StepSampler(config.seed, len(dataset), size, share, start_step)
    return _load(
        dataset,
        sampler,
        config.data.num_workers,
        seed=config.seed,
        flip=config.data.horizontal_flip,
    )


def in_memory(dataset: ImageFiles, num_workers: int = 0) -> ImageTensor:
    """All images of `dataset`, decoded: `(N, C, H, W)` uint8.

    Raises:
        ValueError: they do not fit into memory, or one cannot be read.
    """
    shape, processes = (len(dataset), *dataset.image_shape), os.environ.get("LOCAL_WORLD_SIZE", 1)
    need, free = math.prod(shape) * int(processes), free_memory()
    if need > free:
        size = " x ".join(map(str, dataset.image_shape))
        raise ValueError(
            f"data.cache=memory: {len(dataset):,} images of {size} take {need / 2**30:.3g} GiB in "
            f"{processes} process(es), and {free / 2**30:.3g} GiB are free: set data.cache=none or "
            "a smaller data.image_size"
        )
    images, done = torch.empty(shape, dtype=torch.uint8), 0
    with counting("decoding images", len(dataset)) as progress:
        for batch in _load(dataset, _in_order(range(len(dataset)), 256), num_workers):
            images[done : done + len(batch.labels)] = batch.images
            done += len(batch.labels)
            progress(len(batch.labels))
    return ImageTensor(images, dataset.labels)


def _load(
    dataset: ImageDataset,
    picks: Iterable[Picks],
    num_workers: int,
    *,
    seed: int = 0,
    flip: bool = False,
) -> Iterator[Batch]:
    loader = DataLoader(
        _Batches(dataset, seed, flip=flip),
        sampler=picks,
        batch_size=None,
        # Images in memory are indexed faster than a worker could hand them over.
        num_workers=0 if isinstance(dataset, ImageTensor) else num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # otherwise DataLoader draws a seed from the global generator
    )
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        yield batch


def plain_batches(
    dataset: ImageDataset, batch_size: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image of `dataset` once, in order, as (x_1, y) on `device`: for evaluation."""
    for indices in torch.arange(len(dataset)).split(batch_size):
        images, labels = dataset.batch(indices)
        yield to_float(images.to(device)), labels.to(device)


def span_batches(
    dataset: ImageDataset, span: range, batch_size: int, num_workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images of `span` once, in order, as (x_1, y) on the CPU, decoded by worker processes."""
    for batch in _load(dataset, _in_order(span, batch_size), num_workers):
        yield batch.on("cpu")


def _in_order(span: range, batch_size: int) -> Sequence[Picks]:
    """The images of `span`, none mirrored, in the first epoch."""
    chunks = torch.arange(span.start, span.stop).split(batch_size)
    return [Picks(part, torch.zeros(len(part), dtype=torch.bool), 0 * part) for part in chunks]
