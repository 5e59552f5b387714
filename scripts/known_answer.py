"""A flow-matching task whose answer is known: which optimizer learns directions of low variance?

    python scripts/known_answer.py --out known_answer
    python scripts/known_answer_report.py known_answer/runs.jsonl

The data are Gaussian, or a mixture of Gaussians, with variances from 1 to 1/condition along the
directions of a random rotation R, so the exact velocity and the exact distribution are known in
closed form. A small network learns the velocity from fresh samples by an optimizer alone (the
gradient preconditioner, GP) and by the same one in DoPr (activation preconditioning, AP, before
it). At steps spaced by factors of two the network, with averaged weights, is measured:

    excess      squared distance to the exact velocity at points of the path, by direction and time
    rollout     variance along each direction over that of rollouts of the exact velocity from the
                same noise with the same solver: the mean of |log ratio| over all directions
                (`spectrum`) and over the third of the lowest variances (`lowest`)
    w2          Wasserstein distance of the Gaussians with the moments of rollouts and of the data

Each arm tries the same number of learning rates on a tuning seed; the one of the lowest `spectrum`
is repeated on the reported seeds. Finished runs in the results file are not repeated.

Shapes: x (B, D); t (B,); moments and velocities along directions have the directions last.
"""

import argparse
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowdopr.disk import to_json
from flowdopr.flow import FlowMatching, TimeSampler, solve, time_grid
from flowdopr.optim import build_optimizer
from flowdopr.runs.averages import Average
from flowdopr.train.ema import EMA

BATCH, WARMUP, FREQUENCIES, EVALUATED, GROUPS, TIME_BINS = 256, 20, 8, 4096, 8, 10
TUNING_SEED = 100
LAWS = {"uniform": TimeSampler(), "late": TimeSampler(shift=0.1)}
LATE_STATISTICS = TimeSampler("logit_normal", mean=2.0)
BANDS = {"early": (0.0, 0.1), "all": (0.0, 1.0), "late": (0.9, 1.0)}

# cov_decay as docs/optim.md advises for runs of a few thousand steps.
DOPR = {
    "inverse 0.1": {"damping": 0.1, "cov_decay": 0.5},
    "inverse 1": {"damping": 1.0, "cov_decay": 0.5},
    "sandwich 1": {"damping": 1.0, "cov_decay": 0.5, "form": "sandwich"},
}
LEARNING_RATES = {
    "adamw": (1e-3, 2e-3, 4e-3, 8e-3),
    "muon": (2.5e-3, 5e-3, 1e-2, 2e-2),
    "soap": (1e-3, 2e-3, 4e-3, 8e-3),
    "kfac": (1e-2, 3e-2, 1e-1, 3e-1),
}


@dataclass(frozen=True)
class Setting:
    """The data and the law of training times."""

    name: str
    condition: float
    components: int = 1
    law: str = "uniform"


SETTINGS = {
    one.name: one
    for one in (
        Setting("gaussian-1e4", 1e4),
        Setting("gaussian-1e4-late", 1e4, law="late"),
        Setting("mixture-1e4", 1e4, components=4),
        Setting("gaussian-1e2", 1e2),
        Setting("gaussian-1", 1.0),
    )
}


@dataclass(frozen=True)
class Plan:
    """One run. `dopr` is a key of DOPR or "". `late_statistics`: AP's second moments are those of
    inputs at late times, whatever the law of training times."""

    setting: str
    gp: str
    dopr: str
    lr: float
    seed: int
    steps: int
    dim: int
    width: int
    late_statistics: bool = False

    @property
    def arm(self) -> str:
        """The optimizer's name in tables."""
        late = ", late" if self.late_statistics else ""
        return f"DoPr-{self.gp} ({self.dopr}{late})" if self.dopr else self.gp


