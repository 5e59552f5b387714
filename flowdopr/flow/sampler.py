"""Images from a model: settings of a rollout, and generation in batches of any size.

Shapes: images (N, C, H, W); labels (N,) int64 or None.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from flowdopr.flow.guidance import ALWAYS, ModelVelocity, guided_velocity
from flowdopr.flow.noise import ImageNoise
from flowdopr.flow.objective import Model
from flowdopr.flow.path import SAFE_LEVEL, LinearPath, Path
from flowdopr.flow.prediction import ROLLOUT_LEVEL, check_prediction, convert, rollout_span
from flowdopr.flow.sde import SDE_SOLVERS, check_sde, solve_sde
from flowdopr.flow.solver import (
    ADAPTIVE_SOLVERS,
    ODE_SOLVERS,
    CountCalls,
    Rollout,
    Velocity,
    check_solver,
    solve,
)
from flowdopr.flow.time import EDM_LOWEST, time_grid

SOLVERS = ODE_SOLVERS + SDE_SOLVERS


@dataclass(frozen=True)
class Sampling:
    """Settings of a rollout.

    path, prediction, coupling: those with which the model was trained.
    solver: one of SOLVERS: torchdiffeq's names, "euler_maruyama" or "sde_heun".
    steps, time_grid, grid_shift, grid_rho: for solvers with fixed steps, see `time_grid`.
    atol, rtol: tolerances of adaptive solvers and of implicit Adams.
    guidance_scale, guidance_interval: see `guided_velocity`.
    noise_scale, last_step: for stochastic solvers, see `solve_sde`.
    last_step_size: length in time of the last step of a stochastic solver; the other steps divide
        the time before it. By default the last interval of the time grid.

    Raises:
        ValueError: for a combination that cannot work.
    """

    path: Path = field(default_factory=LinearPath)
    prediction: str = "velocity"
    coupling: str = "independent"
    solver: str = "midpoint"
    steps: int = 50
    time_grid: str | Sequence[float] = "uniform"
    grid_shift: float = 3.0
    grid_rho: float = 7.0
    atol: float = 1e-5
    rtol: float = 1e-5
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = ALWAYS
    noise_scale: float = 1.0
    last_step: str = "tweedie"
    last_step_size: float | None = None

    def __post_init__(self) -> None:
        check_prediction(self.prediction)
        if self.solver not in SOLVERS:
            raise ValueError(f"solver={self.solver!r}: choose one of {', '.join(SOLVERS)}")
        if self.solver in ADAPTIVE_SOLVERS and self.time_grid != "uniform":
            raise ValueError(
                f"solver={self.solver!r} chooses its own times: set time_grid to uniform, and "
                "atol, rtol"
            )
        if self.stochastic:
            check_sde(self.solver, self.path, self.noise_scale, self.coupling, self.last_step)
            self._check_last_step()
            self.grid()
        else:
            check_solver(self.solver, self.grid())

    @property
    def stochastic(self) -> bool:
        return self.solver in SDE_SOLVERS

    def _check_last_step(self) -> None:
        size = self.last_step_size
        if size is None:
            return
        if not isinstance(self.time_grid, str):
            raise ValueError(
                f"last_step_size={size}: the list of times has a last step already, leave it out"
            )
        if not 0 < size < 1 or self.steps < 2:
            raise ValueError(
                f"last_step_size={size}, steps={self.steps}: need a size between 0 and 1, and 2 "
                "steps or more"
            )

    def grid(self, level: float = ROLLOUT_LEVEL) -> Tensor:
        """Times of the rollout, within `rollout_span`; see `finish` for a grid that ends before 1.

        A list of times is cut off where the span starts or ends. For stochastic solvers the last
        time is always 1, where they do not evaluate the velocity.
        """
        grid = self._within_span(level)
        if self.stochastic:
            kept = grid if self.last_step_size is not None else grid[:-1]
            return torch.cat([kept, grid.new_ones(1)])
        return grid

    def _within_span(self, level: float) -> Tensor:
        start, end = rollout_span(self.path, self.prediction, level)
        if self.time_grid == "edm" and end < 1:
            end = float(self.path.time_at(EDM_LOWEST))
        if isinstance(self.time_grid, str):
            steps, shift, rho = self.steps, self.grid_shift, self.grid_rho
            if self.stochastic and self.last_step_size is not None:
                steps, end = steps - 1, min(end, 1 - self.last_step_size)
            return time_grid(
                self.time_grid, steps, start=start, end=end, shift=shift, rho=rho, path=self.path
            )
        times = time_grid(self.time_grid).tolist()
        if times[0] != 0:
            raise ValueError(
                f"times {list(self.time_grid)}: rollouts start from noise, so the first must be 0"
            )
        inner = [t for t in times if start < t < end]
        return time_grid([start, *inner, *([end] if times[-1] >= end else [])])

    def likelihood_arguments(self) -> dict[str, Any]:
        """Arguments of `log_likelihood` by name; adaptive solvers integrate closer to t = 1."""
        level = SAFE_LEVEL if self.solver in ADAPTIVE_SOLVERS else ROLLOUT_LEVEL
        settings = {name: getattr(self, name) for name in ("solver", "atol", "rtol", "path")}
        return settings | {"grid": self.grid(level)}

    def velocity(
        self, model: Model, y: Tensor | None, guide_model: Model | None = None
    ) -> ModelVelocity:
        """The velocity of `model` at labels `y`, see `guided_velocity`."""
        return guided_velocity(
            model,
            y,
            self.guidance_scale,
            guidance_interval=self.guidance_interval,
            guide_model=guide_model,
            path=self.path,
            prediction=self.prediction,
        )

    def rollout(self, velocity: Velocity, x_0: Tensor, noise: Callable[[], Tensor]) -> Rollout:
        """Integrate from noise `x_0` (B, ...) to images; a stochastic solver draws from `noise`,
        which returns standard normal numbers of the shape of `x_0`."""
        grid, solver, path = self.grid(), self.solver, self.path
        if grid[0] > 0:
            x_0 = path(grid[0]).sigma.to(x_0) * x_0  # x_t without alpha_t x_1, which is unknown
        if self.stochastic:
            options = {"noise_scale": self.noise_scale, "last_step": self.last_step}
            return solve_sde(velocity, x_0, path, noise, grid=grid, solver=solver, **options)
        counter = CountCalls(velocity)
        x, _ = solve(counter, x_0, grid, solver=solver, atol=self.atol, rtol=self.rtol)
        if grid[-1] < 1:
            x = finish(counter, x, grid[-1].to(x), path)
        return Rollout(x, counter.calls)


def finish(velocity: Velocity, x: Tensor, t: Tensor, path: Path) -> Tensor:
    """The state at t = 1 from that at `t`, by one midpoint step in the noise level (two calls).

    With the level s = sigma_t / alpha_t and y = x_t / alpha_t the ODE is dy/ds = E[x_0 | x_t] on
    every path, without a singularity at s = 0 (Song et al. 2021, DDIM). A single Euler step would
    give the posterior mean, which loses variations smaller than s.
    """
    level = _level(path, t)
    middle = path.time_at(level / 2)
    noise = convert(velocity(x, t), x, t, path, "velocity", "noise")
    y = x / path(t).alpha
    halfway = path(middle).alpha * (y + (_level(path, middle) - level) * noise)
    noise = convert(velocity(halfway, middle), halfway, middle, path, "velocity", "noise")
    return y - level * noise


def _level(path: Path, t: Tensor) -> Tensor:
    c = path(t)
    return c.sigma / c.alpha


@dataclass(frozen=True)
class Samples:
    """images: (N, C, H, W) float32 on the CPU, not clamped to [-1, 1]. nfe: mean number of model
    calls for an image; not an integer where an adaptive solver differed between batches."""

    images: Tensor
    nfe: int | float


def generate(
    model: Model,
    labels: Tensor | None,
    *,
    seed: int,
    indices: Sequence[int] | None = None,
    num_images: int | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    guide_model: Model | None = None,
    image_shape: tuple[int, ...] | None = None,
    sampling: Sampling | None = None,
    **settings: Any,
) -> Samples:
    """Sample one image for each label, by rollouts from noise.

    >>> def model(x, t, y): return -x
    >>> samples = generate(model, None, num_images=3, image_shape=(1, 4, 4), seed=0, steps=2)
    >>> samples.images.shape, samples.nfe
    (torch.Size([3, 1, 4, 4]), 4)

    All noise for image i, also that of stochastic solvers, comes from a CPU generator seeded by
    (seed, indices[i]). Except with BATCH_DEPENDENT_SOLVERS, the image is therefore the same, up to
    rounding, for any batch size and number of processes.

    Args:
        model, guide_model: model(x, t, y) -> (B, ...); the second one is for autoguidance.
        labels: (N,) int64, or other conditions (N, ...); None, with `num_images`, for none.
        indices: numbers of the images, by default 0 to N - 1.
        device: where to sample; by default the device of the model's parameters.
        image_shape: of one sample, (C, H, W) or any other; by default `model.image_shape`.
        sampling, settings: a `Sampling`, and any of its fields by name, which take precedence.

    Raises:
        ValueError: for a wrong combination of settings, before anything runs, or as `solve`.
        TypeError: for a setting that `Sampling` does not have.
    """
    sampling = replace(sampling or Sampling(), **settings)
    total = _number_of_images(labels, num_images, batch_size)
    indices = range(total) if indices is None else indices
    if len(indices) != total:
        raise ValueError(f"{len(indices)} indices for {total} images: give one for each")
    shape = image_shape or getattr(getattr(model, "module", model), "image_shape", None)
    if shape is None:
        raise ValueError("the model has no image_shape: give image_shape=(C, H, W)")
    sampling.velocity(model, labels, guide_model)  # raises for wrong guidance before sampling
    device = device if device is not None else device_of(model)
    images, calls = torch.empty(total, *shape), 0
    for first in range(0, total, batch_size):
        part = slice(first, min(first + batch_size, total))
        y = None if labels is None else labels[part].to(device)
        velocity = sampling.velocity(model, y, guide_model)
        count = part.stop - first
        noise = ImageNoise(seed, indices[part], shape, device)
        with torch.no_grad():
            x_1, nfe = sampling.rollout(velocity, noise.normal(), noise.normal)
        images[part] = x_1.cpu()
        calls += nfe * count
    mean = calls / total
    return Samples(images, int(mean) if mean.is_integer() else mean)


def _number_of_images(labels: Tensor | None, num_images: int | None, batch_size: int) -> int:
    total = num_images if labels is None else len(labels)
    if total is None or total < 1 or batch_size < 1:
        raise ValueError(
            f"nothing to sample: labels={'none' if labels is None else total}, "
            f"num_images={num_images}, batch_size={batch_size}: give labels or num_images >= 1"
        )
    if num_images not in (None, total):
        raise ValueError(f"num_images={num_images} but {total} labels: leave num_images out")
    return total


def device_of(model: Model) -> torch.device:
    """The device of the parameters of `model`; the CPU for a plain function."""
    if not isinstance(model, torch.nn.Module):
        return torch.device("cpu")
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device
