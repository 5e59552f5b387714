"""DoPr in a robot policy: Gymnasium's Humanoid-v5 learns to keep its balance from an expert.

    pip install -e ".[control]"
    python scripts/examples/robot_policy.py --out humanoid

A network learns from recorded episodes of the expert (scripts/examples/humanoid.py), and then acts
alone. `mlp` predicts one action by regression. `flow` draws the next four actions together, a
chunk, from a flow-matching model given the observation (flowdopr.flow), performs the first, and
draws anew.

    loss      on held-out episodes of the expert: squared error of the standardised actions (mlp),
              or the flow-matching loss of chunks (flow)
    lost      share of the 1,000 steps of an episode in which the policy had fallen
    fallen    share of the episodes in which it fell within so many steps; half an episode is added
              to both, so that their logarithms exist
    steps, return     mean survival, and the environment's own rewards

AdamW, Muon and SOAP are compared, each alone and in DoPr, with equally many learning rates and the
same seeds (flowdopr/compare/own_task.py). Finished runs in OUT/runs.jsonl are not repeated.

Shapes: observations (B, 348); chunks (B, C 17), standardised actions.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from humanoid import ACTIONS, EPISODE, OBSERVATIONS, recorded, rollouts
from torch import Tensor, nn

from flowdopr.compare.own_report import write_report
from flowdopr.compare.own_task import OwnTask, Point, Trial, fit, run_study, with_and_without_dopr
from flowdopr.flow import FlowMatching, Sampling
from flowdopr.optim import build_optimizer
from flowdopr.train.schedule import derive_seed

HELD_OUT_SEED, ROLLOUT_SEED, HELD_OUT_EPISODES = 10_000, 20_000, 16
HORIZONS = (125, 250, 500, 1000)
FARTHEST = 10.0  # standard deviations to which observations are cut
LEARNING_RATES = {
    "adamw": (1e-3, 3e-3, 1e-2),
    "muon": (3e-3, 1e-2, 3e-2),
    "soap": (1e-3, 3e-3, 1e-2),
}


class Scale(nn.Module):
    """Standardises columns by the mean and deviation of data; constant columns become zero."""

    def __init__(self, data: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", data.mean(0))
        self.register_buffer("std", data.std(0).clamp(min=1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / self.std).clamp(-FARTHEST, FARTHEST)

    def inverse(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean


def network(inputs: int, width: int, outputs: int) -> nn.Sequential:
    widths = [(inputs, width), (width, width), (width, width)]
    hidden = [layer for pair in widths for layer in (nn.Linear(*pair), nn.SiLU())]
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


class Regression(nn.Module):
    """An MLP that predicts the expert's action."""

    chunk = performed = 1

    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = network(OBSERVATIONS, width, ACTIONS)

    def loss(self, observations: Tensor, chunks: Tensor, generator: torch.Generator) -> Tensor:
        """Per sample (B,)."""
        return (self.network(observations) - chunks).square().mean(1)

    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        return self.network(observations)


class Flow(nn.Module):
    """A flow-matching model of the expert's next actions given the observation, which takes the
    place of the label y."""

    chunk, performed = 4, 1
    frequencies = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        self.size = self.chunk * ACTIONS
        inputs = self.size + OBSERVATIONS + 2 * self.frequencies
        self.network = network(inputs, width, self.size)
        self.objective = FlowMatching()
        self.sampling = Sampling(solver="euler", steps=5)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        angles = torch.pi * t[:, None] * torch.arange(1, self.frequencies + 1)
        return self.network(torch.cat([x, y, angles.sin(), angles.cos()], 1))

    def loss(self, observations: Tensor, chunks: Tensor, generator: torch.Generator) -> Tensor:
        """Per sample (B,)."""
        draw = self.objective.draw(len(chunks), (self.size,), generator=generator)
        return self.objective(self, chunks, observations, draw)

    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        velocity = self.sampling.velocity(self, observations)
        noise = partial(torch.randn, len(observations), self.size, generator=generator)
        return self.sampling.rollout(velocity, noise(), noise).x_1


POLICIES = {"mlp": Regression, "flow": Flow}


def chunks_of(observations: np.ndarray, actions: np.ndarray, chunk: int) -> tuple[Tensor, Tensor]:
    """Every observation (N, 348) that has `chunk` actions after it, and these (N, C 17)."""
    count = actions.shape[1] - chunk + 1
    parts = [actions[:, start : start + count] for start in range(chunk)]
    seen = torch.as_tensor(observations[:, :count]).flatten(0, 1)
    return seen, torch.as_tensor(np.concatenate(parts, 2)).flatten(0, 1)


