"""A study of optimizers on a task of your own: any model, data and rollout.

A task is a function that trains one run and yields points, each with the held-out one-step loss
and measures of rollouts after some step. `run_study` gives every arm the same learning rates on a
tuning seed, takes the one of the best rollouts (of equal ones, the lowest loss), and repeats
it on the reported seeds; `own_report.py` makes tables and a picture of it.

    def train(trial: Trial) -> Iterator[Point]:
        model = ...
        optimizer = build_optimizer(model, trial.gp, trial.lr, dopr=trial.dopr)
        steps = trial.settings["steps"]
        yield from fit(model, optimizer, loss_of_next_batch, measure, steps=steps)

    task = OwnTask("my task", train, {"steps": 1000}, rollout="falls")
    results = run_study(task, with_and_without_dopr({"muon": [0.01, 0.02]}), Path("runs.jsonl"))

Runs are processes of their own, which import the script again: call `run_study` under
`if __name__ == "__main__":`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowdopr.compare.worker import process_context
from flowdopr.disk import parse_json, reading, to_json
from flowdopr.runs.averages import Average
from flowdopr.train.ema import EMA

TUNING_SEED = 100
DOPR = {"damping": 0.1, "cov_decay": 0.5}
"""DoPr's options for runs of a few thousand steps, as docs/optim.md advises."""

Point = dict[str, float]
"""`step` and the measures after it, by name; lower rollout measures are better. The loss and the
measures of rollouts are positive, as their ratios are compared."""


@dataclass(frozen=True)
class Arm:
    """An optimizer `gp` of `build_optimizer`, alone or in DoPr, and the learning rates to try."""

    name: str
    gp: str
    lrs: tuple[float, ...]
    dopr: Mapping[str, Any] | None = None
    base: str | None = None
    """The arm with which this one is compared."""


@dataclass(frozen=True)
class Trial:
    """One run of an arm of a task. Finished runs are found in the results by all of its fields."""

    task: str
    arm: str
    gp: str
    dopr: Mapping[str, Any] | None
    lr: float
    seed: int
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Run:
    """A finished run: its points by step, and the seconds that it took with its evaluations."""

    trial: Trial
    curve: list[Point]
    seconds: float

    def last(self, measure: str) -> float:
        """The measure after the last step; infinite for a run that diverged."""
        done = self.curve and self.curve[-1]["step"] == self.trial.settings["steps"]
        return self.curve[-1][measure] if done else math.inf


@dataclass(frozen=True)
class OwnTask:
    """A task: what `train` yields for a trial, and what its measures are called.

    name: of the files of its report too.
    train: must be a function that pickle finds by its name, or a `functools.partial` of one.
    settings: of every run; `steps` must be among them.
    rollout: the measure by which learning rates are chosen.
    horizons: the rollout measures of shorter and longer rollouts, by growing length.

    Raises:
        ValueError: `name` is no file's name.
    """

    name: str
    train: Callable[[Trial], Iterable[Point]]
    settings: Mapping[str, Any]
    rollout: str
    loss: str = "loss"
    horizons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or not self.name:
            raise ValueError(
                f"OwnTask: name={self.name!r} must be a file's name, which the report's files get; "
                "give one without slashes"
            )

    def trial(self, arm: Arm, lr: float, seed: int) -> Trial:
        # A float, as in the results file: there 1 would be another trial than 1.0.
        return Trial(self.name, arm.name, arm.gp, arm.dopr, float(lr), seed, self.settings)


@dataclass
class ArmRuns:
    """The runs of an arm: on the tuning seed by learning rate, and the reported ones by seed."""

    arm: Arm
    tuning: dict[float, Run]
    lr: float
    """The learning rate of the best rollouts on the tuning seed."""
    reported: dict[int, Run] = field(default_factory=dict)


NAMES = {"adamw": "AdamW", "muon": "Muon", "soap": "SOAP", "sgd": "SGD", "signum": "Signum"}


