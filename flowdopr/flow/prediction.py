"""Predictions of velocity, data or noise: conversions between them, and published loss weightings.

A model's output may be the velocity, the data x_1 or the noise x_0. Given x_t, each determines the
other two, by equations (1) and (2) of path.py:

    x_1 = (sigma_t v - sigma_t' x_t) / D_t        x_0 = (alpha_t' x_t - alpha_t v) / D_t      (3)
    x_0 = (x_t - alpha_t x_1) / sigma_t           x_1 = (x_t - sigma_t x_0) / alpha_t         (4)
    v   = alpha_t' x_1 + sigma_t' x_0             D_t = alpha_t' sigma_t - alpha_t sigma_t'   (5)

The errors of one model in the three spaces are therefore proportional at fixed t:

    e_v = (D_t / sigma_t) e_data = -(D_t / alpha_t) e_noise                                   (6)

(4) divides by sigma_t, which is zero at t = 1, or by alpha_t, which is zero at t = 0. To stay
finite, conversions from data replace later times by that of the noise level SAFE_LEVEL, and
conversions from noise replace earlier times by SAFE_TIME; at all other times they are exact. The
velocity of the polynomial path is zero at t = 0 and determines nothing there, so it is treated like
noise.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flowdopr.flow.path import SAFE_LEVEL, Coefficients, Path

SAFE_TIME = 1e-3  # distance from the ends of time, as in SiT's sampling interval
# Conversion to the velocity divides a model's errors by the distance to the singular end. Rollouts
# therefore end at this noise level (data), or start at its inverse (noise).
ROLLOUT_LEVEL = 0.01


def rollout_span(path: Path, prediction: str, level: float = ROLLOUT_LEVEL) -> tuple[float, float]:
    """Times (start, end) between which rollouts evaluate a model with this prediction.

    They are 0 and 1 with two exceptions. Predictions of the noise start at the noise level
    1 / `level`. Predictions of the data, and paths whose sigma_t' diverges, end at `level`.

    >>> from flowdopr.flow import LinearPath
    >>> [round(t, 3) for t in rollout_span(LinearPath(), "data")]
    [0.0, 0.99]
    """
    start = float(path.time_at(1 / level)) if prediction == "noise" else 0.0
    ends_early = prediction == "data" or path.end < 1
    return start, min(float(path.time_at(level)), path.end) if ends_early else 1.0


def _times(t: Tensor, path: Path, source: str) -> Tensor:
    """`t` limited to the times at which a prediction of kind `source` determines the other two."""
    if source == "data":
        return t.clamp(max=float(path.time_at(SAFE_LEVEL)))
    start = SAFE_TIME if source == "noise" or path.still_at_start else 0.0
    return t.clamp(min=start)


def _ends(output: Tensor, x_t: Tensor, c: Coefficients, source: str) -> tuple[Tensor, Tensor]:
    """The pair (x_0, x_1) that `output` implies: equations (3) and (4)."""
    if source == "velocity":
        d = c.determinant
        return (c.d_alpha * x_t - c.alpha * output) / d, (c.sigma * output - c.d_sigma * x_t) / d
    if source == "data":
        return (x_t - c.alpha * output) / c.sigma, output
    return output, (x_t - c.sigma * output) / c.alpha


PREDICTIONS = ("velocity", "data", "noise")


def check_prediction(prediction: str) -> str:
    """`prediction` itself, or ValueError naming the choices."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction={prediction!r}: choose one of {', '.join(PREDICTIONS)}")
    return prediction


def convert(output: Tensor, x_t: Tensor, t: Tensor, path: Path, source: str, target: str) -> Tensor:
    """A prediction of kind `source` as one of kind `target`, both (B, ...) like `x_t`.

    >>> from flowdopr.flow import LinearPath
    >>> x_t, t = torch.randn(8, 1, 4, 4), torch.rand(8)
    >>> noise = convert(torch.randn_like(x_t), x_t, t, LinearPath(), "velocity", "noise")

    Args:
        output: the model's output at (`x_t`, `t`).
        t: times in [0, 1], a scalar or (B,).
        source, target: one of "velocity", "data", "noise".

    Raises:
        ValueError: for an unknown kind.
    """
    for kind in (source, target):
        check_prediction(kind)
    if source == target:
        return output
    c = path.at(_times(t, path, source), x_t)
    x_0, x_1 = _ends(output, x_t, c, source)
    if target == "velocity":
        return c.d_alpha * x_1 + c.d_sigma * x_0
    return x_1 if target == "data" else x_0


def _uniform(c: Coefficients, prediction: str, sigma_data: float) -> Tensor:
    """Weight 1: flow matching for the velocity, DDPM's "simple" loss for the noise."""
    return torch.ones_like(c.alpha)


def _velocity(c: Coefficients, prediction: str, sigma_data: float) -> Tensor:
    """The squared error of the velocity, whatever is predicted: SiT's "velocity" weight.

    For data it is the v-loss of JiT (Li & He 2025), except that JiT divides by max(1 - t, 0.05) and
    here the weight grows until SAFE_TIME before the end.
    """
    return _per_output(c, prediction, c.determinant) ** 2


def _likelihood(c: Coefficients, prediction: str, sigma_data: float) -> Tensor:
    """SiT's "likelihood" weight: D_t / (alpha_t sigma_t) on the noise's squared error."""
    on_noise = c.determinant / c.alpha / c.sigma
    return on_noise * _per_output(c, prediction, c.alpha) ** 2


def _edm(c: Coefficients, prediction: str, sigma_data: float) -> Tensor:
    """EDM's lambda (Karras et al. 2022, table 1) on the squared error of the data.

    With the noise level s = sigma_t / alpha_t it is (s^2 + sigma_data^2) / (s sigma_data)^2.
    """
    on_data = sigma_data**-2 + (c.alpha / c.sigma) ** 2
    return on_data * _per_output(c, prediction, c.sigma) ** 2


def _per_output(c: Coefficients, prediction: str, space: Tensor) -> Tensor:
    """|e_space / e_output| by (6), where e_v, e_data, e_noise are proportional to D_t, sigma_t,
    alpha_t. The ratio is taken before squaring because the squares alone may not fit in float32."""
    return space / {"velocity": c.determinant, "data": c.sigma, "noise": c.alpha}[prediction]


WEIGHTINGS: dict[str, Callable[[Coefficients, str, float], Tensor]] = {
    "uniform": _uniform,
    "velocity": _velocity,
    "likelihood": _likelihood,
    "edm": _edm,
}


def loss_weight(
    weighting: str, t: Tensor, path: Path, prediction: str = "velocity", sigma_data: float = 0.5
) -> Tensor:
    """The factor (B,) on the squared error of a prediction at times `t` (B,).

    Most weights diverge at t = 0 or 1, so times are limited to [SAFE_TIME, 1 - SAFE_TIME].

    >>> from flowdopr.flow import LinearPath
    >>> loss_weight("velocity", torch.tensor([0.5]), LinearPath(), "data")
    tensor([4.])

    Args:
        weighting: "uniform", "velocity", "likelihood" (SiT) or "edm" (Karras et al. 2022).
        sigma_data: standard deviation of the data, used only by "edm".

    Raises:
        ValueError: for an unknown weighting or prediction.
    """
    check_prediction(prediction)
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting={weighting!r}: choose one of {', '.join(WEIGHTINGS)}")
    t = t.clamp(SAFE_TIME, 1 - SAFE_TIME)
    return WEIGHTINGS[weighting](path(t), prediction, sigma_data)
