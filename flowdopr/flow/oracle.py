"""The exact velocity field of a finite training set, and how far a model is from it.

If x_1 is uniform over the images X_1 .. X_N and x_0 is an independent Gaussian, then x_t is a
mixture of N Gaussians and Bayes' rule gives the posterior over images and its mean:

    p(i | x_t) = softmax_i( -|x_t - alpha_t X_i|^2 / (2 sigma_t^2) )                       (11)
    E[x_1 | x_t] = sum_i p(i | x_t) X_i                                                    (12)

and from it the velocity v* = E[dx_t | x_t], which minimises the training loss exactly. No model has
a lower loss than v*. The excess of a model's loss is an error that training could still remove,
although rollouts of v* itself all end at training images:

    E|v - dx_t|^2  =  E|v - v*|^2  +  E|v* - dx_t|^2       over the training set           (13)
       loss            excess          irreducible

Shapes: x_t, velocity (B, ...); t scalar or (B,); y (B,) or None; images (N, ...).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowdopr.flow.noise import ImageNoise
from flowdopr.flow.objective import FlowMatching, Model, labels_for
from flowdopr.flow.one_step import OneStepLoss, TimeBins, path_points, squared_error
from flowdopr.flow.path import Coefficients, LinearPath, Path, batch_times
from flowdopr.flow.prediction import SAFE_TIME, convert
from flowdopr.flow.sampler import Sampling
from flowdopr.linalg import full_float32

# Times are limited to 1 - LAST, which float32 still resolves: at t = 1 sigma_t is 0, and v* is
# infinite off the training set.
LAST = 1e-5
SPACES = ("velocity", "data")


class EmpiricalVelocity(nn.Module):
    """v* of a training set as a model: oracle(x_t, t, y) is the velocity.

    It can be sampled from and evaluated like any model with prediction "velocity". With labels it
    is conditional on them; the label `num_classes` stands for all images.

    >>> oracle = EmpiricalVelocity(torch.rand(10, 1, 4, 4))
    >>> oracle(torch.randn(2, 1, 4, 4), torch.tensor(0.3)).shape
    torch.Size([2, 1, 4, 4])

    It needs memory for B x chunk_size numbers beside the images, and 4 B N D operations a call.
    Matrix products are in full float32, also under autocast and where TF32 is allowed, because (11)
    divides their differences by sigma_t^2.

    Args:
        images: (N, ...) float training images as the model saw them, with the mirrored copies if it
            was trained with random mirroring.
        labels: (N,) int64 in [0, num_classes), or None.
        path: path with which the model was trained, by default linear.
        chunk_size: training images handled at a time.

    Raises:
        ValueError: for no images, labels of another length or a chunk size below 1.
    """

    mean: Tensor
    images: Tensor
    half_norms: Tensor
    labels: Tensor | None

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        path: Path | None = None,
        chunk_size: int = 4096,
    ) -> None:
        super().__init__()
        if not len(images) or chunk_size < 1 or (labels is not None and len(labels) != len(images)):
            raise ValueError(
                f"oracle: {len(images)} images, {'no' if labels is None else len(labels)} labels, "
                f"chunk_size={chunk_size}: need images, a label for each, and chunks of 1 or more"
            )
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        self.path, self.chunk_size = path or LinearPath(), chunk_size
        self.image_shape = tuple(images.shape[1:])
        self.num_classes = 0 if labels is None else int(labels.max()) + 1
        # Distances do not change when all points move together, and are most exact near zero.
        self.register_buffer("mean", images.mean(0), persistent=False)
        self.register_buffer("images", images - images.mean(0), persistent=False)
        half_norms = self.images.flatten(1).square().sum(1) / 2
        self.register_buffer("half_norms", half_norms, persistent=False)
        self.register_buffer("labels", labels, persistent=False)

    @torch.no_grad()
    def posterior_mean(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """E[x_1 | x_t, y], equations (11) and (12), at times up to 1 - LAST.

        Raises:
            ValueError: for labels without training images, or labels where the oracle has none.
        """
        if y is not None and self.labels is None:
            raise ValueError(
                "oracle: it was made without labels: make it with labels, or give none"
            )
        c = self._coefficients(x_t, t)
        with torch.autocast(x_t.device.type, enabled=False), full_float32():
            x = (x_t - c.alpha * self.mean).flatten(1)
            alpha, sigma = c.alpha.reshape(-1, 1), c.sigma.reshape(-1, 1)
            return self._softmax_mean(x, alpha, sigma, y).reshape(x_t.shape) + self.mean

    def _softmax_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor | None) -> Tensor:
        """(12) for centred x (B, D), by one pass over chunks with a running maximum.

        |x|^2 is the same for all images, so the exponent of (11) is, up to a constant,
        (alpha x.X - alpha^2 |X|^2 / 2) / sigma^2.
        """
        largest = torch.full_like(alpha, torch.finfo(x.dtype).min)
        total, mean = torch.zeros_like(alpha), torch.zeros_like(x)
        for first in range(0, len(self.images), self.chunk_size):
            part = slice(first, first + self.chunk_size)
            chunk = self.images[part].flatten(1)
            logits = alpha * (x @ chunk.T - alpha * self.half_norms[part]) / sigma**2
            if y is not None and self.labels is not None:
                other = (self.labels[part] != y[:, None]) & (y != self.num_classes)[:, None]
                logits = logits.masked_fill(other, -torch.inf)
            newest = torch.maximum(largest, logits.amax(1, keepdim=True))
            shrink, weights = (largest - newest).exp(), (logits - newest).exp()
            total = total * shrink + weights.sum(1, keepdim=True)
            mean = mean * shrink + weights @ chunk
            largest = newest
        if (total == 0).any():
            raise ValueError(
                "oracle: a label has no training images: use labels of the training set"
            )
        return mean / total

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The velocity v*(x_t, t, y), equation (5) of prediction.py."""
        c = self._coefficients(x_t, t)
        x_1 = self.posterior_mean(x_t, t, y)
        return c.d_alpha * x_1 + c.d_sigma * (x_t - c.alpha * x_1) / c.sigma

    def _coefficients(self, x_t: Tensor, t: Tensor) -> Coefficients:
        return self.path.at(batch_times(t, x_t).clamp(max=1 - LAST), x_t)


