"""The task with a known answer: exact velocities, the theory against the real optimizers, a run."""

import importlib
import json
import sys

import numpy as np
import pytest
import torch
from script_modules import SCRIPTS
from torch import nn

from flowdopr.flow import EmpiricalVelocity, TimeSampler, generate
from flowdopr.optim import build_optimizer


@pytest.fixture(scope="module")
def script():
    """Imports a script by its name, as it imports the others."""
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def task(script):
    return script("known_answer_task")


@pytest.fixture
def theory(script):
    return script("known_answer_theory")


@pytest.fixture
def study(script):
    return script("known_answer")


@pytest.mark.parametrize("components", [1, 3])
def test_the_exact_velocity_is_that_of_the_score(task, components):
    """On the linear path v = (x + (1-t) score) / t, with the score of the density of x_t."""
    target = task.Target(task.Setting("", 100.0, components), 5, 0)
    x = torch.randn(20, 5, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64)
    rotation = target.rotation
    logs = []
    for mean in target.means:
        spread = rotation @ torch.diag(target.variances) @ rotation.T
        total = (1 - t)[:, None, None] ** 2 * torch.eye(5) + t[:, None, None] ** 2 * spread
        normal = torch.distributions.MultivariateNormal(t[:, None] * (rotation @ mean), total)
        logs.append(normal.log_prob(x))
    density = torch.stack(logs).logsumexp(0).sum()
    (score,) = torch.autograd.grad(density, x)
    expected = (x + (1 - t)[:, None] * score) / t[:, None]
    torch.testing.assert_close(target(x, t), expected.detach(), rtol=1e-9, atol=1e-9)


def test_a_mixture_of_points_is_the_oracle_of_a_data_set(task):
    target = task.Target(task.Setting("", 1.0, 4), 3, 0)
    target.variances *= 1e-14
    points = target.means @ target.rotation.T
    x, t = torch.randn(50, 3, dtype=torch.float64), torch.rand(50, dtype=torch.float64) * 0.95
    torch.testing.assert_close(target(x, t), EmpiricalVelocity(points)(x, t), rtol=1e-8, atol=1e-8)


def test_samples_and_rollouts_have_the_moments_of_the_data(task):
    target = task.Target(task.Setting("", 10.0, 3), 4, 0)
    samples = target.along(target.sample(100_000, torch.Generator().manual_seed(0)).double())
    torch.testing.assert_close(samples.T.cov(), target.covariance, atol=0.03, rtol=0.03)
    rollouts = generate(target, None, seed=0, num_images=10_000, image_shape=(4,), steps=100)
    moments = target.along(rollouts.images.double()).T.cov()
    torch.testing.assert_close(moments, target.covariance, atol=0.06, rtol=0.06)


def test_the_measures_vanish_for_the_exact_velocity_and_grow_without_the_lowest_directions(task):
    answer = task.KnownAnswer(task.Target(task.SETTINGS["gaussian-1e2"], 8, 0), 0)
    exact = answer.measure(answer.target)
    assert exact["excess"] == exact["spectrum"] == exact["lowest"] == 0
    assert exact["w2"] < 0.01  # only the solver's error, since the noise has exact moments

    def rigid(x, t):  # the velocity of data that do not vary along the last direction
        along = answer.target.along(answer.target(x, t))
        along[:, -1] = -answer.target.along(x)[:, -1] / (1.01 - t)
        return along @ answer.target.rotation.T.float()

    found = answer.measure(rigid)
    assert found["lowest"] > 2 * found["spectrum"] > 0
    assert found["ratio_by_direction"][:-1] == pytest.approx([1] * 7, abs=1e-3)
    assert found["ratio_by_direction"][-1] < 0.5
    direction = found["excess_by_direction"]
    assert direction[-1] > 1e3 * max(direction[:-1])
    assert found["excess"] == pytest.approx(np.mean(direction), rel=1e-3)
    assert np.mean(found["excess_by_time"]) == pytest.approx(found["excess"], rel=0.02)


@pytest.mark.parametrize(("start", "end"), [(0, 0.1), (0, 1), (0.9, 1)])
def test_the_moments_of_the_theory_are_those_of_points_of_the_path(task, theory, start, end):
    target = task.Target(task.SETTINGS["gaussian-1e2"], 4, 0)
    generator = torch.Generator().manual_seed(0)
    s, c = theory.moments(target.variances.numpy(), theory.band(start, end))
    x_1 = target.along(target.sample(200_000, generator).double())
    x_0 = torch.randn(x_1.shape, generator=generator, dtype=torch.float64)
    t = (start + (end - start) * TimeSampler()(len(x_1), generator))[:, None]
    x_t = (1 - t) * x_0 + t * x_1
    np.testing.assert_allclose(x_t.square().mean(0), s, rtol=0.03)
    np.testing.assert_allclose((x_t * (x_1 - x_0)).mean(0), c, atol=0.02)
    if (start, end) == (0, 1):  # E (1-t)^2 = E t^2 = 1/3
        np.testing.assert_allclose(s, (1 + target.variances.numpy()) / 3, rtol=1e-9)


