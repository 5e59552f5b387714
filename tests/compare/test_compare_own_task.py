"""A study of the user's own task is tuned, repeated and resumed; its report claims what is so."""

import math
import time
from pathlib import Path

import pytest
import torch

from flowdopr.compare.own_report import claims_of, measures_table, write_report
from flowdopr.compare.own_task import OwnTask, fit, run_study, with_and_without_dopr

HORIZONS = ("falls, 10", "falls, 20")


def train(trial):
    """Rollouts that are best at the rate 0.2 and, with DoPr, half as bad over the longer horizon
    and equal to those without it over the shorter; the rate 4 diverges."""
    if trial.lr == 4:
        yield dict.fromkeys(("loss", *HORIZONS), math.nan) | {"step": 5}
        raise AssertionError("a run that diverged goes on")
    for step in (5, 10):
        loss = (1 + abs(trial.lr - 0.2)) / step * (1 + 0.01 * trial.seed)
        falls = loss * (0.5 + 0.01 * trial.seed if trial.dopr else 1.0)
        yield {"step": step, "loss": loss, HORIZONS[0]: loss, HORIZONS[1]: falls}


TASK = OwnTask("toy", train, {"steps": 10}, rollout=HORIZONS[1], horizons=HORIZONS)
ARMS = with_and_without_dopr({"muon": (0.1, 0.2, 4)})


def test_a_study_is_tuned_repeated_and_never_run_twice(tmp_path):
    path = tmp_path / "out" / "runs.jsonl"
    bare, dopr = run_study(TASK, ARMS, path, seeds=range(3), workers=2)
    assert (bare.lr, dopr.lr) == (0.2, 0.2)
    assert bare.tuning[4].last("loss") == math.inf
    assert set(dopr.reported) == {0, 1, 2}
    lines = path.read_text().splitlines()
    assert len(lines) == 2 * (3 + 3)
    path.write_text("\n".join(lines[:-1]) + "\n")  # as if stopped before the last run
    again = run_study(TASK, ARMS, path, seeds=range(3))
    assert [one.lr for one in again] == [0.2, 0.2]
    assert len(path.read_text().splitlines()) == len(lines)

    claims = claims_of(TASK, [bare, dopr])
    for name in (
        f"{HORIZONS[1]}, same steps",
        f"{HORIZONS[1]}, same loss",
        "longest over shortest",
    ):
        one = claims["DoPr-Muon", name]
        assert 0.5 < one.ratio < 0.52
        assert one.shown
    assert claims["DoPr-Muon", "loss, same steps"].ratio == 1
    text = write_report(TASK, [bare, dopr], tmp_path)
    assert "DoPr-Muon / Muon | **0.51" in text
    assert (tmp_path / "toy.md").read_text() == text
    assert (tmp_path / "toy.png").stat().st_size > 10_000


def test_a_diverged_run_is_counted_and_in_no_mean(tmp_path):
    arms = with_and_without_dopr({"muon": (4,)})
    runs = run_study(TASK, arms, tmp_path / "runs.jsonl", seeds=range(2))
    assert list(measures_table(TASK, runs))[2:] == [
        "| Muon | 4 | 0 of 2 |",
        "| DoPr-Muon | 4 | 0 of 2 |",
    ]
    assert claims_of(TASK, runs) == {}
    write_report(TASK, runs, tmp_path)


def without_failures(trial):
    (Path(trial.settings["begun"]) / f"{trial.arm} {trial.lr:g}").touch()
    time.sleep(0 if trial.lr == 1 else 0.2)
    yield {"step": 10, "loss": 1.0, "falls": 0.0}


def test_a_measure_without_ratio_ends_the_study(tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    settings = {"steps": 10, "begun": str(begun)}
    task = OwnTask("toy", without_failures, settings, rollout="falls")
    arms = with_and_without_dopr({"sgd": range(1, 9)})
    with pytest.raises(ValueError, match=r"toy, SGD: falls is 0 after step 10, .* \(k \+ 0.5\)"):
        run_study(task, arms, tmp_path / "runs.jsonl")
    assert len(list(begun.iterdir())) < 8


@pytest.mark.parametrize("name", ["walker/easy", "/walker", "", "."])
def test_a_name_that_leads_out_of_the_folder_is_refused(name):
    with pytest.raises(
        ValueError, match=rf"OwnTask: name='{name}' must be a file's name, .* slashes"
    ):
        OwnTask(name, train, {"steps": 10}, rollout=HORIZONS[1])


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"trial": ')
    with pytest.raises(ValueError, match=r"runs\.jsonl:1: is damaged.*delete the line"):
        run_study(TASK, ARMS, path)


def test_fit_measures_the_average_at_halves():
    model = torch.nn.Linear(4, 1)
    x = torch.randn(32, 4)
    y = x.sum(1, keepdim=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss():
        return (model(x) - y).square().mean()

    def measure():
        assert not model.training
        return {"loss": loss().item()}

    points = list(fit(model, optimizer, loss, measure, steps=32, warmup=1))
    assert [point["step"] for point in points] == [2, 4, 8, 16, 32]
    losses = [point["loss"] for point in points]
    assert losses == sorted(losses, reverse=True)
    assert model.training