@dataclass(frozen=True)
class ExcessError:
    """The three terms of equation (13), each averaged over all times and by time."""

    loss: OneStepLoss
    excess: OneStepLoss
    irreducible: OneStepLoss


@torch.no_grad()
def excess_error(
    oracle: EmpiricalVelocity,
    objective: FlowMatching,
    model: Model,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    *,
    seed: int = 0,
) -> ExcessError:
    """The terms of equation (13), with the noise and times of `one_step_loss`.

    >>> images = torch.rand(10, 1, 4, 4)
    >>> oracle = EmpiricalVelocity(images)
    >>> excess_error(oracle, FlowMatching(), oracle, [(images, None)]).excess.mean
    0.0

    Args:
        oracle: v* of the training set.
        objective: gives the path and what the model predicts.
        model: model(x, t, y) -> (B, ...).
        batches: pairs (x_1 (B, ...), y (B,) or None) of the oracle's training set. With other
            images each term is still correct, but the loss is not the sum of the other two.
        seed: of noise and times.

    Raises:
        ValueError: when there are no batches.
    """
    loss, excess, irreducible = TimeBins(), TimeBins(), TimeBins()
    for x_t, dx_t, t, y in path_points(objective, batches, seed):
        velocity = objective.velocity(model, x_t, t, labels_for(model, y))
        best = oracle(x_t, t, labels_for(oracle, y))
        loss.add(t, squared_error(velocity, dx_t))
        excess.add(t, squared_error(velocity, best))
        irreducible.add(t, squared_error(best, dx_t))
    return ExcessError(loss.result(), excess.result(), irreducible.result())


def rollout_excess(
    oracle: EmpiricalVelocity,
    model: Model,
    labels: Tensor | None = None,
    *,
    num_images: int | None = None,
    seed: int,
    space: str = "velocity",
    sampling: Sampling | None = None,
    device: torch.device | str = "cpu",
) -> OneStepLoss:
    """|v - v*|^2 at every state and time at which the solver evaluates the model in a rollout.

    Compared with `excess_error(...).excess.by_time`, it shows how much worse the model is on its
    own rollouts than on the path. Off the training set v* grows like 1 / (1 - t), so the last times
    dominate the mean: read `by_time`, or choose the space "data", in which the error is that of
    E[x_1 | x_t].

    >>> oracle = EmpiricalVelocity(torch.rand(10, 1, 4, 4))
    >>> rollout_excess(oracle, oracle, num_images=3, seed=0).mean
    0.0

    Args:
        oracle: v* of the training set.
        model: model(x, t, y) -> (B, ...).
        labels: (N,), or None together with `num_images`; the rollout is one batch, from the noise
            that `generate` would use.
        seed: of that noise.
        space: "velocity" or "data". "data" leaves out times below SAFE_TIME on the polynomial path,
            where the velocity does not determine the data.
        sampling: settings of the rollout; guidance, if any, is part of the model's velocity.

    Raises:
        ValueError: for an unknown space, no images, or as `generate`.
    """
    if space not in SPACES:
        raise ValueError(f"space={space!r}: choose one of {', '.join(SPACES)}")
    sampling = sampling or Sampling()
    count = num_images if labels is None else len(labels)
    if not count:
        raise ValueError("rollout_excess: give labels, or num_images of at least 1")
    y = None if labels is None else labels.to(device)
    velocity, oracle_y, bins = sampling.velocity(model, y), labels_for(oracle, y), TimeBins()

    def measured(x: Tensor, t: Tensor) -> Tensor:
        v = velocity(x, t)
        if space == "velocity":
            bins.add(batch_times(t, x), squared_error(v, oracle(x, t, oracle_y)))
        elif not oracle.path.still_at_start or float(t) >= SAFE_TIME:
            # Times after 1 - LAST are treated as 1 - LAST, as they are in the oracle.
            x_1 = convert(v, x, t.clamp(max=1 - LAST), oracle.path, "velocity", "data")
            bins.add(batch_times(t, x), squared_error(x_1, oracle.posterior_mean(x, t, oracle_y)))
        return v

    noise = ImageNoise(seed, range(count), oracle.image_shape, device)
    with torch.no_grad():
        sampling.rollout(measured, noise.normal(), noise.normal)
    return bins.result()