class Target:
    """The data: equally likely Gaussians of one covariance R diag(variances) R^T, with the means
    `means` (K, D) along the columns of R (D, D), all drawn from `seed` in float64."""

    def __init__(self, setting: Setting, dim: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        self.rotation = torch.linalg.qr(normal)[0]
        lowest = -math.log10(setting.condition)
        self.variances = torch.logspace(0, lowest, dim, dtype=torch.float64)
        shape = (setting.components, dim)
        means = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.means = 2 * self.variances.sqrt() * (means - means.mean(0))

    @property
    def covariance(self) -> Tensor:
        """(D, D) of the data, whose mean is 0, along the columns of R."""
        return torch.diag(self.variances) + self.means.T @ self.means / len(self.means)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, D) float32."""
        chosen = torch.randint(len(self.means), (count,), generator=generator)
        noise = torch.randn(count, len(self.variances), generator=generator)
        along = self.means[chosen].float() + self.variances.sqrt().float() * noise
        return along @ self.rotation.T.float()

    def along(self, x: Tensor) -> Tensor:
        """`x` in the coordinates of R's columns."""
        return x @ self.rotation.to(x)

    def __call__(self, x: Tensor, t: Tensor, y: None = None) -> Tensor:
        """The exact velocity E[x_1 - x_0 | x_t = x] of the linear path.

        Given component j, x_t is normal with mean t m_j and, along direction k, the variance
        s_k = (1-t)^2 + t^2 lambda_k, and the velocity along k is
        m_jk + (t lambda_k - (1-t)) / s_k (x_k - t m_jk). Components are weighted by their
        posterior probabilities.
        """
        variances, means, t = self.variances.to(x), self.means.to(x), t.reshape(-1, 1)
        total = (1 - t) ** 2 + t**2 * variances
        away = self.along(x)[:, None] - t[:, :, None] * means  # (B, K, D)
        weights = (-away.square() / total[:, None] / 2).sum(2).softmax(1)
        gain = (t * variances - (1 - t)) / total
        velocity = (weights[:, :, None] * (means + gain[:, None] * away)).sum(1)
        return velocity @ self.rotation.T.to(x)


class VelocityMLP(nn.Module):
    """Three linear layers, the two hidden ones scaled and shifted by linear functions of features
    of the time: sines and cosines of t and of the logarithm of 1.01 - t."""

    num_classes = 0

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, width), nn.Linear(width, width)])
        self.readout = nn.Linear(width, dim)
        self.modulations = nn.ModuleList([nn.Linear(4 * FREQUENCIES, 2 * width) for _ in range(2)])
        for layer in self.modulations:
            layer.fused_blocks = 2
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, y: None = None) -> Tensor:
        times = torch.stack([t, (1.01 - t).log() / math.log(0.01)], 1)
        phases = (math.pi / 2 * times[:, :, None] * torch.arange(1, FREQUENCIES + 1)).flatten(1)
        features = torch.cat([phases.sin(), phases.cos()], 1)
        for layer, modulation in zip(self.layers, self.modulations, strict=True):
            scale, shift = modulation(features).chunk(2, 1)
            x = nn.functional.silu(layer(x) * (1 + scale) + shift)
        return self.readout(x)


