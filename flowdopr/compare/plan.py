"""From one study config to the list of its runs: every arm x trial x seed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from flowdopr.config import (
    ArmConfig,
    CompareConfig,
    Config,
    ConfigError,
    apply_overrides,
    with_damping_in_steps,
)
from flowdopr.config.yaml12 import parse_yaml
from flowdopr.runs import file_of
from flowdopr.runs.same import flat

SET_BY_STUDY = {"seed": "compare.seeds", "optimizer.lr": "the lrs of compare.arms"}
"""Settings of each run that nothing else may set, and where the study takes them from."""


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
    weights: tuple[str, ...] = ()
    """Weight averages with which every checkpoint is evaluated, beside the study's own."""
    tuning: bool = False
    """Whether the run chooses its arm's trial, and is not reported."""
    shorter: bool = False
    """Whether this is the run of the same name without `-steps...` with fewer steps."""

    @property
    def trial(self) -> str:
        """What was tried, short enough for a folder: `lr0.001`, `lr0.001-damping0.1`."""
        words = [key.rpartition(".")[2] for key in self.searched]
        names = [
            key if words.count(word) > 1 else word
            for key, word in zip(self.searched, words, strict=True)
        ]
        values = map(_in_a_name, self.searched.values())
        text = "".join([f"lr{self.lr:g}", *map("-{}{}".format, names, values)])
        return re.sub(r"[^A-Za-z0-9._-]+", "", text)

    @property
    def name(self) -> str:
        """For example `adamw-lr0.001-s0`; also the name of the run folder."""
        return self.path.name

    @property
    def starts_from(self) -> str | None:
        """The name of the longer run with which it shares its steps before the cooldown."""
        shares = self.shorter and self.config.train.lr_decay == "cooldown"
        return _run_name(replace(self, shorter=False)) if shares else None

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
        """For example `adamw` or `schedulefree.AdamWScheduleFree`, with DoPr and without."""
        return getattr(self.config.optimizer, "class_path", self.config.optimizer.name)

    @property
    def dopr(self) -> bool:
        """Whether DoPr preconditions the gradients by the layers' inputs."""
        return getattr(self.config.optimizer, "dopr", None) is not None

    @property
    def other_settings(self) -> str:
        """All settings outside `optimizer` and the seed, as JSON."""
        return self.config.model_dump_json(exclude={"name", "output", "seed", "optimizer"})


