"""Likelihood of images under the ODE (Chen et al. 2018; Grathwohl et al. 2019).

Backwards from an image, x_1 at t = 1 to x_0 at t = 0, the instantaneous change of variables gives

    log p_1(x_1) = log N(x_0; 0, I) - integral from 0 to 1 of div v(x_t, t) dt             (9)

and with D numbers an image, 8-bit levels u dequantised as x_1 = (u + U - 1/2) / 127.5 - 1, U
uniform in [0, 1) (each level fills the interval that rounds to it, of width 1 / 127.5),

    bits per dimension = -log2 p_1(x_1) / D + log2(127.5),                                 (10)

an upper bound, in expectation over U, of the cost of the discrete image (Theis et al. 2016).

Where the velocity is unknown near t = 1 or t = 0, the rollout goes from t_e < 1 to t_s > 0. It
starts at the mean given the data, x_e = alpha_e x_1, and its end is read as x_s = sigma_s x_0:

    log p_1(x_1) = log p_e(x_e) + D log alpha_e       log p_s(x_s) = log N(x_0) - D log sigma_s

The first equation gives the density of the data blurred by Gaussian noise of level s =
sigma_e / alpha_e. For Gaussian data of standard deviation d the error is (s / d)^4 / 4 nats a
number in expectation: 2e-6 for d = 0.02 and 4e-4 for d = 0.005 with s = 0.001 (adaptive solvers),
0.012 and 0.40 with s = 0.01 (fixed steps). In a pixel that never varies the blur also softens the
edges of the interval in (10): 0.08 nats with s = 0.001. The second equation ignores
alpha_s E[x_1], which changes at most alpha_s^2 / 2 = 5e-5 nats a number.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flowdopr.flow.noise import ImageNoise
from flowdopr.flow.objective import Model
from flowdopr.flow.path import LinearPath, Path
from flowdopr.flow.sampler import Sampling, device_of
from flowdopr.flow.solver import CountCalls, Velocity, solve

HALF_RANGE = 127.5
TRACES = ("hutchinson", "exact")
Divergence = Callable[[Tensor, Tensor], Tensor]


class LogLikelihood(NamedTuple):
    """log_prob: (B,) in nats. x_0: the noise (B, ...) at the other end of the rollout. nfe: model
    calls, each followed by one backward pass (Hutchinson) or by D of them (exact)."""

    log_prob: Tensor
    x_0: Tensor
    nfe: int


class BitsPerDim(NamedTuple):
    """bits: (N,) bits per dimension, on the CPU. nfe: mean number of model calls for an image."""

    bits: Tensor
    nfe: float


def exact_divergence(v: Tensor, x: Tensor) -> Tensor:
    """div v (B,) by one backward pass for each of the D numbers of an image."""
    flat = v.flatten(1)
    rows = [
        torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)[0].flatten(1)[:, i]
        for i in range(flat.shape[1])
    ]
    return torch.stack(rows).sum(0)


def hutchinson_divergence(probes: Tensor) -> Divergence:
    """Unbiased estimate probe^T (dv/dx) probe of div v, by one backward pass (Hutchinson 1989)."""

    def divergence(v: Tensor, x: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(v, x, probes.to(v))
        return (product * probes).flatten(1).sum(1)

    return divergence


def log_likelihood(
    velocity: Velocity,
    x_1: Tensor,
    grid: Tensor,
    *,
    probes: Tensor | None = None,
    solver: str = "dopri5",
    atol: float = 1e-5,
    rtol: float = 1e-5,
    path: Path | None = None,
) -> LogLikelihood:
    """Equation (9) for data `x_1` (B, ...).

    >>> velocity, grid = lambda x, t: 0 * x, torch.tensor([0.0, 1.0])
    >>> log_prob, x_0, nfe = log_likelihood(velocity, torch.zeros(2, 3), grid, solver="euler")
    >>> [round(value, 3) for value in log_prob.tolist()]  # -3 log(2 pi) / 2
    [-2.757, -2.757]

    Args:
        velocity: v(x, t), differentiable in x; images must not influence each other.
        grid: times as in `solve`, from noise to data or back; the ends may stay clear of 0 and 1,
            where a prediction or a path is singular.
        probes: (B, ...) random signs for Hutchinson's estimate, fixed along the rollout; without
            them the divergence is exact, at D backward passes a call.
        solver, atol, rtol: as in `solve`.
        path: path of the velocity, by default linear; gives alpha and sigma at the ends of `grid`.

    Raises:
        ValueError: as `solve`.
    """
    shape, size = x_1.shape, x_1[0].numel()
    divergence = exact_divergence if probes is None else hutchinson_divergence(probes)
    counter = CountCalls(velocity)
    backwards = grid.sort(descending=True).values
    ends = (path or LinearPath())(backwards[[0, -1]].double())
    alpha, sigma = ends.alpha[0].item(), ends.sigma[1].item()
    state = torch.cat([alpha * x_1.flatten(1), x_1.new_zeros(len(x_1), 1)], 1)
    derivative = _augmented(counter, divergence, shape)
    with torch.no_grad():
        state, _ = solve(derivative, state, backwards, solver=solver, atol=atol, rtol=rtol)
    x_0, minus_integral = state[:, :size] / sigma, state[:, size]
    log_prior = -(x_0.square().sum(1) + size * math.log(2 * math.pi)) / 2
    log_prob = log_prior + minus_integral + size * (math.log(alpha) - math.log(sigma))
    return LogLikelihood(log_prob, x_0.reshape(shape), counter.calls)


def _augmented(velocity: Velocity, divergence: Divergence, shape: torch.Size) -> Velocity:
    """The derivative of (x, integral of div v), both in one state (B, D + 1)."""

    def derivative(state: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = state[:, :-1].detach().reshape(shape).requires_grad_()
            v = velocity(x, t)
            # 0 * x makes the result depend on x for autograd, even where the velocity ignores x.
            trace = divergence(v + 0 * x, x)
        return torch.cat([v.detach().flatten(1), trace.detach()[:, None]], 1)

    return derivative


def bits_per_dim(
    model: Model,
    images: Tensor,
    y: Tensor | None = None,
    *,
    seed: int,
    first_index: int = 0,
    batch_size: int = 256,
    trace: str = "hutchinson",
    device: torch.device | str | None = None,
    sampling: Sampling | None = None,
) -> BitsPerDim:
    """Equation (10) for 8-bit images, dequantised with uniform noise.

    >>> images = torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8)
    >>> bits_per_dim(lambda x, t, y: -x, images, seed=0).bits.shape
    torch.Size([2])

    Args:
        model: model(x, t, y) -> (B, C, H, W).
        images: (N, C, H, W) uint8.
        y: labels (N,) or None.
        seed: dequantisation and probes of image i depend only on (seed, first_index + i).
        batch_size: images handled together.
        trace: "hutchinson" (one backward pass a call) or "exact" (C H W of them).
        device: where to compute; by default the device of the model's parameters.
        sampling: settings of the ODE; by default dopri5, linear path, velocity, no guidance.

    Raises:
        ValueError: for images that are not uint8, an unknown trace, a stochastic solver, or as
            `solve`.
    """
    sampling = sampling or Sampling(solver="dopri5")
    check_likelihood(images, trace, sampling)
    device = device if device is not None else device_of(model)
    bits, calls = torch.empty(len(images)), 0
    for first in range(0, len(images), batch_size):
        part = slice(first, min(first + batch_size, len(images)))
        levels = images[part].to(device).float()
        shape = tuple(levels.shape[1:])
        indices = range(first_index + part.start, first_index + part.stop)
        noise = ImageNoise(seed, indices, shape, device)
        x_1 = (levels + noise.uniform() - 0.5) / HALF_RANGE - 1
        probes = noise.signs() if trace == "hutchinson" else None
        labels = None if y is None else y[part].to(device)
        velocity = sampling.velocity(model, labels)
        log_prob, _, nfe = log_likelihood(
            velocity, x_1, probes=probes, **sampling.likelihood_arguments()
        )
        per_dim = log_prob / (math.log(2) * levels[0].numel())
        bits[part] = (math.log2(HALF_RANGE) - per_dim).cpu()
        calls += nfe * len(levels)
    return BitsPerDim(bits, calls / len(images))


def check_likelihood(images: Tensor, trace: str, sampling: Sampling) -> None:
    """Raise ValueError for images or settings whose likelihood cannot be computed."""
    if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(
            f"likelihood of images {tuple(images.shape)} {images.dtype}: need (N, C, H, W) uint8"
        )
    if trace not in TRACES:
        raise ValueError(f"trace={trace!r}: choose one of {', '.join(TRACES)}")
    if sampling.stochastic:
        raise ValueError(
            f"likelihood: solver={sampling.solver!r} is stochastic, choose an ODE solver"
        )