@dataclass
class Evaluation:
    """Fixed points of the path, noise with exactly the mean 0 and covariance 1, and what rollouts
    of the exact velocity from it are."""

    target: Target
    seed: int
    x_t: Tensor = field(init=False)
    t: Tensor = field(init=False)
    exact: Tensor = field(init=False)
    noise: Tensor = field(init=False)
    exact_moments: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.x_t, self.t = path_points(self.target, EVALUATED, TimeSampler(), generator)
        self.exact = self.target(self.x_t, self.t)
        z = torch.randn(EVALUATED // 2, self.x_t.shape[1], generator=generator).double()
        z = z - z.mean(0)
        root = torch.linalg.cholesky(z.T @ z / len(z))
        self.noise = torch.linalg.solve_triangular(root, z.T, upper=False).T.float()
        self.exact_moments = self.rollout_moments(self.target)

    def rollout_moments(self, model: Any) -> tuple[Tensor, Tensor]:
        """Mean and covariance of rollouts (midpoint, 50 steps), along the columns of R."""
        grid = time_grid("uniform", 50)
        x_1 = solve(lambda x, t: model(x, t.expand(len(x))), self.noise, grid).x_1
        along = self.target.along(x_1.double())
        return along.mean(0), along.T.cov(correction=0)

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, Any]:
        """The measures of the module's docstring; by direction in groups of neighbours."""
        error = self.target.along(model(self.x_t, self.t) - self.exact).double().square()
        bins = (self.t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        by_cell = torch.stack([grouped(error[bins == b].mean(0)) for b in range(TIME_BINS)])
        mean, covariance = self.rollout_moments(model)
        logs = (covariance.diag() / self.exact_moments[1].diag()).log()
        return {
            "excess": error.mean().item(),
            "excess_by_direction": rounded(grouped(error.mean(0))),
            "excess_by_time": rounded(by_cell.mean(1)),
            "excess_late_by_direction": rounded(by_cell[-1]),
            "spectrum": logs.abs().mean().item(),
            "lowest": logs[-math.ceil(len(logs) / 3) :].abs().mean().item(),
            "ratio_by_direction": rounded(grouped(logs).exp()),
            "w2": gaussian_w2(mean, covariance, self.target.covariance),
        }


def path_points(
    target: Target, count: int, law: TimeSampler, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """x_t (count, D) and t (count,) of fresh samples."""
    objective = FlowMatching(time_sampler=law)
    x_1 = target.sample(count, generator)
    draw = objective.draw(count, x_1.shape[1:], generator=generator)
    return objective.path.sample(draw.x_0, x_1, draw.t).x_t, draw.t


def grouped(values: Tensor) -> Tensor:
    """Means over up to GROUPS groups of neighbouring directions."""
    return torch.stack([part.mean() for part in values.tensor_split(min(GROUPS, len(values)))])


def rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]


def gaussian_w2(mean: Tensor, covariance: Tensor, wanted: Tensor) -> float:
    """Wasserstein distance of order 2 of N(mean, covariance) and N(0, wanted)."""
    root = torch.linalg.cholesky(wanted)
    cross = torch.linalg.eigvalsh(root.T @ covariance @ root).clamp(min=0).sqrt().sum()
    square = mean.square().sum() + covariance.trace() + wanted.trace() - 2 * cross
    return math.sqrt(max(square.item(), 0.0))


@torch.no_grad()
def layer_inputs(model: VelocityMLP, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
    """The inputs (B, ...) of every layer that is not a modulation, in float64."""
    inputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0].double()})
        )
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and "modulations" not in name
    ]
    model(x_t, t)
    for handle in handles:
        handle.remove()
    return inputs


def second_moments(model: VelocityMLP, target: Target, seed: int) -> dict[str, dict[str, Any]]:
    """For each layer and band of times: condition number and effective rank (the exponential of
    the eigenvalues' entropy) of the second moment of the layer's inputs."""
    found: dict[str, dict[str, Any]] = {}
    for band, (start, end) in BANDS.items():
        generator = torch.Generator().manual_seed(seed)
        x_1 = target.sample(EVALUATED, generator)
        x_0 = torch.randn(x_1.shape, generator=generator)
        t = start + (end - start) * TimeSampler()(EVALUATED, generator)
        x_t = FlowMatching().path.sample(x_0, x_1, t).x_t
        for name, z in layer_inputs(model, x_t, t).items():
            values = torch.linalg.eigvalsh(z.T @ z / len(z)).clamp(min=1e-12)
            shares = values / values.sum()
            rank = (-(shares * shares.log()).sum()).exp()
            condition, rank = rounded(torch.stack([values[-1] / values[0], rank]))
            numbers = {"condition": condition, "effective_rank": rank}
            found.setdefault(name, {})[band] = numbers
    return found


