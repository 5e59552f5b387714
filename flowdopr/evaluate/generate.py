"""The images of a run, shared out over processes.

With a solver of fixed steps they are the same, up to rounding, whatever the number of processes and
the batch size; with an adaptive one, whose steps a batch shares, only up to its tolerance.

Shapes: images uint8 `(N, C, H, W)`, labels `(N,)` int64.
"""

from collections.abc import Callable, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from flowdopr.data import to_uint8
from flowdopr.data.loader import picks_between
from flowdopr.flow import Sampling, generate
from flowdopr.linalg import full_float32
from flowdopr.terminal import counting

DECODED_TOGETHER = 256  # decoded images are floats until they are rounded: not all at once


def balanced_labels(num: int, num_classes: int) -> Tensor:
    """`(num,)`: the classes in turn, so that label i does not depend on `num`."""
    return torch.arange(num) % num_classes


def labels_like_data(num: int, labels: Tensor) -> Tensor:
    """`(num,)` of the training labels in a fixed shuffled order, each once before any twice."""
    return labels[picks_between(0, len(labels), 0, num).indices]


def repeated_labels(num: int, labels: Sequence[int], num_classes: int) -> Tensor:
    """`(num,)`: the given labels over and over.

    Raises:
        ValueError: a label that the model does not have.
    """
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if wrong or not labels:
        known = f"0 to {num_classes - 1}" if num_classes else "none, it is unconditional"
        raise ValueError(f"labels {list(labels)}: the model's labels are {known}")
    return torch.tensor(list(labels))[torch.arange(num) % len(labels)]


def generate_images(
    model: nn.Module,
    labels: Tensor | None,
    num: int,
    *,
    sampling: Sampling,
    seed: int,
    batch_size: int,
    state: PartialState,
    guide_model: nn.Module | None = None,
    decode: Callable[[Tensor], Tensor] = lambda images: images,
) -> tuple[Tensor, int | float]:
    """`num` images as uint8 `(num, C, H, W)` on the CPU of every process, and the NFE an image.

    Each process rolls out one contiguous range; `decode` makes pixels of latents. Image i depends
    on (seed, i) and its label alone, except that a solver in `BATCH_DEPENDENT_SOLVERS` chooses its
    steps for a batch: there, only up to its tolerance. Computed in full float32, with a progress
    line for the main process's range.
    """
    rank, world = state.process_index, state.num_processes
    first, last = rank * num // world, (rank + 1) * num // world
    share: list[tuple[Tensor, float]] = []
    if last > first:
        with counting("sampling", last - first, shown=rank == 0) as progress, full_float32():
            samples = generate(
                model,
                None if labels is None else labels[first:last],
                num_images=last - first,
                seed=seed,
                first_index=first,
                batch_size=batch_size,
                guide_model=guide_model,
                sampling=sampling,
                progress=progress,
            )
            parts = samples.images.split(DECODED_TOGETHER)
            images = torch.cat([to_uint8(decode(part)) for part in parts])
        share = [(images, samples.nfe * (last - first))]
    shares = gather_object(share) if world > 1 else share
    nfe = sum(calls for _, calls in shares) / num
    return torch.cat([images for images, _ in shares]), int(nfe) if nfe.is_integer() else nfe
