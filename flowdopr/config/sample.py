"""Settings of sampling: solver, guidance and batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flowdopr.config.types import NAMED, Count, NotNegative, PathText, Positive, Section, Weights


class UniformGrid(Section):
    name: Literal["uniform"]
    """Equal steps."""


class EDMGrid(Section):
    name: Literal["edm"]
    """EDM's grid: noise levels equally spaced after the power 1 / rho."""
    rho: Positive = 7.0
    """Larger values put more steps near the data."""


class ShiftedGrid(Section):
    name: Literal["shifted"]
    """Equal steps, shifted towards the noise."""
    shift: Positive = 3.0
    """Strength of the shift; 1 is none."""


class ListGrid(Section):
    name: Literal["list"]
    """The times themselves; a bare list `[0, 0.5, 1]` is short for this."""
    times: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=2)]
    """Increasing times from 0 to 1."""

    @model_validator(mode="after")
    def _increasing(self) -> ListGrid:
        if self.times[0] != 0 or list(self.times) != sorted(set(self.times)):
            raise ValueError(
                f"sample.solver.grid.times is {list(self.times)}: give two or more increasing "
                "times from 0 (noise) to at most 1 (data)"
            )
        return self


class SteppedSection(Section):
    """Settings of every solver with fixed steps on a grid of times."""

    name: str
    steps: Count = 50
    """Steps of a rollout. A list of times sets this to the number of its intervals."""
    grid: Annotated[UniformGrid | EDMGrid | ShiftedGrid | ListGrid, NAMED] = UniformGrid(
        name="uniform"
    )

    @model_validator(mode="after")
    def _steps_fit_the_list(self) -> SteppedSection:
        if isinstance(self.grid, ListGrid) and self.steps != len(self.grid.times) - 1:
            raise ValueError(
                f"sample.solver.steps is {self.steps} but sample.solver.grid lists "
                f"{len(self.grid.times) - 1} intervals: set sample.solver.steps to that number"
            )
        return self


class OneStepSolver(SteppedSection):
    name: Literal["euler", "midpoint", "heun2", "heun3", "rk4"]
    """torchdiffeq's one-step methods."""


class ExplicitAdamsSolver(Section):
    name: Literal["explicit_adams"]
    """torchdiffeq's explicit Adams method, with equal steps."""
    steps: Count = 50
    """Steps of a rollout."""


class ImplicitAdamsSolver(Section):
    name: Literal["implicit_adams", "fixed_adams"]
    """torchdiffeq's implicit Adams methods, with equal steps."""
    steps: Count = 50
    """Steps of a rollout."""
    atol: Positive = 1e-5
    """Absolute tolerance of the corrector's iteration."""
    rtol: Positive = 1e-5
    """Relative tolerance of the corrector's iteration."""


class AdaptiveSolver(Section):
    name: Literal["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver"]
    """torchdiffeq's adaptive methods, which choose their own times."""
    atol: Positive = 1e-5
    """Absolute tolerance."""
    rtol: Positive = 1e-5
    """Relative tolerance."""


class SDESolver(SteppedSection):
    name: Literal["euler_maruyama", "sde_heun"]
    """Stochastic rollouts, for paths and couplings that have a score."""
    noise_scale: NotNegative = 1.0
    """w_t = 2 noise_scale sigma_t; 1 is SiT's default, 0 is the ODE."""
    last_step: Literal["tweedie", "mean"] = "tweedie"
    """The step to the image, without fresh noise. `tweedie`: the posterior mean. `mean`: a
    step of the drift, SiT's default."""
    last_step_size: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Length in time of the last step (SiT: 0.04). null: the last interval of the grid."""


class GuideConfig(Section):
    run: PathText
    """Folder of a run, worse than this one, or an exported file of its model, which takes the place
    of the unconditional branch."""
    weights: Weights = "ema"
    """Which weights of that run, as `evaluate.weights`."""
    step: Count | None = None
    """Checkpoint of that run. null: its newest."""


class GuidanceConfig(Section):
    scale: NotNegative
    """v_guide + scale (v_model - v_guide); 1 would be no guidance and is refused."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times between which there is guidance."""
    guide: GuideConfig | None = None
    """Autoguidance by the model of another run. null: classifier-free guidance."""

    @model_validator(mode="after")
    def _consistent(self) -> GuidanceConfig:
        if self.scale == 1:
            raise ValueError(
                "sample.guidance.scale is 1, which has no effect: set sample.guidance=null, or "
                "another scale"
            )
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"sample.guidance.interval is [{low:g}, {high:g}]: need 0 <= low < high <= 1"
            )
        return self


class SampleConfig(Section):
    solver: Annotated[
        OneStepSolver | ExplicitAdamsSolver | ImplicitAdamsSolver | AdaptiveSolver | SDESolver,
        NAMED,
    ] = OneStepSolver(name="midpoint")
    guidance: GuidanceConfig | None = None
    """Guidance of the rollouts. null: none."""
    batch_size: Count = 256
    """Images rolled out together, by one process. Image i does not depend on it with fixed steps;
    with adaptive solvers and implicit Adams, which choose steps for a batch, it does within `atol`
    and `rtol`."""
    num_images: Count = 64
    """Images in a training run's sample grids."""