def checkpoints(steps: int) -> list[int]:
    """`steps` divided by powers of two, down to 25 or so."""
    count = max(1, int(math.log2(max(steps / 25, 1))) + 1)
    return sorted({math.ceil(steps / 2**k) for k in range(count)})


def train(plan: Plan) -> dict[str, Any]:
    """Train and measure one run; its curve ends where the loss is no longer finite."""
    setting = SETTINGS[plan.setting]
    target = Target(setting, plan.dim, plan.seed)
    evaluation = Evaluation(target, plan.seed + 1)
    torch.manual_seed(plan.seed)
    model = VelocityMLP(plan.dim, plan.width)
    objective = FlowMatching(time_sampler=LAWS[setting.law])
    dopr = DOPR[plan.dopr] if plan.dopr else None
    optimizer = build_optimizer(model, plan.gp, plan.lr, dopr=dopr)
    ramp = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / WARMUP))
    ema = EMA(model, [Average(length=0.1)])
    generator = torch.Generator().manual_seed(plan.seed + 2)
    seconds, curve, wanted = 0.0, [], checkpoints(plan.steps)
    for step in range(1, plan.steps + 1):
        began = time.perf_counter()
        optimizer.zero_grad()
        if plan.late_statistics:
            # DoPr gathers the inputs of forwards in train mode with gradients: this one's alone.
            model.train()
            model(*path_points(target, BATCH, LATE_STATISTICS, generator))
            model.eval()
        x_1 = target.sample(BATCH, generator)
        draw = objective.draw(BATCH, (plan.dim,), generator=generator)
        loss = objective(model, x_1, None, draw).mean()
        if not loss.isfinite():
            break
        loss.backward()
        optimizer.step()
        ramp.step()
        ema.update(step)
        seconds += time.perf_counter() - began
        if step in wanted:
            with ema.applied(model):
                curve.append({"step": step, **evaluation.measure(model)})
    with ema.applied(model):
        layers = second_moments(model, target, plan.seed + 3)
    exact = evaluation.measure(target)["w2"]
    return {
        "plan": asdict(plan),
        "curve": curve,
        "layers": layers,
        "exact_w2": exact,
        "seconds_per_step": seconds / plan.steps,
    }


def score(run: dict[str, Any]) -> float:
    """The measure by which learning rates are chosen: `spectrum` after the last step."""
    reached = run["curve"] and run["curve"][-1]["step"] == run["plan"]["steps"]
    value = run["curve"][-1]["spectrum"] if reached else math.inf
    return value if math.isfinite(value) else math.inf


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
                f"{key} {last.get(key):.4g}" for key in ("excess", "spectrum", "w2")
            )
            print(
                f"{plan.setting} {plan.arm} lr {plan.lr:g} seed {plan.seed}: {numbers}", flush=True
            )
            self.runs[plan] = run
        return self.runs[plan]


def arms(gps: Iterable[str], forms: Iterable[str], late_statistics: bool) -> Iterator[dict]:
    """The optimizers as fields of a Plan: each GP alone and in DoPr. K-FAC is a DoPr itself."""
    for gp in gps:
        yield {"gp": gp, "dopr": ""}
        for dopr in forms if gp != "kfac" else ():
            yield {"gp": gp, "dopr": dopr}
            if late_statistics:
                yield {"gp": gp, "dopr": dopr, "late_statistics": True}


def study(options: argparse.Namespace, results: Results) -> None:
    """Tune every arm on TUNING_SEED, and repeat its best learning rate on the reported seeds."""
    sizes = {"steps": options.steps, "dim": options.dim, "width": options.width}
    for setting in options.settings:
        for arm in arms(options.gps, options.dopr, options.late_statistics):
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
    add("--dopr", nargs="*", default=[*DOPR], choices=DOPR, help="form and damping of DoPr")
    add("--late-statistics", action="store_true", help="also AP by second moments of late times")
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
