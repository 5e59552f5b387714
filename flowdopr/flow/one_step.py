"""The one-step loss: the error of a model's velocity on held-out images, exactly repeatable."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowdopr.flow.noise import image_generator
from flowdopr.flow.objective import FlowMatching, Model, labels_for
from flowdopr.flow.prediction import rollout_span

NUM_BINS = 10
# The same for every held-out loss: noise and times depend on how images fall into batches.
ONE_STEP_BATCH = 128


@dataclass(frozen=True)
class OneStepLoss:
    """Mean squared error of the velocity, for each number of an image.

    mean: over all images. by_time: over the images with t in [0, 0.1), [0.1, 0.2), ... (nan where
    there are none). se_by_time: the standard errors of `by_time` over the images (nan for fewer
    than two). count: number of images.
    """

    mean: float
    by_time: list[float]
    se_by_time: list[float]
    count: int


class TimeBins:
    """Means of values (B,) in bins of time.

    They are kept on their device until the end, so that it is waited for only once, and summed in
    float64 on the CPU, because Apple GPUs lack it.
    """

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def add(self, t: Tensor, values: Tensor) -> None:
        """Add `values` (B,) at times `t` (B,)."""
        self.parts.append(torch.stack([t.to(values), values]))

    def result(self) -> OneStepLoss:
        """Means of the values added so far, over all times and in each bin."""
        t, values = torch.cat(self.parts, 1).cpu().numpy()
        bins = (t * NUM_BINS).astype(int).clip(0, NUM_BINS - 1)
        counts, sums = np.bincount(bins, minlength=NUM_BINS), self._sums(bins, values)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = sums / counts
            variances = self._sums(bins, (values - means[bins]) ** 2) / (counts - 1)
            errors = np.where(counts > 1, np.sqrt(variances / counts), np.nan)
        return OneStepLoss(float(sums.sum() / len(t)), means.tolist(), errors.tolist(), len(t))

    @staticmethod
    def _sums(bins: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.bincount(bins, weights=values, minlength=NUM_BINS)


def path_points(
    objective: FlowMatching, batches: Iterable[tuple[Tensor, Tensor | None]], seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """(x_t, dx_t, t, y) for each batch (x_1, y), with noise and times as in `one_step_loss`.

    Raises:
        ValueError: when there are no batches.
    """
    plain, number = FlowMatching(objective.path), -1
    start, end = rollout_span(objective.path, objective.prediction)
    for number, (x_1, y) in enumerate(batches):
        generator = image_generator(seed, number)
        draw = plain.draw(len(x_1), x_1.shape[1:], generator=generator, device=x_1.device)
        t = start + (end - start) * draw.t
        x_t, dx_t = objective.path.sample(draw.x_0, x_1, t)
        yield x_t, dx_t, t, y
    if number < 0:
        raise ValueError("one-step loss: there are no images to evaluate on")


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean (B,) of (a - b)^2 over the numbers of each image."""
    return (a - b).square().flatten(1).mean(1)


@torch.no_grad()
def one_step_loss(
    objective: FlowMatching,
    model: Model,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    *,
    seed: int = 0,
) -> OneStepLoss:
    """E |v(x_t, t, y) - dx_t|^2 with t uniform, stratified within each batch; no label is dropped.

    The loss is always the velocity's error with weight 1, independent coupling and uniform times,
    whatever the model predicts and however it was trained, so that models can be compared. Noise
    and times of batch b depend only on `seed` and b.

    Times lie in `rollout_span`, which is 0 to 1 for the velocity on most paths. For predictions of
    the data it ends before 1, and for those of the noise it starts after 0: beyond, converting to
    the velocity multiplies a model's error by up to 10^3, which would dominate the mean although
    rollouts never go there. The losses of two predictions therefore cover slightly different times.

    >>> batches = [(torch.rand(8, 1, 4, 4), None)]
    >>> one_step_loss(FlowMatching(), lambda x, t, y: -x, batches).count
    8

    Args:
        objective: gives the path and what the model predicts.
        model: model(x, t, y) -> (B, ...).
        batches: pairs (x_1 (B, ...), y (B,) or None) on the model's device; the same batches in
            the same order give the same loss.
        seed: of noise and times.

    Raises:
        ValueError: when there are no batches.
    """
    bins = TimeBins()
    for x_t, dx_t, t, y in path_points(objective, batches, seed):
        velocity = objective.velocity(model, x_t, t, labels_for(model, y))
        bins.add(t, squared_error(velocity, dx_t))
    return bins.result()
