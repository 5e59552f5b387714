"""A flow-matching task whose answer is known: which optimizer learns directions of low variance?

    python scripts/known_answer.py --out known_answer
    python scripts/known_answer_report.py known_answer/runs.jsonl

The data are Gaussian, or a mixture of Gaussians, with variances from 1 to 1/condition along the
directions of a random rotation R, so the exact velocity and the exact distribution are known in
closed form. A small network learns the velocity from fresh samples by an optimizer alone (the
gradient preconditioner, GP) and by the same one in DoPr (activation preconditioning, AP, before
it). At steps spaced by factors of two the network, with averaged weights, is measured:

    excess      squared distance to the exact velocity at points of the path at uniform times, by
                direction and time, and at times of the training's law (`excess_trained`)
    rollout     variance along each direction over that of rollouts of the exact velocity from the
                same noise with the same solver: the mean of |log ratio| over all directions
                (`spectrum`) and over the third of the lowest variances (`lowest`)
    w2          Wasserstein distance of the Gaussians with the moments of rollouts and of the data

Each arm tries the same number of learning rates on a tuning seed; the one of the lowest `spectrum`
is repeated on the reported seeds. Finished runs in the results file are not repeated.
"""

import argparse
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from known_answer_task import (
    LAWS,
    SETTINGS,
    KnownAnswer,
    Target,
    VelocityMLP,
    path_points,
    second_moments,
)

from flowdopr.disk import to_json
from flowdopr.flow import FlowMatching, TimeSampler
from flowdopr.optim import build_optimizer
from flowdopr.runs.averages import Average
from flowdopr.train.ema import EMA
from flowdopr.train.schedule import derive_seed

BATCH, WARMUP = 256, 20
DIVERGED = 1e3  # the loss starts near 1
TUNING_SEED = 100
# Laws of times for second moments of AP that are not those of the training batch.
STATISTICS = {"apart": TimeSampler(), "late": TimeSampler("logit_normal", mean=2.0)}

# cov_decay as docs/optim.md advises for runs of a few thousand steps.
DOPR = {
    "inverse 0.1": {"damping": 0.1, "cov_decay": 0.5},
    "inverse 1": {"damping": 1.0, "cov_decay": 0.5},
    "sandwich 1": {"damping": 1.0, "cov_decay": 0.5, "form": "sandwich"},
    # Of which layers does AP help? Others are left to the GP.
    "inverse 1, input layer": {
        "damping": 1.0,
        "cov_decay": 0.5,
        "rules": ({"pattern": "layers.1|readout|modulations", "mode": "none"},),
    },
    "inverse 1, other layers": {
        "damping": 1.0,
        "cov_decay": 0.5,
        "rules": ({"pattern": "layers.0", "mode": "none"},),
    },
}
WHOLE = ("inverse 0.1", "inverse 1", "sandwich 1")
LEARNING_RATES = {
    "adamw": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "muon": (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2),
    "soap": (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "kfac": (5e-2, 1e-1, 1.5e-1, 2e-1, 3e-1),
}


@dataclass(frozen=True)
class Plan:
    """One run. `dopr` is a key of DOPR or "". `statistics` is a key of STATISTICS, if AP's second
    moments are those of another batch than is trained on, or ""."""

    setting: str
    gp: str
    dopr: str
    lr: float
    seed: int
    steps: int
    dim: int
    width: int
    statistics: str = ""

    @property
    def arm(self) -> str:
        """The optimizer's name in tables."""
        words = ", ".join(word for word in (self.dopr, self.statistics) if word)
        return f"DoPr-{self.gp} ({words})" if words else self.gp


def checkpoints(steps: int) -> list[int]:
    """`steps` divided by powers of two, down to 25 or so."""
    count = max(1, int(math.log2(max(steps / 25, 1))) + 1)
    return sorted({math.ceil(steps / 2**k) for k in range(count)})


def train(plan: Plan) -> dict[str, Any]:
    """Train and measure one run; its curve ends where training or the rollouts diverge."""
    setting = SETTINGS[plan.setting]
    target = Target(setting, plan.dim, derive_seed(plan.seed, 0))
    answer = KnownAnswer(target, derive_seed(plan.seed, 1), LAWS[setting.law])
    torch.manual_seed(derive_seed(plan.seed, 2))
    model = VelocityMLP(plan.dim, plan.width)
    objective = FlowMatching(time_sampler=LAWS[setting.law])
    dopr = DOPR[plan.dopr] if plan.dopr else None
    optimizer = build_optimizer(model, plan.gp, plan.lr, dopr=dopr)
    ramp = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / WARMUP))
    ema = EMA(model, [Average(length=0.1)])
    generator = torch.Generator().manual_seed(derive_seed(plan.seed, 3))
    apart = torch.Generator().manual_seed(derive_seed(plan.seed, 4))
    seconds, curve, wanted = 0.0, [], checkpoints(plan.steps)
    for step in range(1, plan.steps + 1):
        began = time.perf_counter()
        optimizer.zero_grad()
        if plan.statistics:
            # DoPr gathers the inputs of forwards in train mode with gradients: this one's alone.
            model.train()
            model(*path_points(target, BATCH, STATISTICS[plan.statistics], apart))
            model.eval()
        x_1 = target.sample(BATCH, generator)
        draw = objective.draw(BATCH, (plan.dim,), generator=generator)
        loss = objective(model, x_1, None, draw).mean()
        if not loss < DIVERGED:
            break
        loss.backward()
        optimizer.step()
        ramp.step()
        ema.update(step)
        seconds += time.perf_counter() - began
        if step in wanted:
            with ema.applied(model):
                measures = answer.measure(model)
            if measures is None:
                break
            if step < plan.steps:  # only the last point has its lists, to keep the file small
                measures = {
                    name: value for name, value in measures.items() if isinstance(value, float)
                }
            curve.append({"step": step, **measures})
    done = curve and curve[-1]["step"] == plan.steps
    with ema.applied(model):
        layers = second_moments(model, target, derive_seed(plan.seed, 5)) if done else None
    return {
        "plan": asdict(plan),
        "curve": curve,
        "layers": layers,
        "exact_w2": (answer.measure(target) or {})["w2"],
        "seconds_per_step": seconds / plan.steps,
    }


