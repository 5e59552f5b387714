"""Settings of the flow: path, prediction, loss weight, training times and coupling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from flowdopr.config.types import NAMED, Count, Fraction, Positive, Section


class PlainPath(Section):
    name: Literal["linear", "trigonometric"]
    """Path from noise x_0 to data x_1: (1 - t) x_0 + t x_1, or sine and cosine of pi t / 2."""


class VariancePreservingPath(Section):
    name: Literal["variance_preserving"]
    """Path of the variance-preserving diffusion with noise rates from beta_min to beta_max."""
    beta_min: Positive = 0.1
    """Noise rate at the data."""
    beta_max: Positive = 20.0
    """Noise rate at the noise."""


class CosinePath(Section):
    name: Literal["cosine"]
    """Path of the cosine noise schedule."""
    offset: Annotated[float, Field(gt=0, le=1)] = 0.008
    """Offset of the schedule; larger values leave more noise near the data."""


class PolynomialPath(Section):
    name: Literal["polynomial"]
    """Path with alpha = t^power and sigma = 1 - t^power."""
    power: Annotated[float, Field(ge=1, le=8)] = 2.0
    """Power of t; 1 is the linear path."""


class PlainWeighting(Section):
    name: Literal["uniform", "velocity", "likelihood"]
    """Weight of the squared error over time: `uniform` in the predicted quantity, `velocity` and
    `likelihood` as in SiT."""


class EDMWeighting(Section):
    name: Literal["edm"]
    """Weight of the squared error over time as in EDM."""
    sigma_data: Positive = 0.5
    """Standard deviation of the data."""


class TimeSection(Section):
    """Settings of every distribution of training times."""

    name: str
    shift: Positive = 1.0
    """Resolution shift towards the noise; 1 is none."""
    stratified: bool = True
    """Draw one time in each of B equally likely bins for a global batch of B images."""


class PlainTime(TimeSection):
    name: Literal["uniform", "edm"]
    """Training times: uniform, or EDM's noise levels."""


class LogitNormalTime(TimeSection):
    name: Literal["logit_normal"]
    """Training times: logit-normal, as in Stable Diffusion 3."""
    mean: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """Mean of the normal distribution; positive leans towards the data."""
    std: Positive = 1.0
    """Standard deviation of the normal distribution."""


class PlainCoupling(Section):
    name: Literal["independent", "exact"]
    """Which noise goes with which image of a micro-batch: as drawn, or by optimal transport
    (scipy's), within classes where the model has them."""


class EntropicCoupling(Section):
    name: Literal["entropic"]
    """Optimal transport with entropy, by Sinkhorn's iteration, within classes where the model has
    them."""
    regularisation: Positive = 0.05
    """Strength of the entropy, in units of the mean squared distance."""
    iterations: Count = 100
    """Passes over rows and columns."""


class FlowConfig(Section):
    path: Annotated[PlainPath | VariancePreservingPath | CosinePath | PolynomialPath, NAMED] = (
        PlainPath(name="linear")
    )
    prediction: Literal["velocity", "data", "noise"] = "velocity"
    """What the model predicts; rollouts convert it to the velocity exactly."""
    weighting: Annotated[PlainWeighting | EDMWeighting, NAMED] = PlainWeighting(name="uniform")
    time: Annotated[PlainTime | LogitNormalTime, NAMED] = PlainTime(name="uniform")
    coupling: Annotated[PlainCoupling | EntropicCoupling, NAMED] = PlainCoupling(name="independent")
    class_dropout_prob: Fraction = 0.1
    """Probability that the null label replaces the label of a training image."""