def train(trial: Trial, folder: Path) -> Iterator[Point]:
    """One run; the expert's episodes are kept in `folder`."""
    options = trial.settings
    torch.manual_seed(derive_seed(trial.seed, 0))
    policy = POLICIES[options["policy"]](options["width"])
    sizes = (options["episodes"], options["recorded_steps"])
    data = chunks_of(*recorded(folder, trial.seed, *sizes), policy.chunk)
    seen, done = (Scale(part) for part in data)
    observations, chunks = seen(data[0]), done(data[1])
    held_out_episodes = recorded(folder, HELD_OUT_SEED, HELD_OUT_EPISODES, sizes[1])
    held_out = [
        scale(part)
        for scale, part in zip(
            (seen, done), chunks_of(*held_out_episodes, policy.chunk), strict=True
        )
    ]
    optimizer = build_optimizer(policy, trial.gp, trial.lr, weight_decay=1e-4, dopr=trial.dopr)
    generator = torch.Generator().manual_seed(derive_seed(trial.seed, 1))

    def batch_loss() -> Tensor:
        batch = torch.randint(len(chunks), (options["batch"],), generator=generator)
        return policy.loss(observations[batch], chunks[batch], generator).mean()

    def measure() -> Point:
        fixed = torch.Generator().manual_seed(0)

        def act(seen_now: np.ndarray) -> np.ndarray:
            scaled = seen(torch.as_tensor(seen_now, dtype=torch.float32))
            chunks = done.inverse(policy.act(scaled, fixed))
            return chunks[:, : policy.performed * ACTIONS].numpy()

        loss = policy.loss(*held_out, torch.Generator().manual_seed(1)).mean().item()
        return {"loss": loss, **rolled_out(act, options["rollouts"], policy.performed)}

    yield from fit(
        policy, optimizer, batch_loss, measure, steps=options["steps"], points=options["points"]
    )


def rolled_out(act, count: int, chunk: int) -> Point:
    """The measures of `count` episodes, the same ones for every policy."""
    episodes = rollouts(act, count, ROLLOUT_SEED, chunk)
    survived = np.array([one.survived for one in episodes])

    def share(total: float) -> float:
        return (total + 0.5) / (count + 1)

    return {
        "lost": share((EPISODE - survived).sum() / EPISODE),
        **{name: share((survived < n).sum()) for name, n in zip(horizons(), HORIZONS, strict=True)},
        "steps": survived.mean(),
        "return": float(np.mean([one.reward for one in episodes])),
    }


def horizons() -> tuple[str, ...]:
    return tuple(f"fallen, {n} steps" for n in HORIZONS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--policies", nargs="+", default=[*POLICIES], choices=POLICIES, help="what is learned")
    add("--steps", type=int, default=400, help="of training")
    add("--batch", type=int, default=256, help="observations in a batch")
    add("--width", type=int, default=128, help="of the hidden layers")
    add("--episodes", type=int, default=64, help="of the expert, to learn from")
    add("--recorded-steps", type=int, default=250, help="of each of them")
    add("--rollouts", type=int, default=8, help="episodes of the policy")
    add("--points", type=int, default=3, help="at which a run is measured")
    add("--gps", nargs="+", default=[*LEARNING_RATES], choices=LEARNING_RATES, help="optimizers")
    add("--seeds", type=int, default=5, help="number of reported seeds")
    add("--workers", type=int, default=1, help="runs at the same time")
    add("--out", type=Path, default=Path("humanoid"), help="output folder")
    options = parser.parse_args()
    names = ("steps", "batch", "width", "episodes", "recorded_steps", "rollouts", "points")
    arms = with_and_without_dopr({gp: LEARNING_RATES[gp] for gp in options.gps})
    results, seeds = options.out / "runs.jsonl", range(options.seeds)
    for policy in options.policies:
        task = OwnTask(
            f"humanoid-{policy}",
            partial(train, folder=options.out),
            settings={"policy": policy} | {name: getattr(options, name) for name in names},
            rollout="lost",
            horizons=horizons(),
        )
        runs = run_study(task, arms, results, seeds=seeds, workers=options.workers)
        print(write_report(task, runs, options.out))


if __name__ == "__main__":
    main()
