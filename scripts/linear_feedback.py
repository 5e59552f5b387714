"""A small example of DoPr: behaviour cloning in a linear dynamical system (arXiv 2606.06418).

    python scripts/linear_feedback.py --out linear_feedback

The expert is a linear quadratic regulator u = K* s of the system s' = A s + B u + w. A policy
K = F G, with as many features as the rank of K*, learns to imitate it from pairs (s, u + noise),
with a gradient preconditioner (GP) alone and with activation preconditioning (AP) before it. The
regulator keeps the unstable directions of the state so small that the states are ill-conditioned:
errors of K in these directions hardly change the one-step loss but dominate the closed loop.

Shapes: s (n, STATES), u (n, ACTIONS), K (ACTIONS, STATES), G (FEATURES, STATES).
"""

import argparse
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.linalg import solve_discrete_are
from torch import nn

from flowdopr.disk import to_json
from flowdopr.optim import build_optimizer

STATES, ACTIONS, FEATURES, HORIZON, BATCH = 16, 6, 3, 100, 64
LEARNING_RATES = {
    "sgd": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    "adamw": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    "muon": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    "signum": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
}
MEASURES = {
    "one_step_loss": "one-step loss on the expert's states",
    "feature_distance": "distance of the features' subspace",
    "rollout_cost": "excess cost of the rollout",
}


class World:
    """The system, its regulator and training data in float64, all drawn from one seed.

    A has FEATURES unstable modes, which alone are controlled and enter the cost, and stable modes
    with increasing noise, which drive the unstable ones. A random rotation mixes the coordinates.
    """

    def __init__(self, seed: int, train_size: int = 512, action_noise: float = 0.05) -> None:
        rng = np.random.default_rng(seed)
        rotation = np.linalg.qr(rng.normal(size=(STATES, STATES)))[0]
        slow = STATES - FEATURES
        modes = np.diag([1.1] * FEATURES + list(rng.uniform(0.8, 0.95, slow)))
        modes[:FEATURES, FEATURES:] = 0.1 * rng.normal(size=(FEATURES, slow))
        noise = np.array([0.1] * FEATURES + list(np.geomspace(0.1, 3, slow)))
        reach = np.linalg.qr(rng.normal(size=(ACTIONS, FEATURES)))[0]
        counted = rotation[:, :FEATURES]
        self.a = rotation @ modes @ rotation.T
        self.b = counted @ reach.T
        self.w = rotation @ np.diag(noise**2) @ rotation.T
        self.q, self.r = counted @ counted.T, 0.1 * np.eye(ACTIONS)
        value = solve_discrete_are(self.a, self.b, self.q, self.r)
        gram = self.r + self.b.T @ value @ self.b
        self.expert = -np.linalg.solve(gram, self.b.T @ value @ self.a)
        self.sigma = self._states(self.expert)[-1]
        root = np.linalg.cholesky(self.sigma)
        states = rng.normal(size=(train_size, STATES)) @ root.T
        actions = states @ self.expert.T + action_noise * rng.normal(size=(train_size, ACTIONS))
        self.states, self.actions = torch.from_numpy(states), torch.from_numpy(actions)

    def _states(self, policy: np.ndarray) -> list[np.ndarray]:
        """Second moments of the state in the closed loop at steps 1 to HORIZON, from s = 0."""
        loop, moment, moments = self.a + self.b @ policy, np.zeros_like(self.w), []
        for _ in range(HORIZON):
            moment = loop @ moment @ loop.T + self.w
            moments.append(moment)
        return moments

    def rollout_cost(self, policy: np.ndarray) -> float:
        """Expected quadratic cost of the closed loop divided by the regulator's, minus 1."""

        def cost(k: np.ndarray) -> float:
            return sum(float(np.trace((self.q + k.T @ self.r @ k) @ m)) for m in self._states(k))

        return cost(policy) / cost(self.expert) - 1

    def one_step_loss(self, policy: np.ndarray) -> float:
        """Expected squared error on the expert's states, relative to that of predicting 0."""
        gap = policy - self.expert
        return float(np.trace(gap @ self.sigma @ gap.T)) / float(
            np.trace(self.expert @ self.sigma @ self.expert.T)
        )

    def feature_distance(self, features: np.ndarray) -> float:
        """Sine of the largest angle between the rows of G and those of K*."""
        learned = np.linalg.qr(features.T)[0]
        true = np.linalg.svd(self.expert)[2][:FEATURES].T
        return float(np.linalg.norm(learned - true @ (true.T @ learned), 2))

    def measure(self, model: nn.Sequential) -> dict[str, float]:
        """All MEASURES of the policy of `model`; infinite if training has diverged."""
        features, readout = (layer.weight.detach().numpy() for layer in model)
        policy = readout @ features
        if not np.abs(policy).max() < 1e3:
            return dict.fromkeys(MEASURES, float("inf"))
        return {
            "one_step_loss": self.one_step_loss(policy),
            "feature_distance": self.feature_distance(features),
            "rollout_cost": self.rollout_cost(policy),
        }


