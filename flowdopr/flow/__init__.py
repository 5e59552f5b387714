"""The mathematics of flow matching: paths, objectives, solvers, guidance, likelihood."""

from flowdopr.flow.build import (
    build_coupling,
    build_objective,
    build_path,
    build_sampling,
    build_time_sampler,
)
from flowdopr.flow.coupling import COUPLINGS, Coupling, make_coupling
from flowdopr.flow.drift import energy_distance, rollout_drift
from flowdopr.flow.guidance import ModelVelocity, guided_velocity
from flowdopr.flow.likelihood import BitsPerDim, LogLikelihood, bits_per_dim, log_likelihood
from flowdopr.flow.noise import image_generator
from flowdopr.flow.objective import Draw, FlowMatching
from flowdopr.flow.one_step import ONE_STEP_BATCH, OneStepLoss, one_step_loss
from flowdopr.flow.oracle import EmpiricalVelocity, ExcessError, excess_error, rollout_excess
from flowdopr.flow.path import (
    PATHS,
    CosinePath,
    LinearPath,
    Path,
    PolynomialPath,
    TrigonometricPath,
    VariancePreservingPath,
)
from flowdopr.flow.prediction import PREDICTIONS, WEIGHTINGS, convert, loss_weight, rollout_span
from flowdopr.flow.sampler import SOLVERS, Samples, Sampling, generate
from flowdopr.flow.sde import SDE_SOLVERS, solve_sde
from flowdopr.flow.solver import (
    ADAPTIVE_SOLVERS,
    BATCH_DEPENDENT_SOLVERS,
    ODE_SOLVERS,
    Rollout,
    solve,
)
from flowdopr.flow.time import TimeSampler, shift_time, time_grid
from flowdopr.flow.trajectory import Trajectory, trajectory

__all__ = [
    "ADAPTIVE_SOLVERS",
    "BATCH_DEPENDENT_SOLVERS",
    "COUPLINGS",
    "ODE_SOLVERS",
    "ONE_STEP_BATCH",
    "PATHS",
    "PREDICTIONS",
    "SDE_SOLVERS",
    "SOLVERS",
    "WEIGHTINGS",
    "BitsPerDim",
    "CosinePath",
    "Coupling",
    "Draw",
    "EmpiricalVelocity",
    "ExcessError",
    "FlowMatching",
    "LinearPath",
    "LogLikelihood",
    "ModelVelocity",
    "OneStepLoss",
    "Path",
    "PolynomialPath",
    "Rollout",
    "Samples",
    "Sampling",
    "TimeSampler",
    "Trajectory",
    "TrigonometricPath",
    "VariancePreservingPath",
    "bits_per_dim",
    "build_coupling",
    "build_objective",
    "build_path",
    "build_sampling",
    "build_time_sampler",
    "convert",
    "energy_distance",
    "excess_error",
    "generate",
    "guided_velocity",
    "image_generator",
    "log_likelihood",
    "loss_weight",
    "make_coupling",
    "one_step_loss",
    "rollout_drift",
    "rollout_excess",
    "rollout_span",
    "shift_time",
    "solve",
    "solve_sde",
    "time_grid",
    "trajectory",
]
