"""The two examples run; what they show needs more steps than a test has."""

import pytest
import torch
from script_modules import load_script


@pytest.mark.parametrize("dopr", [False, True])
def test_language_model_trains_and_writes(dopr, monkeypatch):
    example = load_script("examples/language_model.py")
    monkeypatch.setattr(example, "LENGTH", 20)
    text = example.load_text()[:20_000]
    assert set(text) <= set(example.LETTERS)
    untrained = example.train("adamw", dopr, 0.0, 0, 5, text)
    result = example.train("adamw", dopr, 1e-2, 0, 5, text)
    assert 0 < result["one-step loss"] < untrained["one-step loss"] - 0.5
    assert 0 < result["unknown words"] <= 1


def test_unknown_words_counts_whole_words_only():
    example = load_script("examples/language_model.py")
    assert example.unknown_words(["he cat sat zzz on th"], {"cat", "sat", "on"}) == 0.25


@pytest.mark.parametrize("dopr", [False, True])
def test_robot_policy_learns_to_fly(dopr):
    example = load_script("examples/robot_policy.py")
    untrained = example.train("adamw", dopr, 0.0, 0, 5, 16)
    result = example.train("adamw", dopr, 1e-2, 0, 200, 16)
    assert 0 < result["one-step loss"] < 0.6 * untrained["one-step loss"]
    for flight in ("validation flight", "flight error"):
        assert 0 < result[flight] < 0.2 * untrained[flight]


def test_the_robots_expert_stays_on_its_path():
    example = load_script("examples/robot_policy.py")
    paths = example.make_paths(8, 0)
    state = torch.cat([paths[:, 0], torch.zeros(8, 4)], -1)
    distances = []
    for step in range(example.STEPS):
        state = example.fly(state, example.expert(state, paths, step))
        distances.append((state[:, :2] - paths[:, step + 1]).norm(dim=-1))
    assert torch.stack(distances).mean() < 0.1
