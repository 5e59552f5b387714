"""The task of scripts/known_answer.py: data, network and measures.

The data are Gaussian, or a mixture of Gaussians, with variances from 1 to 1/condition along the
directions of a random rotation R, so the exact velocity and distribution are known in closed form.

Shapes: x (B, D); t (B,); moments and velocities along directions have the directions last.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowdopr.flow import FlowMatching, TimeSampler, solve, time_grid

FREQUENCIES, GROUPS, TIME_BINS = 8, 8, 10
EVALUATED, ROLLOUTS = 4096, 1024
UNIFORM = TimeSampler()
LAWS = {"uniform": UNIFORM, "late": TimeSampler(shift=0.1)}
BANDS = {"early": (0.0, 0.1), "all": (0.0, 1.0), "late": (0.9, 1.0)}


@dataclass(frozen=True)
class Setting:
    """The data and the law of training times."""

    name: str
    condition: float
    components: int = 1
    law: str = "uniform"


SETTINGS = {
    one.name: one
    for one in (
        Setting("gaussian-1e4", 1e4),
        Setting("gaussian-1e4-late", 1e4, law="late"),
        Setting("mixture-1e4", 1e4, components=4),
        Setting("gaussian-1e2", 1e2),
        Setting("gaussian-1", 1.0),
    )
}


class Target:
    """The data: equally likely Gaussians of one covariance R diag(variances) R^T, with the means
    `means` (K, D) along the columns of R (D, D), all drawn from `seed` in float64."""

    def __init__(self, setting: Setting, dim: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        self.rotation = torch.linalg.qr(normal)[0]
        lowest = -math.log10(setting.condition)
        self.variances = torch.logspace(0, lowest, dim, dtype=torch.float64)
        shape = (setting.components, dim)
        means = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.means = 2 * self.variances.sqrt() * (means - means.mean(0))

    @property
    def covariance(self) -> Tensor:
        """(D, D) of the data, whose mean is 0, along the columns of R."""
        return torch.diag(self.variances) + self.means.T @ self.means / len(self.means)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, D) float32."""
        chosen = torch.randint(len(self.means), (count,), generator=generator)
        noise = torch.randn(count, len(self.variances), generator=generator)
        along = self.means[chosen].float() + self.variances.sqrt().float() * noise
        return along @ self.rotation.T.float()

    def along(self, x: Tensor) -> Tensor:
        """`x` in the coordinates of R's columns."""
        return x @ self.rotation.to(x)

    def __call__(self, x: Tensor, t: Tensor, y: None = None) -> Tensor:
        """The exact velocity E[x_1 - x_0 | x_t = x] of the linear path.

        Given component j, x_t is normal with mean t m_j and, along direction k, the variance
        s_k = (1-t)^2 + t^2 lambda_k, and the velocity along k is
        m_jk + (t lambda_k - (1-t)) / s_k (x_k - t m_jk). Components are weighted by their
        posterior probabilities.
        """
        variances, means, t = self.variances.to(x), self.means.to(x), t.reshape(-1, 1)
        total = (1 - t) ** 2 + t**2 * variances
        away = self.along(x)[:, None] - t[:, :, None] * means  # (B, K, D)
        weights = (-away.square() / total[:, None] / 2).sum(2).softmax(1)
        gain = (t * variances - (1 - t)) / total
        velocity = (weights[:, :, None] * (means + gain[:, None] * away)).sum(1)
        return velocity @ self.rotation.T.to(x)


class VelocityMLP(nn.Module):
    """Three linear layers, the two hidden ones scaled and shifted by linear functions of features
    of the time: sines and cosines of t and of the logarithm of 1.01 - t."""

    num_classes = 0

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, width), nn.Linear(width, width)])
        self.readout = nn.Linear(width, dim)
        self.modulations = nn.ModuleList([nn.Linear(4 * FREQUENCIES, 2 * width) for _ in range(2)])
        for layer in self.modulations:
            layer.fused_blocks = 2
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, y: None = None) -> Tensor:
        times = torch.stack([t, (1.01 - t).log() / math.log(0.01)], 1)
        phases = (math.pi / 2 * times[:, :, None] * torch.arange(1, FREQUENCIES + 1)).flatten(1)
        features = torch.cat([phases.sin(), phases.cos()], 1)
        for layer, modulation in zip(self.layers, self.modulations, strict=True):
            scale, shift = modulation(features).chunk(2, 1)
            x = nn.functional.silu(layer(x) * (1 + scale) + shift)
        return self.readout(x)


