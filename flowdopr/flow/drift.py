"""Drift of rollouts: how far the distribution of their states is from that of the path, over time.

A model with a small one-step error can still leave the path, because each error of a rollout
changes the states at which it is evaluated next. At time t let X be a state of a rollout and Y a
point of the path. Their energy distance (Szekely & Rizzo 2013), as a share of its first term, is

    (2 E|X - Y| - E|X - X'| - E|Y - Y'|) / (2 E|X - Y|)                                    (14)

It is 0 only for equal distributions, at most 1, and needs no feature network. Expectations over
pairs leave out an image's pair with itself, so that equal distributions give 0 on average, whatever
their number.
"""

import torch
from torch import Tensor

from flowdopr.flow.noise import ImageNoise
from flowdopr.flow.objective import FlowMatching, Model
from flowdopr.flow.one_step import OneStepLoss, TimeBins
from flowdopr.flow.path import batch_times
from flowdopr.flow.sampler import Sampling


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """Equation (14) for samples x (N, ...) and y (M, ...) with N, M >= 2; a scalar.

    >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    >>> energy_distance(x[:250], x[250:]).abs() < 0.02
    tensor(True)
    """
    x, y = x.flatten(1), y.flatten(1)
    between = 2 * torch.cdist(x, y).mean()
    return (between - torch.pdist(x).mean() - torch.pdist(y).mean()) / between


@torch.no_grad()
def rollout_drift(
    objective: FlowMatching,
    model: Model,
    x_1: Tensor,
    y: Tensor | None = None,
    *,
    seed: int,
    sampling: Sampling | None = None,
) -> OneStepLoss:
    """Equation (14) at every time at which the solver evaluates the model, and by time.

    >>> images = torch.randn(64, 1, 4, 4)
    >>> len(rollout_drift(FlowMatching(), lambda x, t, y: -x, images, seed=0).by_time)
    10

    Args:
        objective: gives the path and the coupling of noise and images.
        model: model(x, t, y) -> (B, ...).
        x_1: images (N, ...), N >= 2, on the model's device. The rollouts are N too, of the labels
            `y`, from other noise than that of the path.
        seed: of both noises.
        sampling: settings of the rollout.

    Raises:
        ValueError: for fewer than two images, or as `generate`.
    """
    if len(x_1) < 2:
        raise ValueError(f"rollout_drift: {len(x_1)} images: give two or more")
    sampling = sampling or Sampling()
    count, shape, device = len(x_1), tuple(x_1.shape[1:]), x_1.device
    velocity, bins = sampling.velocity(model, y), TimeBins()
    noise = ImageNoise(seed, range(count), shape, device)
    of_path = ImageNoise(seed, range(count, 2 * count), shape, device)
    x_0 = objective.coupling(of_path.normal(), x_1, y, of_path.uniform().flatten(1)[:, 0])

    def measured(x: Tensor, t: Tensor) -> Tensor:
        times = batch_times(t, x)
        on_path = objective.path.sample(x_0, x_1, times).x_t
        bins.add(times[:1], energy_distance(x, on_path)[None])
        return velocity(x, t)

    sampling.rollout(measured, noise.normal(), noise.normal)
    return bins.result()
