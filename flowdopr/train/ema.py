"""Averages of the weights over training: exponential, power-function, and lengths made afterwards.

Exponential, with a decay that lets early steps forget the random start:

    avg_k = b_k avg_(k-1) + (1 - b_k) w_k,   b_k = min(decay, (1 + k) / (10 + k))            (1)

Power-function (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion
Models", section 3.1): the weight of step tau is proportional to tau^gamma, so the average's length
grows with training and is named relative to it, by sigma_rel:

    b_k = (1 - 1/k)^(gamma + 1),   sigma_rel = (gamma + 1)^1/2 (gamma + 2)^-1 (gamma + 3)^-1/2   (2)

Snapshots of such averages span a space in which other lengths lie almost exactly (section 3.2):
`reconstruct` finds their coefficients by least squares between the weights of tau.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

MAX_LENGTH = 0.28  # sigma_rel of gamma = 0 is 0.2887: no longer average increases with tau


class Average:
    """One rule of averaging; `name` is also the file's: `ema-0.999` or `power-0.1`."""

    def __init__(self, *, decay: float | None = None, length: float | None = None):
        if (decay is None) == (length is None):
            raise ValueError("an average has either a decay or a length")
        self.decay = decay
        self.gamma = 0.0 if length is None else gamma_of(length)
        self.name = f"ema-{decay}" if length is None else f"power-{length}"

    def keep(self, step: int) -> float:
        """b_k of (1) or (2): the share of the old average after optimizer step k = `step` >= 1."""
        if self.decay is not None:
            return min(self.decay, (1 + step) / (10 + step))
        return (1 - 1 / step) ** (self.gamma + 1)


class EMA:
    """Running averages of a model's floating-point weights and buffers, one for each rule;
    other buffers are the newest.

    ema = EMA(model, [Average(decay=0.999), Average(length=0.1)])
    ema.update(step)          # after each optimizer step, from 1
    with ema.applied(model):  # the model computes with the first average in here
        ...
    """

    def __init__(self, model: nn.Module, averages: Sequence[Average]):
        self.averages = list(averages)
        self.live = {name: value.detach() for name, value in model.state_dict().items()}
        self.values = {
            average.name: {name: value.clone() for name, value in self.live.items()}
            for average in self.averages
        }
        self._moving = [name for name, value in self.live.items() if value.is_floating_point()]
        self._others = [name for name in self.live if name not in set(self._moving)]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step number `step` (from 1)."""
        live = [self.live[name] for name in self._moving]
        for average in self.averages:
            values = self.values[average.name]
            for name in self._others:
                values[name].copy_(self.live[name])
            moving = [values[name] for name in self._moving]
            torch._foreach_lerp_(moving, live, 1.0 - average.keep(step))

    def load(self, name: str, values: Mapping[str, Tensor]) -> None:
        """Take over the average called `name`, in place."""
        for key, value in values.items():
            self.values[name][key].copy_(value)

    @contextmanager
    @torch.no_grad()
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """`model` with the first average inside the block and its own weights again after it."""
        own = {name: value.clone() for name, value in self.live.items()}
        average = self.values[self.averages[0].name]
        try:
            for name, value in self.live.items():
                value.copy_(average[name])
            yield model
        finally:
            for name, value in self.live.items():
                value.copy_(own[name])


def gamma_of(length: float) -> float:
    """The exponent of the power-function average of relative length `length`: (2), solved.

    Raises:
        ValueError: unless 0 < length <= 0.28.
    """
    if not 0 < length <= MAX_LENGTH:
        raise ValueError(f"power-function length {length}: must be above 0, at most {MAX_LENGTH}")
    # (gamma + 2)^2 (gamma + 3) length^2 = gamma + 1 as a cubic; its largest root is gamma.
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(roots.real.max())


def posthoc_coefficients(
    snapshots: Iterable[tuple[int, float]], step: int, length: float
) -> np.ndarray:
    """Coefficients (N,) that combine power-function snapshots into another length.

    Args:
        snapshots: (step, length) of each stored average.
        step: the step at which the new average ends.
        length: its sigma_rel.
    """
    known = [(t, gamma_of(sigma)) for t, sigma in snapshots]
    gram = np.array([[_overlap(a, b) for b in known] for a in known])
    wanted = np.array([_overlap(a, (step, gamma_of(length))) for a in known])
    return np.linalg.lstsq(gram, wanted, rcond=None)[0]


def _overlap(a: tuple[int, float], b: tuple[int, float]) -> float:
    """Integral over tau of the two averages' weights, (gamma + 1) tau^gamma / t^(gamma + 1)."""
    (t_a, gamma_a), (t_b, gamma_b) = a, b
    shorter = min(t_a, t_b)
    ratios = (shorter / t_a) ** gamma_a * (shorter / t_b) ** gamma_b * shorter / (t_a * t_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratios


def combine(
    parts: Iterable[Mapping[str, Tensor]], coefficients: Sequence[float]
) -> dict[str, Tensor]:
    """The weighted sum of state dicts, summed in float64; other entries come from the last one."""
    total: dict[str, Tensor] = {}
    last: Mapping[str, Tensor] = {}
    for last, coefficient in zip(parts, coefficients, strict=True):
        for name, value in last.items():
            if value.is_floating_point():
                total[name] = total.get(name, 0) + coefficient * value.double()
    return {name: total[name].to(v.dtype) if name in total else v for name, v in last.items()}
