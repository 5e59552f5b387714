"""Ctrl-C ends `sample` and `evaluate` in one line, and leaves no half of anything."""

import pytest

from flowdopr.cli import run_command
from flowdopr.evaluate import draw, measure
from flowdopr.evaluate.generate import ImageSampler


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", [(ImageSampler, "draw"), (draw, "grid")])
def test_sample_leaves_nothing(make_run, tmp_path, monkeypatch, capsys, place):
    run = make_run()
    monkeypatch.setattr(*place, interrupt)
    before = sorted(tmp_path.rglob("*"))
    assert (
        run_command(["sample", str(run.path), "--num", "4", "--out", str(tmp_path / "out")]) == 130
    )
    line = "flowdopr: sample stopped; nothing is written; the same command starts anew\n"
    assert capsys.readouterr().err == line
    assert sorted(tmp_path.rglob("*")) == before


def test_evaluate_keeps_the_cards_that_are_there(make_run, monkeypatch, capsys):
    run = make_run()
    command = ["evaluate", str(run.path), "evaluate.metrics=[fd]"]
    assert run_command(command) == 0
    cards = list((run.path / "evaluation").iterdir())
    capsys.readouterr()
    monkeypatch.setattr(measure, "fidelity", interrupt)
    assert run_command([*command, "evaluate.seed=1"]) == 130
    said = capsys.readouterr()
    assert said.err.startswith("flowdopr: evaluate stopped; no card is written, others stay")
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert list((run.path / "evaluation").iterdir()) == cards