def clone_behaviour(
    seed: int, gp: str, dopr: bool, lr: float, steps: int
) -> list[dict[str, float]]:
    """Train one policy with the optimizer `gp`, in DoPr or alone, and measure it at 11 evenly
    spaced steps."""
    world = World(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(STATES, FEATURES, bias=False), nn.Linear(FEATURES, ACTIONS, bias=False)
    ).double()
    optimizer = build_optimizer(model, gp, lr, dopr={} if dopr else None)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history = [{"step": 0, **world.measure(model)}]
    for step in range(1, steps + 1):
        batch = torch.randint(len(world.states), (BATCH,))
        loss = (model(world.states[batch]) - world.actions[batch]).square().mean()
        if loss < 1e6:  # stop updating after divergence
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if step % max(1, steps // 10) == 0:
            history.append({"step": step, **world.measure(model)})
    return history


def compare_arms(gps: list[str], seeds: int, steps: int) -> list[dict]:
    """For each GP, alone and in DoPr: the runs of all seeds at the learning rate with the lowest
    median rollout cost. Both try the same learning rates."""
    arms = []
    for gp in gps:
        for dopr in (False, True):
            arm = {"name": f"dopr-{gp}" if dopr else gp, "gp": gp, "dopr": dopr}
            tried = []
            for lr in LEARNING_RATES[gp]:
                runs = [clone_behaviour(seed, gp, dopr, lr, steps) for seed in range(seeds)]
                cost = statistics.median(run[-1]["rollout_cost"] for run in runs)
                tried.append(arm | {"lr": lr, "median_rollout_cost": cost, "runs": runs})
            arms.append(min(tried, key=lambda arm: arm["median_rollout_cost"]))
            print(describe(arms[-1]), flush=True)
    return arms


def describe(arm: dict) -> str:
    """One line with the median and range over seeds of each measure at the last step."""
    cells = [f"{arm['name']:12s} lr {arm['lr']:<6g}"]
    for measure in MEASURES:
        values = sorted(run[-1][measure] for run in arm["runs"])
        cells.append(
            f"{measure} {statistics.median(values):.2e} [{values[0]:.1e}, {values[-1]:.1e}]"
        )
    return "  ".join(cells)


def plot(arms: list[dict], path: Path) -> None:
    """Plot each measure over training: GP dashed, DoPr solid, bands from minimum to maximum."""
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(13, 4), layout="constrained")
    colors = {name: f"C{i}" for i, name in enumerate(LEARNING_RATES)}
    for axis, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        for arm in arms:
            steps = [point["step"] for point in arm["runs"][0]]
            values = np.array([[point[measure] for point in run] for run in arm["runs"]])
            color = colors[arm["gp"]]
            axis.plot(
                steps,
                np.median(values, 0),
                "-" if arm["dopr"] else "--",
                color=color,
                label=arm["name"],
            )
            axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.08)
        axis.set(yscale="log", title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[-1].set_ylim(1e-4, 1e6)
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gps = ["adamw", "muon"]
    parser.add_argument(
        "--gps", nargs="+", default=gps, choices=LEARNING_RATES, help="optimizers to compare"
    )
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each run")
    parser.add_argument("--out", type=Path, default=Path("linear_feedback"), help="output folder")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the matrices are tiny
    arms = compare_arms(options.gps, options.seeds, options.steps)
    (options.out / "results.json").write_text(to_json(arms))
    plot(arms, options.out / "linear_feedback.png")
    print(f"wrote {options.out / 'results.json'} and {options.out / 'linear_feedback.png'}")


if __name__ == "__main__":
    main()
