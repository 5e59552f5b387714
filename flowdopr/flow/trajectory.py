"""What a rollout sees on its way: the states x_t, and the images x_1 that the model expects there.

On a straight path x_1 would be the final image from the first step on; the more it changes, the
more the rollout's velocity turns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowdopr.flow.noise import ImageNoise
from flowdopr.flow.objective import Model
from flowdopr.flow.prediction import convert
from flowdopr.flow.sampler import Sampling, device_of


class Trajectory(NamedTuple):
    """times: (T,), the last is 1. x_t: (T, N, ...), the last is the image. x_1: (T, N, ...), the
    image that is predicted at each x_t. All float32 on the CPU."""

    times: Tensor
    x_t: Tensor
    x_1: Tensor


def trajectory(
    model: Model,
    labels: Tensor | None,
    *,
    seed: int,
    indices: Sequence[int],
    image_shape: tuple[int, ...],
    frames: int = 12,
    guide_model: Model | None = None,
    sampling: Sampling | None = None,
) -> Trajectory:
    """The rollouts of the images that `generate` draws for these `indices` and labels.

    >>> found = trajectory(lambda x, t, y: -x, None, seed=0, indices=[3], image_shape=(2,))
    >>> found.times[[0, -1]], found.x_t.shape
    (tensor([0., 1.]), torch.Size([12, 1, 2]))

    Args:
        model, labels, seed, indices, guide_model, sampling: as in `generate`.
        image_shape: of one sample.
        frames: at most so many times T. Of the times at which the solver calls the model, these are
            the first ones after equally spaced times.

    Raises:
        ValueError: as `generate`.
    """
    sampling, device = sampling or Sampling(), device_of(model)
    velocity = sampling.velocity(model, None if labels is None else labels.to(device), guide_model)
    seen: list[tuple[float, Tensor, Tensor]] = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        v = velocity(x, t)
        if len(seen) < frames - 1 and float(t) * (frames - 1) >= len(seen):
            x_1 = convert(v, x, t, sampling.path, "velocity", "data")
            seen.append((float(t), x.float().cpu(), x_1.float().cpu()))
        return v

    noise = ImageNoise(seed, indices, image_shape, device)
    with torch.no_grad():
        end = sampling.rollout(watched, noise.normal(), noise.normal).x_1.float().cpu()
    times, states, predicted = zip(*seen, (1.0, end, end), strict=True)
    return Trajectory(torch.tensor(times), torch.stack(states), torch.stack(predicted))
