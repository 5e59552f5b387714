"""The weight averages of a run: which there are, where they lie, and lengths made of them.

Exponential, with a decay that lets early steps forget the random start:

    avg_k = b_k avg_(k-1) + (1 - b_k) w_k,   b_k = min(decay, (1 + k) / (10 + k))            (1)

Power-function (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion
Models", section 3.1): the weight of step tau is proportional to tau^gamma, so the average's length
grows with training and is named relative to it, by sigma_rel:

    b_k = (1 - 1/k)^(gamma + 1),   sigma_rel = (gamma + 1)^1/2 (gamma + 2)^-1 (gamma + 3)^-1/2   (2)

Snapshots of such averages span a space in which other lengths lie almost exactly (section 3.2) if
there are enough of them: `posthoc_coefficients` finds their coefficients by least squares between
the weights of tau, with sum 1 like those, and refuses where the fit is poor.

    checkpoints/step-00000500/power-0.1.safetensors     in a checkpoint
    averages/step-00000250/power-0.1.safetensors        left of a deleted checkpoint

Lengths made afterwards need averages from all over training, so a deleted checkpoint leaves its
power-function averages behind.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from flowdopr.config import Config, ConfigError

CHECKPOINTS, LEFT = "checkpoints", "averages"
DROPPED = ".dropped"
MAX_LENGTH = 0.28  # sigma_rel of gamma = 0 is 0.2887: no longer average increases with tau
# Error of a profile over its own size, both as root sums of squares over tau. Where the weights'
# noise is independent from step to step, it is the error of the made average over the noise left in
# the true one; where they walk randomly, about the error over the true one's distance from the
# newest weights. At a tenth of that, what is made is still plainly the length that was asked for.
MAX_ERROR = 0.1


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


def averages_of(config: Config) -> list[Average]:
    """The weight averages that `config.train` asks for; the first is sampled from."""
    settings = config.train
    averages = [Average(decay=decay) for decay in settings.ema_decays]
    averages += [Average(length=length) for length in settings.ema_lengths]
    names = [average.name for average in averages]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"train.ema_decays, train.ema_lengths: {twice[0]} is given twice")
    return averages


def steps_in(folder: Path) -> list[int]:
    """Steps of the folders `step-00000500` in `folder`, ascending."""
    names = (re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def folder_of(step: int) -> str:
    return f"step-{step:08d}"


def drop_checkpoints(run: Path, steps: Iterable[int]) -> None:
    """Delete the checkpoints of `steps`, but for their power-function averages.

    Each is renamed first, so that what bears a checkpoint's name stays whole; what a crash left
    half done is finished by the next call.
    """
    checkpoints = run / CHECKPOINTS
    for dropped in checkpoints.glob("*" + DROPPED):
        _finish(run, dropped)
    for step in steps:
        dropped = checkpoints / (folder_of(step) + DROPPED)
        os.replace(checkpoints / folder_of(step), dropped)
        _finish(run, dropped)


def _finish(run: Path, dropped: Path) -> None:
    kept = {path.name for path in dropped.glob("power-*.safetensors")}
    for path in dropped.iterdir():
        if path.name not in kept:
            path.unlink()
    if not kept:
        dropped.rmdir()
        return
    place = run / LEFT / dropped.name.removesuffix(DROPPED)
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(exist_ok=True)
    os.replace(dropped, place)


def posthoc_weights(run: Path, config: Config, step: int, weights: str) -> dict[str, Tensor]:
    """The weights "posthoc-LENGTH" at `step`, of all power-function averages up to it.

    Raises:
        ConfigError: the run keeps none, or they do not determine this length.
    """
    lengths = config.train.ema_lengths
    if not lengths:
        raise ConfigError(f"{run}: {weights} needs a run with train.ema_lengths")
    places = {
        t: run / place / folder_of(t)
        for place in (LEFT, CHECKPOINTS)
        for t in steps_in(run / place)
        if t <= step
    }
    snapshots = [(t, length) for t in sorted(places) for length in lengths]
    try:
        length = float(weights.removeprefix("posthoc-"))
        coefficients = posthoc_coefficients(snapshots, step, length)
    except ValueError as error:
        raise ConfigError(f"{run}: weights {weights}: {error}") from None
    files = (places[t] / f"{Average(length=kept).name}.safetensors" for t, kept in snapshots)
    return combine(map(load_file, files), coefficients.tolist())


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
    snapshots: Iterable[tuple[int, float]],
    step: int,
    length: float,
    *,
    max_error: float = MAX_ERROR,
) -> np.ndarray:
    """Coefficients (N,) with sum 1 that combine power-function snapshots into another length.

    >>> kept = [(step, length) for step in (250, 500, 750, 1000) for length in (0.05, 0.1)]
    >>> coefficients = posthoc_coefficients(kept, step=1000, length=0.08)
    >>> print(f"{coefficients.sum():.6f}, of the last two {coefficients[-2:].round(2)}")
    1.000000, of the last two [0.26 0.78]

    Args:
        snapshots: (step, length) of each stored average.
        step: the step at which the new average ends.
        length: its sigma_rel.
        max_error: the largest error of the profile over its own size, root sums of squares.

    Raises:
        ValueError: a length out of range, or the snapshots give its profile less exactly.
    """
    known = [(t / step, gamma_of(sigma)) for t, sigma in snapshots]
    target = (1.0, gamma_of(length))
    gram = np.array([[_overlap(a, b) for b in known] for a in known])
    wanted = np.array([_overlap(a, target) for a in known])
    ones = np.ones((len(known), 1))
    # Stationary where gram c + multiplier = wanted, under sum(c) = 1.
    system = np.block([[gram, ones], [ones.T, np.zeros((1, 1))]])
    found = np.linalg.lstsq(system, np.append(wanted, 1.0), rcond=None)[0][:-1]
    size = _overlap(target, target)
    square = found @ gram @ found - 2 * found @ wanted + size
    error = (max(square, 0.0) / size) ** 0.5
    if error > max_error:
        raise ValueError(
            f"{len(known)} stored average{'s' * (len(known) > 1)} up to step {step} give its "
            f"profile only to a relative error of {error:.2g}, more than {max_error:g}: choose a "
            "length nearer to theirs, or train with more checkpoints (train.checkpoint_every) and "
            "two or more train.ema_lengths around it"
        )
    return found


def _overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Integral over tau of the two averages' weights, (gamma + 1) tau^gamma / t^(gamma + 1)."""
    (t_a, gamma_a), (t_b, gamma_b) = a, b
    shorter = min(t_a, t_b)
    ratios = (shorter / t_a) ** gamma_a * (shorter / t_b) ** gamma_b * shorter / (t_a * t_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratios


def combine(
    parts: Iterable[Mapping[str, Tensor]], coefficients: Sequence[float]
) -> dict[str, Tensor]:
    """The weighted sum of state dicts, summed in float64; other entries come from the last one.

    >>> combine([{"w": torch.tensor([1.0])}, {"w": torch.tensor([5.0])}], [0.25, 0.75])
    {'w': tensor([4.])}
    """
    total: dict[str, Tensor] = {}
    last: Mapping[str, Tensor] = {}
    for last, coefficient in zip(parts, coefficients, strict=True):
        for name, value in last.items():
            if value.is_floating_point():
                total[name] = total.get(name, 0) + coefficient * value.double()
    return {name: total[name].to(v.dtype) if name in total else v for name, v in last.items()}