def with_and_without_dopr(
    lrs: Mapping[str, Sequence[float]], dopr: Mapping[str, Any] = DOPR
) -> list[Arm]:
    """Two arms for each optimizer: alone, and in DoPr with the same learning rates to try."""
    arms = []
    for gp, rates in lrs.items():
        name = NAMES.get(gp, gp)
        arms += [
            Arm(name, gp, tuple(rates)),
            Arm(f"DoPr-{name}", gp, tuple(rates), dopr, base=name),
        ]
    return arms


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch_loss: Callable[[], Tensor],
    measure: Callable[[], Mapping[str, float]],
    *,
    steps: int,
    warmup: int = 50,
    points: int = 5,
) -> Iterator[Point]:
    """Train and measure: a point after `steps`, after half of them, after a quarter of them, ...

    The learning rate rises over `warmup` steps and stays. `measure` sees the model in evaluation
    mode with an average of its latest weights, which at a constant rate stands for a decay: so all
    points of a run are alike.

    Args:
        batch_loss: draws the next batch and returns its mean loss, a scalar.
        measure: returns the held-out loss and the measures of rollouts, by name.
        points: how many are measured.
    """
    ramp = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / warmup))
    average = EMA(model, [Average(length=0.1)])
    wanted = {math.ceil(steps / 2**k) for k in range(points)}
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        batch_loss().backward()
        optimizer.step()
        ramp.step()
        average.update(step)
        if step in wanted:
            model.eval()
            with average.applied(model), torch.no_grad():
                measures = measure()
            model.train()
            yield {"step": step, **measures}


class Results:
    """Finished runs in a file of one JSON object a line, to which several processes may append."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, Run] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            with reading(f"{path}:{number}", "delete the line, and its run is repeated"):
                run = parse_json(Run, line)
            self.runs[run.trial.key] = run

    def add(self, run: Run) -> None:
        line = to_json(asdict(run), indent=None).encode()
        with self.path.open("ab", buffering=0) as file:  # one write, which no other one divides
            file.write(line)
        self.runs[run.trial.key] = run


def run_study(
    task: OwnTask,
    arms: Sequence[Arm],
    path: Path,
    *,
    seeds: Sequence[int] = range(5),
    workers: int = 1,
    threads: int = 1,
) -> list[ArmRuns]:
    """Tune every arm on TUNING_SEED and repeat its best learning rate on `seeds`.

    Args:
        path: the results file. Runs in it are not repeated; finished ones are added at once.
        workers: runs at the same time, each a process.
        threads: of each process, for torch on a CPU.

    Raises:
        ValueError: a line of the results file is damaged, or a measure is 0 or less.
    """
    results = Results(path)
    tuning = {(arm.name, lr): task.trial(arm, lr, TUNING_SEED) for arm in arms for lr in arm.lrs}
    with ProcessPoolExecutor(workers, process_context(), torch.set_num_threads, (threads,)) as pool:
        _finish(task, tuning.values(), results, pool)
        found = []
        for arm in arms:
            runs = {lr: results.runs[tuning[arm.name, lr].key] for lr in arm.lrs}
            best = min(runs, key=lambda lr: [runs[lr].last(m) for m in (task.rollout, task.loss)])
            found.append(ArmRuns(arm, runs, best))
        trials = {(one.arm.name, s): task.trial(one.arm, one.lr, s) for one in found for s in seeds}
        _finish(task, trials.values(), results, pool)
    for one in found:
        one.reported.update((s, results.runs[trials[one.arm.name, s].key]) for s in seeds)
    return found


def _finish(
    task: OwnTask, trials: Iterable[Trial], results: Results, pool: ProcessPoolExecutor
) -> None:
    """Run those trials that the results do not have, and add them as they end."""
    missing = [trial for trial in trials if trial.key not in results.runs]
    futures: list[Future[Run]] = [pool.submit(_run, task, trial) for trial in missing]
    for number, future in enumerate(as_completed(futures), 1):
        try:
            run = future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # else all of them run for nothing
            raise
        results.add(run)
        trial = run.trial
        print(
            f"{number}/{len(missing)} {trial.task}, {trial.arm}, lr {trial.lr:g}, seed "
            f"{trial.seed}: {task.loss} {run.last(task.loss):.4g}, {task.rollout} "
            f"{run.last(task.rollout):.4g}, {run.seconds:.0f} s",
            flush=True,
        )


def _run(task: OwnTask, trial: Trial) -> Run:
    began = time.perf_counter()
    curve = list(takewhile(_is_finite, task.train(trial)))  # a run that diverged ends there
    for point in curve:
        for name in (task.loss, task.rollout, *task.horizons):
            if point[name] <= 0:
                raise ValueError(
                    f"{task.name}, {trial.arm}: {name} is {point[name]:g} after step "
                    f"{point['step']:g}, and ratios need positive measures: give k failures of n "
                    "as (k + 0.5) / (n + 1)"
                )
    return Run(trial, curve, time.perf_counter() - began)


def _is_finite(point: Point) -> bool:
    return all(map(math.isfinite, point.values()))