def score(run: dict[str, Any]) -> float:
    """The measure by which learning rates are chosen: `spectrum` after the last step; infinite for
    a run that diverged."""
    reached = run["curve"] and run["curve"][-1]["step"] == run["plan"]["steps"]
    return run["curve"][-1]["spectrum"] if reached else math.inf


class Results:
    """Finished runs in a file of one JSON object a line, by plan."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.runs = {Plan(**run["plan"]): run for run in map(json.loads, lines)}

    def run(self, plan: Plan) -> dict[str, Any]:
        """The run of `plan`, trained now unless the file has it."""
        if plan not in self.runs:
            run = train(plan)
            with self.path.open("a") as file:
                file.write(to_json(run, indent=None))
            last = run["curve"][-1] if run["curve"] else {}
            numbers = "  ".join(
                f"{key} {last.get(key, math.nan):.4g}" for key in ("excess", "spectrum", "w2")
            )
            print(
                f"{plan.setting} {plan.arm} lr {plan.lr:g} seed {plan.seed}: {numbers}", flush=True
            )
            self.runs[plan] = run
        return self.runs[plan]


def arms(
    gps: Iterable[str], forms: Iterable[str], statistics: Iterable[str]
) -> Iterator[dict[str, str]]:
    """The optimizers as fields of a Plan: each GP alone and in DoPr. K-FAC is a DoPr itself."""
    for gp in gps:
        yield {"gp": gp, "dopr": ""}
        for dopr in forms if gp != "kfac" else ():
            for name in ("", *statistics):
                yield {"gp": gp, "dopr": dopr, "statistics": name}


def study(options: argparse.Namespace, results: Results) -> None:
    """Tune every arm on TUNING_SEED, and repeat its best learning rate on the reported seeds."""
    sizes = {"steps": options.steps, "dim": options.dim, "width": options.width}
    for setting in options.settings:
        for arm in arms(options.gps, options.dopr, options.statistics):
            plans = [
                Plan(setting, **arm, lr=lr, seed=TUNING_SEED, **sizes)
                for lr in LEARNING_RATES[arm["gp"]]
            ]
            best = min(plans, key=lambda plan: score(results.run(plan)))
            for seed in range(options.seeds):
                results.run(replace(best, seed=seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--settings", nargs="+", default=[*SETTINGS], choices=SETTINGS, help="data and time law")
    add("--gps", nargs="+", default=["adamw", "muon"], choices=LEARNING_RATES, help="optimizers")
    add("--dopr", nargs="*", default=WHOLE, choices=DOPR, help="form and damping of DoPr")
    add("--statistics", nargs="*", default=[], choices=STATISTICS, help="other moments for AP")
    add("--seeds", type=int, default=3, help="number of reported seeds")
    add("--steps", type=int, default=800, help="training steps of each run")
    add("--dim", type=int, default=64, help="dimension of the data")
    add("--width", type=int, default=128, help="width of the hidden layers")
    add("--out", type=Path, default=Path("known_answer"), help="output folder")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    study(options, Results(options.out / "runs.jsonl"))


if __name__ == "__main__":
    main()
