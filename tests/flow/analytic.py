"""Distributions with a flow in closed form; all numbers of an image are independent."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowdopr.flow import PATHS, Path, PolynomialPath

# Every path with its defaults, so that a new one is tested as soon as it has a name.
EXAMPLE_PATHS: dict[str, Path] = {
    **{name: path() for name, path in PATHS.items()},
    "polynomial_3": PolynomialPath(3.0),
}


@dataclass
class Mixture:
    """Each number of x_1 is drawn from sum_k weights[k] N(means[k], deviations[k]^2)."""

    weights: tuple[float, ...] = (0.3, 0.7)
    means: tuple[float, ...] = (-0.6, 0.5)
    deviations: tuple[float, ...] = (0.2, 0.1)

    def _components(self, x: Tensor, t: Tensor, path: Path) -> tuple[Tensor, ...]:
        c = path(t)
        means, deviations, weights = (
            torch.tensor(v, dtype=x.dtype) for v in (self.means, self.deviations, self.weights)
        )
        alpha, sigma = c.alpha[..., None], c.sigma[..., None]
        variance = (alpha * deviations) ** 2 + sigma**2
        offset = x[..., None] - alpha * means
        log_joint = weights.log() - (offset**2 / variance + (2 * math.pi * variance).log()) / 2
        return log_joint, offset, variance, means, deviations, alpha, sigma

    def log_density(self, x: Tensor, t: Tensor, path: Path) -> Tensor:
        """log p_t(x), elementwise."""
        return self._components(x, t, path)[0].logsumexp(-1)

    def cdf(self, x: Tensor, t: Tensor, path: Path) -> Tensor:
        """P(x_t <= x), elementwise."""
        _, offset, variance, *_ = self._components(x, t, path)
        weights = torch.tensor(self.weights, dtype=x.dtype)
        return (weights * torch.special.ndtr(offset / variance.sqrt())).sum(-1)

    def posterior(self, x: Tensor, t: Tensor, path: Path) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t], E[x_1 | x_t], elementwise."""
        log_joint, offset, variance, means, deviations, alpha, sigma = self._components(x, t, path)
        component = log_joint.softmax(-1)
        x_0 = (component * sigma / variance * offset).sum(-1)
        x_1 = (component * (means + alpha * deviations**2 / variance * offset)).sum(-1)
        return x_0, x_1

    def velocity(self, x: Tensor, t: Tensor, path: Path) -> Tensor:
        """E[dx_t | x_t], elementwise."""
        c = path(t)
        x_0, x_1 = self.posterior(x, t, path)
        return c.d_alpha * x_1 + c.d_sigma * x_0

    def model(self, path: Path, prediction: str = "velocity"):
        """A perfect model(x, t, y) of any prediction."""

        def predict(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            t = t.reshape(-1, *(1 for _ in x.shape[1:])).expand_as(x)
            x_0, x_1 = self.posterior(x, t, path)
            return {
                "velocity": self.velocity(x, t, path),
                "data": x_1,
                "noise": x_0,
            }[prediction]

        return predict


def gaussian(mean: float = 0.3, deviation: float = 0.4) -> Mixture:
    return Mixture((1.0,), (mean,), (deviation,))