def _in_a_name(value: Any) -> str:
    """For example `0.1`, or `100-1-0.5` for a list."""
    if isinstance(value, list | tuple):
        return "-".join(map(_in_a_name, value))
    return value if isinstance(value, str) else json.dumps(value)


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
    """The runs that choose each arm's trial, seed by seed, so that each arm has a result early.

    They are those of the tuning seeds. Without any, they are those of the seeds that are reported.

    Raises:
        ConfigError: no `compare` section, no FD among the metrics, an arm's overrides are wrong
            (the message names the arm), `nfe_steps` for a solver that ignores them, lengths that
            cannot share checkpoints, weights that an arm's runs do not have, or two runs would
            share a folder.
    """
    study = study_settings(config)
    if "fd" not in config.evaluate.metrics:
        raise ConfigError("evaluate.metrics: a study compares by fd; add fd")
    bases = {arm.name: _arm_config(config, arm) for arm in study.arms}
    further = tuple(seed for seed in study.evaluation_seeds if seed != config.evaluate.seed)
    plans = [
        variant(
            RunPlan(
                arm.name,
                lr,
                seed,
                bases[arm.name],
                dict(zip(arm.grid, values, strict=True)),
                study.nfe_steps,
                study.nfe_solvers,
                further,
                study.weights,
                bool(study.tuning_seeds),
            ),
            study=config.name,
        )
        for seed in study.tuning_seeds or study.seeds
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
    for plan in plans:
        _check_lengths(plan, config)
        _check_weights(plan)
    return plans


def reported(config: Config, chosen: Iterable[RunPlan]) -> list[RunPlan]:
    """The runs that are reported, for a run of each arm's chosen trial."""
    study, chosen = study_settings(config), list(chosen)
    long = [
        variant(plan, seed=seed, tuning=False, study=config.name)
        for seed in study.seeds
        for plan in chosen
    ]
    return [
        plan
        for one in long
        for plan in (
            one,
            *(variant(one, steps=steps, study=config.name) for steps in study.train_steps),
        )
    ]


def variant(plan: RunPlan, *, study: str, steps: int | None = None, **changes: Any) -> RunPlan:
    """`plan` with other values of its fields, and the complete config of that run.

    Args:
        study: the study's name.
        steps: of training, if they are fewer than the arm's.
    """
    plan = replace(plan, shorter=plan.shorter or steps is not None, **changes)
    overrides = [f"seed={plan.seed}", f"optimizer.lr={plan.lr!r}", "compare=null"]
    overrides += [f"{key}={json.dumps(value)}" for key, value in plan.searched.items()]
    name = f"{study}/{_run_name(plan)}" + ("" if steps is None else f"-steps{steps}")
    config = _apply(plan.config, plan.arm, [f"name={json.dumps(name)}", *overrides])
    if plan.starts_from:  # it has the longer run's steps, and so its schedule of the damping
        config = with_damping_in_steps(config)
    if steps is not None:
        config = _apply(config, plan.arm, [f"train.steps={steps}"])
    return replace(plan, config=config)


def _run_name(plan: RunPlan) -> str:
    return f"{plan.arm}-{plan.trial}-s{plan.seed}"


def _check_weights(plan: RunPlan) -> None:
    """Check that checkpoints of this run have all weights that are evaluated, each under one name.

    Raises:
        ConfigError: they lack some, or two names are of the same weights.
    """
    config = plan.config
    found: dict[str, str] = {}
    for weights in (config.evaluate.weights, *plan.weights):
        posthoc = weights.startswith("posthoc-") and config.train.ema_lengths
        try:
            file = weights if posthoc else file_of(config, weights)
        except ConfigError as error:
            raise ConfigError(
                f"compare.weights, evaluate.weights: in arm '{plan.arm}' {error}; choose among "
                "these, or add an average to train.ema_decays"
            ) from None
        if file in found:
            raise ConfigError(
                f"compare.weights: in arm '{plan.arm}' {weights} and {found[file]} are the same "
                "weights, and evaluate.weights counts, too; remove one"
            )
        found[file] = weights


def _check_lengths(plan: RunPlan, config: Config) -> None:
    """Check that the shorter runs of `compare.train_steps` can be made of this run.

    Raises:
        ConfigError: they are not shorter, too short for the warm-up, or there is no checkpoint
            where they begin to cool down.
    """
    train = plan.config.train
    for steps in study_settings(config).train_steps:
        where = f"compare.train_steps: in arm '{plan.arm}' {steps}"
        if steps >= train.steps:
            raise ConfigError(
                f"{where} is not less than train.steps {train.steps}, which the longest run has; "
                "remove it, or raise train.steps"
            )
        variant(plan, steps=steps, study=config.name)
        if train.cooldown_steps is None:
            continue
        every, start = train.checkpoint_every, steps - train.cooldown_steps
        if train.keep_checkpoints is not None or every is None or start <= 0 or start % every:
            raise ConfigError(
                f"{where} begins to cool down at step {start}, where the longest run must keep a "
                f"checkpoint: set train.keep_checkpoints=null and train.checkpoint_every to a "
                "divisor of that"
            )


def check_overrides(overrides: Iterable[str]) -> None:
    """Check that `overrides` of a study's config set nothing that the study sets in each run.

    Raises:
        ConfigError: one would do nothing.
    """
    for override in overrides:
        key, _, text = override.partition("=")
        for setting in flat({key: parse_yaml(text)}).keys() & SET_BY_STUDY.keys():
            raise ConfigError(
                f"override '{override}': in a study {setting} comes from {SET_BY_STUDY[setting]}; "
                "set that"
            )


def _arm_config(config: Config, arm: ArmConfig) -> Config:
    """The study's config with the arm's overrides, its section `compare` included."""
    values = [("set", key, value) for key, value in arm.set.items()]
    values += [("grid", key, value) for key, several in arm.grid.items() for value in several]
    for name, whole, value in values:
        for key in (whole, *flat({whole: value})):  # the value may be a section
            where = f"compare.arms '{arm.name}': {name} {key}"
            if key in SET_BY_STUDY:
                raise ConfigError(f"{where}: comes from {SET_BY_STUDY[key]}; remove it")
            if key in ("name", "output"):
                raise ConfigError(f"{where}: the study names its runs and their folder; remove it")
            if key.split(".")[0] in ("compare", "data", "evaluate"):
                raise ConfigError(
                    f"{where}: an arm must keep the study's compare, data and evaluate sections, "
                    "or its numbers could not be compared; remove it"
                )
    overrides = [f"{key}={json.dumps(value)}" for key, value in arm.set.items()]
    base = _apply(config, arm.name, overrides)
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
        # Refuses a name that is no solver of fixed steps.
        _apply(config, arm.name, [f"sample.solver={{name: {name}, steps: 1}}"])
        if name == solver.name:
            raise ConfigError(
                f"compare.nfe_solvers: {name} is the solver of arm '{arm.name}' already; remove it"
            )
    return base


def _apply(config: Config, arm: str, overrides: list[str]) -> Config:
    try:
        return apply_overrides(config, overrides, "set")
    except ConfigError as error:
        raise ConfigError(f"compare.arms '{arm}': {error}") from None
