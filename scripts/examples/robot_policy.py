"""DoPr in a robot policy: behaviour cloning of a drone's controller, judged by the flight.

    python scripts/examples/robot_policy.py

A planar drone follows winding paths. An expert controller, which knows the drone, flies the
training paths; a network learns its two motor commands from what it observes: tilt, velocities
and the path ahead. A gradient preconditioner (GP) is compared with DoPr around it:

    one-step loss   error of the commands on the expert's own held-out flights, relative to
                    always giving the mean command
    rollout         distance to the path when the network flies by itself, in metres, capped at
                    5 m where it crashes

Both arms get the same learning rates, steps and seeds; the rate with the best mean rollout on
validation paths is reported, on other paths.

Shapes: state (B, 6) = x, z, tilt, dx, dz, dtilt; command (B, 2) = thrust, torque; path (B, T, 2).
"""

import argparse
import math
import statistics

import torch
from torch import Tensor, nn

from flowdopr.optim import build_optimizer

SECONDS_PER_STEP, STEPS, PREVIEW, GRAVITY = 0.02, 300, 12, 9.81
BATCH, WIDTH, CRASH = 256, 128, 5.0


def make_paths(count: int, seed: int) -> Tensor:
    """Sums of three slow sines in each coordinate, longer than the flight by the preview."""
    generator = torch.Generator().manual_seed(seed)
    time = SECONDS_PER_STEP * torch.arange(STEPS + 4 * PREVIEW + 1)
    size, rate, phase = torch.rand(3, count, 1, 2, 3, generator=generator)
    waves = torch.sin((0.5 + 1.5 * rate) * time[None, :, None, None] + 2 * math.pi * phase)
    return (0.7 * size * waves).sum(-1)


def fly(state: Tensor, command: Tensor) -> Tensor:
    """The drone (1 kg, inertia 0.02 kg m^2) after one step of time, semi-implicit Euler."""
    x, z, tilt, dx, dz, dtilt = state.unbind(-1)
    thrust, torque = command[:, 0].clamp(0, 25), command[:, 1].clamp(-1, 1)
    dx = dx - SECONDS_PER_STEP * thrust * tilt.sin()
    dz = dz + SECONDS_PER_STEP * (thrust * tilt.cos() - GRAVITY)
    dtilt = dtilt + SECONDS_PER_STEP * torque / 0.02
    moved = (x + SECONDS_PER_STEP * dx, z + SECONDS_PER_STEP * dz, tilt + SECONDS_PER_STEP * dtilt)
    return torch.stack([*moved, dx, dz, dtilt], -1)


def expert(state: Tensor, path: Tensor, step: int) -> Tensor:
    """A cascade: position to acceleration, acceleration to tilt and thrust, tilt to torque."""
    here, after = path[:, step], path[:, step + 1]
    velocity = (after - here) / SECONDS_PER_STEP
    wanted = 6 * (here - state[:, :2]) + 4 * (velocity - state[:, 3:5])
    wanted = wanted + (path[:, step + 2] - 2 * after + here) / SECONDS_PER_STEP**2
    up = wanted[:, 1] + GRAVITY
    tilt = torch.atan2(-wanted[:, 0], up).clamp(-1, 1)
    torque = 0.02 * (120 * (tilt - state[:, 2]) - 20 * state[:, 5])
    return torch.stack([wanted[:, 0].hypot(up), torque], -1)


def observe(state: Tensor, path: Tensor, step: int) -> Tensor:
    """Tilt and velocities, and every fourth point of the path ahead as seen from the drone."""
    ahead = path[:, step : step + 4 * PREVIEW : 4] - state[:, None, :2]
    return torch.cat([state[:, 2:], ahead.flatten(1)], -1)


def record(paths: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The expert's flights, with gusts: observations and its commands, all steps pooled."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.cat([paths[:, 0], torch.zeros(len(paths), 4)], -1)
    observations, commands = [], []
    for step in range(STEPS):
        commands.append(expert(state, paths, step))
        observations.append(observe(state, paths, step))
        gust = torch.randn(commands[-1].shape, generator=generator) * torch.tensor([1.0, 0.05])
        state = fly(state, commands[-1] + gust)
    return torch.cat(observations), torch.cat(commands)


class Policy(nn.Module):
    """An MLP on standardised observations; the usual care, so that DoPr has to add to it."""

    def __init__(self, observations: Tensor, commands: Tensor) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(observations.shape[1], WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, 2),
        )
        for name, data in (("seen", observations), ("given", commands)):
            self.register_buffer(f"{name}_mean", data.mean(0))
            self.register_buffer(f"{name}_std", data.std(0))

    def forward(self, observations: Tensor) -> Tensor:
        return self.network((observations - self.seen_mean) / self.seen_std)

    def act(self, observations: Tensor) -> Tensor:
        return self(observations) * self.given_std + self.given_mean

    def error(self, observations: Tensor, commands: Tensor) -> Tensor:
        """Mean squared error in standardised commands."""
        return (self(observations) - (commands - self.given_mean) / self.given_std).square().mean()


@torch.no_grad()
def flight_error(policy: Policy, paths: Tensor) -> float:
    """Mean distance to the path over the flights of `policy`, each distance at most CRASH."""
    state = torch.cat([paths[:, 0], torch.zeros(len(paths), 4)], -1)
    distances = []
    for step in range(STEPS):
        state = fly(state, policy.act(observe(state, paths, step)))
        gap = (state[:, :2] - paths[:, step + 1]).norm(dim=-1)
        distances.append(gap.nan_to_num(CRASH).clamp(max=CRASH))
    return torch.stack(distances).mean().item()


def train(gp: str, dopr: bool, lr: float, seed: int, steps: int, flights: int) -> dict[str, float]:
    """One run on `flights` flights of the expert."""
    torch.manual_seed(seed)
    data = record(make_paths(flights, 100 + seed), seed)
    policy = Policy(*data)
    # a short run changes its layer inputs fast: statistics of the last refreshes serve best
    ap = {"cov_decay": 0.5} if dopr else None
    optimizer = build_optimizer(policy, gp, lr, weight_decay=1e-4, dopr=ap)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(data[0]), (BATCH,))
        optimizer.zero_grad()
        policy.error(data[0][batch], data[1][batch]).backward()
        optimizer.step()
        schedule.step()
    policy.eval()
    with torch.no_grad():
        loss = policy.error(*record(make_paths(32, 1), 1)).item()
    return {
        "one-step loss": loss,
        "validation flight": flight_error(policy, make_paths(64, 2)),
        "flight error": flight_error(policy, make_paths(64, 3)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gp", default="adamw", help="adamw, muon, signum, ...")
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--flights", type=int, default=16, help="of the expert, to learn from")
    options = parser.parse_args()
    for dopr in (False, True):
        tried = []
        for lr in options.lrs:
            settings = (options.steps, options.flights)
            runs = [train(options.gp, dopr, lr, seed, *settings) for seed in range(options.seeds)]
            tried.append((statistics.mean(run["validation flight"] for run in runs), lr, runs))
        _, lr, runs = min(tried, key=lambda entry: entry[:2])
        name = f"dopr-{options.gp}" if dopr else options.gp
        print(f"{name}, lr {lr:g} of {len(tried)}, {len(runs)} seeds")
        for measure in runs[0]:
            values = [run[measure] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"  {measure:18s} {statistics.mean(values):.5f} ± {spread:.5f}", flush=True)


if __name__ == "__main__":
    main()