EXACT_POLAR = {"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 100, "adjust_lr": "original"}
MUON = {"momentum": 0.0, "nesterov": False, **EXACT_POLAR}
EVERY_STEP = {"cov_decay": 0.0, "refresh_every": 1, "max_rows": "all"}


def trained_gains(s, w, rotation, name, lr, steps, dopr, options):
    """The gains of a linear layer without bias after `steps` of the exact gradient: D rows have
    the second moment R diag(s) R^T exactly."""
    dim = len(s)
    rows = torch.from_numpy(np.sqrt(dim * s)[:, None] * rotation.T)
    layer = nn.Linear(dim, dim, bias=False).double()
    nn.init.zeros_(layer.weight)
    optimizer = build_optimizer(layer, name, lr, dopr=dopr, **options)
    targets = rows @ torch.from_numpy(rotation * w @ rotation.T).T
    for _ in range(steps):
        optimizer.zero_grad()
        ((layer(rows) - targets).square().sum(1).mean() / 2).backward()
        optimizer.step()
    weight = rotation.T @ layer.weight.detach().numpy() @ rotation
    assert np.abs(weight - np.diag(np.diag(weight))).max() < 1e-6  # W stays aligned
    return np.diag(weight)


@pytest.mark.parametrize(
    ("start", "end"), [(0, 0.1), (0, 1), (0.9, 1)], ids=["early", "all", "late"]
)
def test_every_gain_of_a_linear_model_moves_as_the_theory_says(theory, start, end):
    dim, lr = 6, 0.01
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(dim, dim)))[0]
    s, c = theory.moments(np.geomspace(1, 1e-4, dim), theory.band(start, end))
    w = c / s
    for steps in (1, 40):

        def gains(name, dopr, options, turn=rotation, steps=steps):
            return trained_gains(s, w, turn, name, lr, steps, dopr, options)

        descent = theory.gradient_descent(s, w, lr, steps)
        np.testing.assert_allclose(gains("sgd", None, {}), descent, atol=1e-9)
        for damping in (0.1, 1.0):
            found = gains("sgd", {"damping": damping, **EVERY_STEP}, {})
            expected = theory.preconditioned(s, w, lr, steps, damping)
            np.testing.assert_allclose(found, expected, atol=1e-9)
        moved = theory.orthogonal(w, lr, steps)
        for dopr in (None, {"damping": 0.1, **EVERY_STEP}):
            np.testing.assert_allclose(gains("muon", dopr, MUON), moved, atol=1.01 * lr)
        found = gains("signum", None, {"momentum": 0.0}, turn=np.eye(dim))
        np.testing.assert_allclose(found, moved, atol=1.01 * lr)


def test_the_second_moment_is_ill_conditioned_at_late_times_only(theory):
    variances = np.geomspace(1, 1e-4, 64)
    condition = {}
    for start, end in ((0, 0.1), (0, 1), (0.9, 1)):
        s, _ = theory.moments(variances, theory.band(start, end))
        condition[start, end] = s.max() / s.min()
    assert condition[0, 0.1] < 1.01
    assert condition[0, 1] == pytest.approx(2, rel=1e-3)
    assert condition[0.9, 1] > 250
    assert "| 10,000 | all t | 2 |" in theory.table()


def test_a_tiny_study_runs_resumes_and_is_reported(
    script, task, study, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(study.LEARNING_RATES, "adamw", (1e-3, 4e-3))
    sizes = ["--steps", "50", "--dim", "6", "--width", "8", "--seeds", "2"]
    chosen = ["--settings", "gaussian-1e2", "--gps", "adamw", "--dopr", "inverse 1"]
    out = ["--statistics", "late", "--out", str(tmp_path)]
    monkeypatch.setattr(task, "EVALUATED", 64)
    monkeypatch.setattr(task, "ROLLOUTS", 64)
    monkeypatch.setattr("sys.argv", ["known_answer", *chosen, *sizes, *out])
    study.main()
    path = tmp_path / "runs.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 3 * (2 + 2)  # three arms; two learning rates, then two seeds
    assert [point["step"] for point in json.loads(lines[0])["curve"]] == [25, 50]
    path.write_text("\n".join(lines[:5]) + "\n")
    study.main()
    again = path.read_text().splitlines()
    assert len(again) == len(lines)
    curves = [[json.loads(line)["curve"] for line in these] for these in (lines, again)]
    assert curves[0] == curves[1]  # bitwise

    monkeypatch.setattr("sys.argv", ["known_answer_report", str(path)])
    script("known_answer_report").main()
    text = capsys.readouterr().out
    for words in ("DoPr-adamw (inverse 1, late)", "lowest third, same excess", "layers.1"):
        assert words in text
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_that_diverges_is_never_chosen(study, tmp_path):
    plan = study.Plan("gaussian-1", "kfac", "", 1e3, 0, steps=50, dim=6, width=8)
    run = study.Results(tmp_path / "runs.jsonl").run(plan)
    assert study.score(run) == float("inf")
    assert study.Results(tmp_path / "runs.jsonl").runs == {plan: run}
