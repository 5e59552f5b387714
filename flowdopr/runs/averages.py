"""Averages of the weights over training: their rules, and other lengths made of stored ones.

Exponential, with a decay that lets early steps forget the random start:

    avg_k = b_k avg_(k-1) + (1 - b_k) w_k,   b_k = min(decay, (1 + k) / (10 + k))            (1)

Power-function (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion
Models", section 3.1): the weight of step tau is proportional to tau^gamma, so the average's length
grows with training and is named relative to it, by sigma_rel:

    b_k = (1 - 1/k)^(gamma + 1),   sigma_rel = (gamma + 1)^1/2 (gamma + 2)^-1 (gamma + 3)^-1/2   (2)

Linear combinations of such averages, stored at several steps, come close to averages of other
lengths (section 3.2, "post-hoc EMA"). `posthoc_coefficients` finds the coefficients by least
squares between the averages' profiles, which are their weights as functions of tau.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor

from flowdopr.config import Config, ConfigError

OWN = "own"  # name of the average that an optimizer keeps itself
MAX_LENGTH = 0.28  # at gamma = 0, sigma_rel is 0.2887; beyond it, weights would fall with tau
# Largest accepted error of a post-hoc profile, relative to the profile's own root sum of squares.
# If the weights walk randomly from step to step, the error of the made average is about this
# fraction of the distance between the true average and the newest weights.
MAX_ERROR = 0.1


class Average:
    """One rule of averaging, by its decay (1) or its relative length (2).

    `name`, such as "ema-0.999" or "power-0.1", is also the name of its file in a checkpoint.
    """

    def __init__(self, *, decay: float | None = None, length: float | None = None):
        if (decay is None) == (length is None):
            raise ValueError("an average has either a decay or a length")
        self.decay = decay
        self.gamma = 0.0 if length is None else gamma_of(length)
        self.name = f"ema-{decay}" if length is None else f"power-{length}"

    def keep(self, step: int) -> float:
        """b_k of (1) or (2), the factor on the old average after optimizer step k = `step` >= 1."""
        if self.decay is not None:
            return min(self.decay, (1 + step) / (10 + step))
        return (1 - 1 / step) ** (self.gamma + 1)


def averages_of(config: Config) -> list[Average]:
    """The weight averages of `config.train`; samples are drawn with the first.

    Raises:
        ConfigError: an average is given twice.
    """
    settings = config.train
    averages = [Average(decay=decay) for decay in settings.ema_decays]
    averages += [Average(length=length) for length in settings.ema_lengths]
    names = [average.name for average in averages]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"train.ema_decays, train.ema_lengths: {twice[0]} is given twice")
    return averages


def average_names(config: Config) -> list[str]:
    """The names of the averages in a checkpoint, the one that is sampled from first."""
    return [average.name for average in averages_of(config)] or [OWN]


def file_of(config: Config, weights: str) -> str:
    """The name, without its ending, of the file that has these weights in a checkpoint.

    Raises:
        ConfigError: a run of `config` has no such weights, or combines them of several files.
    """
    names = average_names(config)
    files = {"raw": "model", "ema": names[0], **{name: name for name in names}}
    if weights not in files:
        raise ConfigError(
            f"no weights '{weights}'; there are: {', '.join(files)}"
            + (", posthoc-LENGTH" if config.train.ema_lengths else "")
        )
    return files[weights]


def gamma_of(length: float) -> float:
    """The exponent gamma of the power-function average of relative length `length`, from (2).

    Raises:
        ValueError: unless 0 < length <= 0.28.
    """
    if not 0 < length <= MAX_LENGTH:
        raise ValueError(f"power-function length {length}: must be above 0, at most {MAX_LENGTH}")
    # (gamma + 2)^2 (gamma + 3) length^2 = gamma + 1 as a cubic; its largest root is gamma.
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(roots.real.max())


def posthoc_coefficients(
    snapshots: Iterable[tuple[int, float]],
    step: int,
    length: float,
    *,
    max_error: float = MAX_ERROR,
) -> np.ndarray:
    """Coefficients (N,) of stored power-function averages that sum to an average of another length.

    The coefficients sum to 1, as the weights of any average do.

    >>> kept = [(step, length) for step in (250, 500, 750, 1000) for length in (0.05, 0.1)]
    >>> coefficients = posthoc_coefficients(kept, step=1000, length=0.08)
    >>> print(f"{coefficients.sum():.6f}, of the last two {coefficients[-2:].round(2)}")
    1.000000, of the last two [0.26 0.78]

    Args:
        snapshots: (step, length) of each stored average.
        step: the step at which the new average ends.
        length: sigma_rel of the new average.
        max_error: the largest accepted error of the profile, relative to its root sum of squares.

    Raises:
        ValueError: a length out of range, or an error above `max_error`.
    """
    known = [(t / step, gamma_of(sigma)) for t, sigma in snapshots]
    target = (1.0, gamma_of(length))
    gram = np.array([[_overlap(a, b) for b in known] for a in known])
    wanted = np.array([_overlap(a, target) for a in known])
    ones = np.ones((len(known), 1))
    # The least squares under sum(c) = 1, with a Lagrange multiplier as the last unknown.
    system = np.block([[gram, ones], [ones.T, np.zeros((1, 1))]])
    found = np.linalg.lstsq(system, np.append(wanted, 1.0), rcond=None)[0][:-1]
    norm = _overlap(target, target)
    square = found @ gram @ found - 2 * found @ wanted + norm
    error = (max(square, 0.0) / norm) ** 0.5
    if error > max_error:
        raise ValueError(
            f"{len(known)} stored average{'s' * (len(known) > 1)} up to step {step} give "
            f"length {length:g} only with a relative error of {error:.2g}, more than "
            f"{max_error:g}: choose a length nearer to theirs, or train with more checkpoints "
            "(train.checkpoint_every) and two or more train.ema_lengths around it"
        )
    return found


def _overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Integral over tau of the product of two profiles, each given by its end t and its gamma.

    A profile is (gamma + 1) tau^gamma / t^(gamma + 1) up to t, and 0 after it.
    """
    (t_a, gamma_a), (t_b, gamma_b) = a, b
    end = min(t_a, t_b)
    ratios = (end / t_a) ** gamma_a * (end / t_b) ** gamma_b * end / (t_a * t_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratios


def combine(
    state_dicts: Iterable[Mapping[str, Tensor]], coefficients: Sequence[float]
) -> dict[str, Tensor]:
    """The weighted sum of state dicts, summed in float64.

    Entries that are not floating-point are taken from the last one.

    >>> import torch
    >>> combine([{"w": torch.tensor([1.0])}, {"w": torch.tensor([5.0])}], [0.25, 0.75])
    {'w': tensor([4.])}
    """
    total: dict[str, Tensor] = {}
    last: Mapping[str, Tensor] = {}
    for last, coefficient in zip(state_dicts, coefficients, strict=True):
        for name, value in last.items():
            if value.is_floating_point():
                total[name] = total.get(name, 0) + coefficient * value.double()
    return {name: total[name].to(v.dtype) if name in total else v for name, v in last.items()}
