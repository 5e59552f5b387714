"""The paper's small example: AP against the same GP, over seeds."""

import numpy as np
import pytest
from script_modules import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("linear_feedback.py")


def test_measures_are_zero_for_the_expert_and_its_states_are_ill_conditioned(script):
    world = script.World(0)
    assert np.linalg.cond(world.sigma) > 1e3
    assert world.rollout_cost(world.expert) == 0
    assert world.one_step_loss(world.expert) == 0
    features = np.linalg.svd(world.expert)[2][: script.FEATURES]
    assert world.feature_distance(features) < 1e-8
    assert world.rollout_cost(0.9 * world.expert) > 0


def test_activation_preconditioning_learns_the_features_and_the_rollout(script):
    for seed in range(3):
        plain = script.clone_behaviour(seed, "adamw", False, 0.1, 300)[-1]
        dopr = script.clone_behaviour(seed, "adamw", True, 0.1, 300)[-1]
        assert dopr["feature_distance"] < 0.5 * plain["feature_distance"]
        assert dopr["rollout_cost"] < 0.1 * plain["rollout_cost"]


def test_figure_and_results_are_written(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(script.LEARNING_RATES, "sgd", (0.01,))
    arguments = ["linear_feedback", "--gps", "sgd", "--seeds", "1", "--steps", "20"]
    monkeypatch.setattr("sys.argv", [*arguments, "--out", str(tmp_path)])
    script.main()
    assert (tmp_path / "results.json").stat().st_size > 1000
    assert (tmp_path / "linear_feedback.png").read_bytes()[:4] == b"\x89PNG"
    assert "dopr-sgd" in capsys.readouterr().out
