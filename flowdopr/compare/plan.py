"""From one study config to the list of its runs: every arm x learning rate x seed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from flowdopr.config import ArmConfig, CompareConfig, Config, ConfigError, apply_overrides

SET_BY_STUDY = {
    "name": "name",
    "output": "output",
    "seed": "compare.seeds",
    "optimizer.lr": "the lrs of compare.arms",
}
"""Settings that an arm must not set, and where the study takes them from."""


@dataclass(frozen=True)
class RunPlan:
    """One run of a study. `config` is complete: `flowdopr train` could run it too."""

    arm: str
    lr: float
    seed: int
    config: Config
    searched: Mapping[str, Any] = field(default_factory=dict)
    """The values of the arm's `grid` in this run."""
    nfe_steps: tuple[int, ...] = ()
    """Solver steps at which the last checkpoint is evaluated again."""
    nfe_solvers: tuple[str, ...] = ()
    """Solvers, beside the run's own, for which the same is done."""
    evaluation_seeds: tuple[int, ...] = ()
    """Evaluation seeds with which the last checkpoint is evaluated again."""
    tuning: bool = False
    """Whether the run chooses its arm's trial, and is not reported."""

    @property
    def trial(self) -> str:
        """What was tried, short enough for a folder: `lr0.001`, `lr0.001-damping0.1`."""
        values = {"lr": f"{self.lr:g}"} | {
            key.rpartition(".")[2]: value if isinstance(value, str) else json.dumps(value)
            for key, value in self.searched.items()
        }
        text = "-".join(f"{key}{value}" for key, value in values.items())
        return re.sub(r"[^A-Za-z0-9._-]+", "", text)

    @property
    def name(self) -> str:
        """For example `adamw-lr0.001-s0`; also the name of the run folder."""
        return self.path.name

    @property
    def path(self) -> Path:
        return Path(self.config.output) / self.config.name

    @property
    def log(self) -> Path:
        """The output of this run's process."""
        return self.path.parent / "logs" / f"{self.name}.log"

    @property
    def failure(self) -> Path:
        """Holds the reason if the run failed; deleted when the run is started again."""
        return self.log.with_suffix(".failed")

    @property
    def optimizer(self) -> str:
        """For example `adamw`, both with DoPr and without."""
        return self.config.optimizer.name

    @property
    def dopr(self) -> bool:
        """Whether DoPr preconditions the gradients by the layers' inputs."""
        return getattr(self.config.optimizer, "dopr", None) is not None

    @property
    def other_settings(self) -> str:
        """All settings outside `optimizer` and the seed, as JSON."""
        return self.config.model_dump_json(exclude={"name", "output", "seed", "optimizer"})


def study_settings(config: Config) -> CompareConfig:
    """The config's `compare` section.

    Raises:
        ConfigError: there is none.
    """
    if config.compare is None:
        raise ConfigError(f"{config.name}: no section 'compare'; list the arms under compare.arms")
    return config.compare


def study_path(config: Config) -> Path:
    return Path(config.output) / config.name


def expand(config: Config) -> list[RunPlan]:
    """All runs of the study, seed by seed, so that each arm has a result early.

    Where tuning seeds choose the trials, the runs of the seeds that are reported are among them,
    for every trial; `reported` selects it.

    Raises:
        ConfigError: no `compare` section, no FD among the metrics, an arm's overrides are wrong
            (the message names the arm), `nfe_steps` for a solver that ignores them, or two runs
            would share a folder.
    """
    study = study_settings(config)
    if "fd" not in config.evaluate.metrics:
        raise ConfigError("evaluate.metrics: a study compares by fd; add fd")
    bases = {arm.name: _arm_config(config, arm) for arm in study.arms}
    further = tuple(seed for seed in study.evaluation_seeds if seed != config.evaluate.seed)
    plans = [
        _run(
            bases[arm.name],
            arm,
            RunPlan(
                arm.name,
                lr,
                seed,
                bases[arm.name],
                dict(zip(arm.grid, values, strict=True)),
                study.nfe_steps,
                study.nfe_solvers,
                further,
                seed in study.tuning_seeds,
            ),
        )
        for seed in (*study.tuning_seeds, *study.seeds)
        for arm in study.arms
        for lr in arm.lrs
        for values in product(*arm.grid.values())
    ]
    names = [plan.name for plan in plans]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"compare.arms: two runs would share the folder '{twice[0]}'; remove one of the two "
            "trials, whose values agree in six digits or but for signs"
        )
    return plans


def reported(plans: Sequence[RunPlan], chosen: Mapping[str, str]) -> list[RunPlan]:
    """The runs that are reported: where tuning runs choose, those of each arm's `chosen` trial."""
    apart = any(plan.tuning for plan in plans)
    return [
        plan
        for plan in plans
        if not plan.tuning and (not apart or plan.trial == chosen.get(plan.arm))
    ]


def check_overrides(overrides: Iterable[str]) -> None:
    """Check that `overrides` of a study's config set nothing that the study sets in each run.

    Raises:
        ConfigError: one would do nothing.
    """
    for override in overrides:
        key = override.partition("=")[0]
        source = SET_BY_STUDY.get(key, key)
        if source != key:
            raise ConfigError(f"override '{override}': in a study it comes from {source}; set that")


def _arm_config(config: Config, arm: ArmConfig) -> Config:
    """The study's config with the arm's overrides, its section `compare` included."""
    for name, keys in (("set", arm.set), ("grid", arm.grid)):
        for key in keys:
            where = f"compare.arms '{arm.name}': {name} {key}"
            if key in SET_BY_STUDY:
                raise ConfigError(f"{where}: comes from {SET_BY_STUDY[key]}; remove it")
            if key.split(".")[0] in ("compare", "data", "evaluate"):
                raise ConfigError(
                    f"{where}: an arm must keep the study's compare, data and evaluate sections, "
                    "or its numbers could not be compared; remove it"
                )
    base = _apply(config, arm, [f"{key}={json.dumps(value)}" for key, value in arm.set.items()])
    solver = base.sample.solver
    listed = getattr(getattr(solver, "grid", None), "name", None) == "list"
    if study_settings(config).nfe_steps and (listed or not hasattr(solver, "steps")):
        what = f"sample.solver={solver.name}" + (" with a list of times" if listed else "")
        raise ConfigError(
            f"compare.nfe_steps: in arm '{arm.name}' {what} has its own times, so all entries "
            "would be the same sampling; set compare.nfe_steps=[] or a fixed-step solver with a "
            "named grid"
        )
    for name in study_settings(config).nfe_solvers:
        _apply(config, arm, [f"sample.solver={{name: {name}, steps: 1}}"])  # refuses what is none
        if name == solver.name:
            raise ConfigError(
                f"compare.nfe_solvers: {name} is the solver of arm '{arm.name}' already; remove it"
            )
    return base


def _run(base: Config, arm: ArmConfig, plan: RunPlan) -> RunPlan:
    """`plan` with the complete config of its run."""
    name = f"{base.name}/{arm.name}-{plan.trial}-s{plan.seed}"
    overrides = [f"name={json.dumps(name)}", f"seed={plan.seed}", f"optimizer.lr={plan.lr!r}"]
    overrides += [f"{key}={json.dumps(value)}" for key, value in plan.searched.items()]
    return replace(plan, config=_apply(base, arm, [*overrides, "compare=null"]))


def _apply(config: Config, arm: ArmConfig, overrides: list[str]) -> Config:
    try:
        return apply_overrides(config, overrides, "set")
    except ConfigError as error:
        raise ConfigError(f"compare.arms '{arm.name}': {error}") from None
