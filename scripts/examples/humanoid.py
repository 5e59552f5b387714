"""An expert that keeps Gymnasium's Humanoid-v5 upright, its recorded episodes, and rollouts.

The humanoid stands on two spheres and has no ankles, so it falls without control. The expert is a
linear-quadratic regulator around a standing pose in which the model is in balance: its feedback
comes from finite differences of MuJoCo's step and scipy's Riccati solver. It sees positions and
velocities; policies see the environment's 348 observations.

Shapes: observations (T, 348); actions (T, 17), torques within the environment's limits.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
from scipy.linalg import solve_discrete_are
from scipy.optimize import least_squares

from flowdopr.disk import replacing_shared

OBSERVATIONS, ACTIONS, EPISODE = 348, 17, 1000
KNEE = -0.3  # radians, slightly bent
START_NOISE, ACTION_NOISE = 0.003, 0.06
"""Half the range of uniform noise on positions and velocities at the start, and the standard
deviation of noise on each action: pushes, from which a policy must recover, and which let the
recorded episodes cover what it will meet. With 0.07 the expert itself falls."""

Act = Callable[[np.ndarray], np.ndarray]
"""A policy: observations (B, 348) -> actions (B, 17)."""


def make_environment() -> gymnasium.Env:
    """Humanoid-v5, whose episodes start near the standing pose and have no time limit."""
    environment = gymnasium.make("Humanoid-v5", reset_noise_scale=START_NOISE).unwrapped
    environment.init_qpos[:] = expert().pose
    return environment


@dataclass(frozen=True)
class Expert:
    """action = torques - gain (deviation from the pose, velocities)."""

    model: mujoco.MjModel
    pose: np.ndarray
    torques: np.ndarray
    gain: np.ndarray

    def act(self, data: mujoco.MjData) -> np.ndarray:
        deviation = np.empty(self.model.nv)
        mujoco.mj_differentiatePos(self.model, deviation, 1.0, self.pose, data.qpos)
        action = self.torques - self.gain @ np.concatenate([deviation[2:], data.qvel])
        return np.clip(action, *self.model.actuator_ctrlrange.T)


@lru_cache
def expert() -> Expert:
    environment = gymnasium.make("Humanoid-v5").unwrapped
    model = environment.model
    pose, torques = standing(model)
    a, b = linearized(model, pose, torques, environment.frame_skip)
    # The place on the floor does not matter, so it is neither state nor cost. Tilt costs most.
    a, b = a[2:, 2:], b[2:]
    cost = np.concatenate([[10.0], [100.0] * 3, [10.0] * (model.nv - 6), [1.0] * model.nv])
    effort = 10.0 * np.eye(model.nu)
    value = solve_discrete_are(a, b, np.diag(cost), effort)
    gain = np.linalg.solve(effort + b.T @ value @ b, b.T @ value @ a)
    return Expert(model, pose, torques, gain)


def standing(model: mujoco.MjModel) -> tuple[np.ndarray, np.ndarray]:
    """A pose, and the torques, at which nothing accelerates: height and hips are such that the
    floor carries the weight, and the centre of mass is above the feet."""
    data = mujoco.MjData(model)
    joints = [
        model.joint(f"{side}_{name}").qposadr[0] for name in ("hip_y", "knee") for side in SIDES
    ]

    def forces(unknown: np.ndarray) -> np.ndarray:
        """Generalised forces that hold the pose of this height and these hips."""
        data.qpos[:], data.qvel[:], data.qacc[:] = model.qpos0, 0, 0
        data.qpos[2] = unknown[0]
        data.qpos[joints] = [unknown[1], unknown[1], KNEE, KNEE]
        mujoco.mj_inverse(model, data)
        return data.qfrc_inverse.copy()

    found = least_squares(
        lambda unknown: forces(unknown)[[2, 4]] / [100, 10],  # upward force, and pitch
        [1.285, -0.2],
        x_scale=[1e-3, 1e-2],
        diff_step=1e-6,
    )
    needed = forces(found.x)
    gears = np.zeros((model.nu, model.nv))
    moments = (data.moment_rownnz, data.moment_rowadr, data.moment_colind)
    mujoco.mju_sparse2dense(gears, data.actuator_moment, *moments)
    return data.qpos.copy(), np.linalg.lstsq(gears.T, needed, rcond=None)[0]


SIDES = ("right", "left")


def linearized(
    model: mujoco.MjModel, pose: np.ndarray, torques: np.ndarray, substeps: int, size: float = 1e-6
) -> tuple[np.ndarray, np.ndarray]:
    """A and B of one step of the environment at the pose, by central differences.

    MuJoCo's own `mjd_transitionFD` refuses the Runge-Kutta integrator of this model. Its contact
    solver stops too early for differences, so that they are taken with an exact one.
    """
    exact = copy.copy(model)
    exact.opt.solver, exact.opt.iterations = mujoco.mjtSolver.mjSOL_NEWTON, 200
    exact.opt.tolerance = 1e-14
    data, states = mujoco.MjData(exact), 2 * model.nv

    def after(change: np.ndarray) -> np.ndarray:
        state, control = change[:states], change[states:]
        data.qpos[:], data.qvel[:] = pose, state[model.nv :]
        mujoco.mj_integratePos(exact, data.qpos, state[: model.nv], 1.0)
        data.ctrl[:], data.qacc_warmstart[:] = torques + control, 0
        mujoco.mj_step(exact, data, substeps)
        deviation = np.empty(model.nv)
        mujoco.mj_differentiatePos(exact, deviation, 1.0, pose, data.qpos)
        return np.concatenate([deviation, data.qvel])

    changes = size * np.eye(states + model.nu)
    both = np.stack([(after(one) - after(-one)) / (2 * size) for one in changes], 1)
    return both[:, :states], both[:, states:]


def record(seed: int, episodes: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Observations (E, T, 348) and the expert's actions (E, T, 17), before the noise on them, of
    episodes in which it does not fall."""
    environment, rng = make_environment(), np.random.default_rng(seed)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    while len(found) < episodes:
        observation, _ = environment.reset(seed=int(rng.integers(2**31)))
        seen, done = [], []
        for _ in range(steps):
            seen.append(observation)
            done.append(expert().act(environment.data))
            observation, _, fell, _, _ = environment.step(noisy(done[-1], rng))
            if fell:
                break
        else:
            found.append((np.array(seen, np.float32), np.array(done, np.float32)))
    observations, actions = (np.stack(part) for part in zip(*found, strict=True))
    return observations, actions