class KnownAnswer:
    """Fixed points of the path at uniform times and at times of the training's `law`, noise with
    exactly the mean 0 and covariance 1, and what rollouts of the exact velocity from it are."""

    def __init__(self, target: Target, seed: int, law: TimeSampler = UNIFORM) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.target = target
        self.points = path_points(target, EVALUATED, UNIFORM, generator)
        z = torch.randn(ROLLOUTS, len(target.variances), generator=generator).double()
        z = z - z.mean(0)
        root = torch.linalg.cholesky(z.T @ z / len(z))
        self.noise = torch.linalg.solve_triangular(root, z.T, upper=False).T.float()
        self.trained = self.points
        if law != UNIFORM:
            self.trained = path_points(target, EVALUATED, law, generator)
        self.exact_moments = self.rollout_moments(target)

    def squared_errors(self, model: Any, points: tuple[Tensor, Tensor]) -> Tensor:
        """(EVALUATED, D) of the velocity, along the columns of R."""
        error = model(*points) - self.target(*points)
        return self.target.along(error).double().square()

    def rollout_moments(self, model: Any) -> tuple[Tensor, Tensor]:
        """Mean and covariance of rollouts (midpoint, 50 steps), along the columns of R."""
        grid = time_grid("uniform", 50)
        x_1 = solve(lambda x, t: model(x, t.expand(len(x))), self.noise, grid).x_1
        along = self.target.along(x_1.double())
        return along.mean(0), along.T.cov(correction=0)

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, Any] | None:
        """The measures that known_answer.py explains; by direction in groups of neighbours. None
        where the rollouts or the error are not finite."""
        error = self.squared_errors(model, self.points)
        bins = (self.points[1] * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        by_cell = torch.stack([grouped(error[bins == b].mean(0)) for b in range(TIME_BINS)])
        mean, covariance = self.rollout_moments(model)
        if not (covariance.isfinite().all() and error.isfinite().all()):
            return None
        logs = (covariance.diag() / self.exact_moments[1].diag()).log()
        numbers = {
            "excess": error.mean(),
            "excess_trained": self.squared_errors(model, self.trained).mean(),
            "spectrum": logs.abs().mean(),
            "lowest": logs[-math.ceil(len(logs) / 3) :].abs().mean(),
            "w2": gaussian_w2(mean, covariance, self.target.covariance),
        }
        lists = {
            "excess_by_direction": grouped(error.mean(0)),
            "excess_by_time": by_cell.mean(1),
            "excess_late_by_direction": by_cell[-1],
            "ratio_by_direction": grouped(logs).exp(),
        }
        return {name: rounded(value) for name, value in (numbers | lists).items()}


def path_points(
    target: Target, count: int, law: TimeSampler, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """x_t (count, D) and t (count,) of fresh samples."""
    objective = FlowMatching(time_sampler=law)
    x_1 = target.sample(count, generator)
    draw = objective.draw(count, x_1.shape[1:], generator=generator)
    return objective.path.sample(draw.x_0, x_1, draw.t).x_t, draw.t


def grouped(values: Tensor) -> Tensor:
    """Means over up to GROUPS groups of neighbouring directions."""
    return torch.stack([part.mean() for part in values.tensor_split(min(GROUPS, len(values)))])


def rounded(values: Tensor) -> Any:
    """Numbers or lists of four digits, for a small file."""
    return [rounded(one) for one in values] if values.ndim else float(f"{values.item():.4g}")


def gaussian_w2(mean: Tensor, covariance: Tensor, wanted: Tensor) -> Tensor:
    """Wasserstein distance of order 2 of N(mean, covariance) and N(0, wanted)."""
    root = torch.linalg.cholesky(wanted)
    cross = torch.linalg.eigvalsh(root.T @ covariance @ root).clamp(min=0).sqrt().sum()
    square = mean.square().sum() + covariance.trace() + wanted.trace() - 2 * cross
    return square.clamp(min=0).sqrt()


@torch.no_grad()
def layer_inputs(model: VelocityMLP, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
    """The inputs (B, ...) of every layer that is not a modulation, in float64."""
    inputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0].double()})
        )
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and "modulations" not in name
    ]
    model(x_t, t)
    for handle in handles:
        handle.remove()
    return inputs


def second_moments(
    model: VelocityMLP, target: Target, seed: int
) -> dict[str, dict[str, list[float]]]:
    """For each layer and band of times: condition number and effective rank (the exponential of
    the eigenvalues' entropy) of the second moment of the layer's inputs."""
    found: dict[str, dict[str, list[float]]] = {}
    for band, (start, end) in BANDS.items():
        generator = torch.Generator().manual_seed(seed)
        x_1 = target.sample(EVALUATED, generator)
        x_0 = torch.randn(x_1.shape, generator=generator)
        t = start + (end - start) * UNIFORM(EVALUATED, generator)
        x_t = FlowMatching().path.sample(x_0, x_1, t).x_t
        for name, z in layer_inputs(model, x_t, t).items():
            values = torch.linalg.eigvalsh(z.T @ z / len(z)).clamp(min=1e-12)
            shares = values / values.sum()
            rank = (-(shares * shares.log()).sum()).exp()
            numbers = torch.stack([values[-1] / values[0], rank])
            found.setdefault(name, {})[band] = rounded(numbers)
    return found
