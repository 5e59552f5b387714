"""The one-step loss: the held-out error of the velocity at single times, exactly repeatable."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowdopr.flow.objective import FlowMatching, Model, labels_for
from flowdopr.flow.time import TimeSampler

NUM_BINS = 10


@dataclass(frozen=True)
class OneStepLoss:
    """Mean squared error of the velocity, per number of the image.

    mean: over all images. by_time: over images whose t lies in [0, 0.1), [0.1, 0.2), ... (nan where
    there are none). count: number of images.
    """

    mean: float
    by_time: list[float]
    count: int


class TimeBins:
    """Accumulates values (B,) by their time, in float64 and without waiting for the device."""

    def __init__(self, device: torch.device | str) -> None:
        self.totals = torch.zeros(2, NUM_BINS, dtype=torch.float64, device=device)

    def add(self, t: Tensor, values: Tensor) -> None:
        bins = (t * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        pair = torch.stack([values.detach().double(), torch.ones_like(values, dtype=torch.float64)])
        self.totals.index_add_(1, bins, pair)

    def result(self) -> OneStepLoss:
        sums, counts = self.totals.cpu()
        mean = (sums.sum() / counts.sum()).item()
        return OneStepLoss(mean, (sums / counts).tolist(), int(counts.sum().item()))


@torch.no_grad()
def one_step_loss(
    objective: FlowMatching,
    model: Model,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    *,
    seed: int = 0,
) -> OneStepLoss:
    """E |v(x_t, t, y) - dx_t|^2 with t uniform, stratified within each batch; no label is dropped.

    Always the velocity's error with weight 1, independent coupling and uniform times, whatever the
    model predicts and however it was trained: so models can be compared. Noise and times of batch b
    depend on `seed` and b alone.

    >>> batches = [(torch.rand(8, 1, 4, 4), None)]
    >>> one_step_loss(FlowMatching(), lambda x, t, y: -x, batches).count
    8

    Args:
        batches: pairs (x_1 (B, C, H, W), y (B,) or None), on the model's device; the same batches
            in the same order give the same number.

    Raises:
        ValueError: when there are no batches.
    """
    plain = FlowMatching(objective.path, prediction=objective.prediction)
    plain.time_sampler = TimeSampler()
    bins: TimeBins | None = None
    for number, (x_1, y) in enumerate(batches):
        bins = bins or TimeBins(x_1.device)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        shape = (x_1.shape[1], x_1.shape[2], x_1.shape[3])
        draw = plain.draw(len(x_1), shape, generator=generator, device=x_1.device)
        x_t, dx_t = plain.path.sample(draw.x_0, x_1, draw.t)
        velocity = plain.velocity(model, x_t, draw.t, labels_for(model, y))
        bins.add(draw.t, (velocity - dx_t).square().flatten(1).mean(1))
    if bins is None:
        raise ValueError("one-step loss: there are no held-out images to evaluate on")
    return bins.result()