def recorded(folder: Path, seed: int, episodes: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """What `record` returns, from a file of the folder that is made if needed."""
    path = folder / f"expert-{seed}-{episodes}-{steps}.npz"
    if not path.exists():
        observations, actions = record(seed, episodes, steps)
        with replacing_shared(path) as part, part.open("wb") as file:
            np.savez(file, observations=observations, actions=actions)
    with np.load(path, allow_pickle=False) as file:
        return file["observations"], file["actions"]


def noisy(action: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    low, high = expert().model.actuator_ctrlrange.T
    return np.clip(action + ACTION_NOISE * rng.normal(size=ACTIONS), low, high)


@dataclass
class Episode:
    """An episode that is being run: its environment, noise, last observation, and result so far."""

    environment: gymnasium.Env
    rng: np.random.Generator
    observation: np.ndarray
    survived: int = 0
    reward: float = 0.0
    fell: bool = False


def rollouts(act: Act, count: int, seed: int, chunk: int = 1) -> list[Episode]:
    """Episodes of up to EPISODE steps under a policy, all at once; their noise depends on the seed
    and the number of the episode alone.

    Args:
        act: returns `chunk` actions for each observation, which are done one after the other.
    """
    episodes = [_started(environments(count)[i], [seed, i]) for i in range(count)]
    for _ in range(0, EPISODE, chunk):
        running = [one for one in episodes if not one.fell]
        if not running:
            break
        actions = act(np.stack([one.observation for one in running])).reshape(-1, chunk, ACTIONS)
        for one, planned in zip(running, actions, strict=True):
            _perform(one, planned)
    return episodes


@lru_cache
def environments(count: int) -> list[gymnasium.Env]:
    return [make_environment() for _ in range(count)]


def _started(environment: gymnasium.Env, seed: list[int]) -> Episode:
    rng = np.random.default_rng(seed)
    observation, _ = environment.reset(seed=int(rng.integers(2**31)))
    return Episode(environment, rng, observation)


def _perform(episode: Episode, actions: np.ndarray) -> None:
    for action in actions:
        if episode.fell or episode.survived == EPISODE:
            return
        pushed = noisy(action, episode.rng)
        episode.observation, reward, episode.fell, _, _ = episode.environment.step(pushed)
        episode.survived += not episode.fell
        episode.reward += reward


def expert_rollouts(count: int, seed: int) -> Iterator[Episode]:
    """The episodes of `rollouts` under the expert, one after the other."""
    for i in range(count):
        episode = _started(environments(count)[i], [seed, i])
        while not episode.fell and episode.survived < EPISODE:
            _perform(episode, expert().act(episode.environment.data)[None])
        yield episode
