"""Ctrl-C ends `sample` and `evaluate` in one line, which says what is kept."""

from flowdopr.cli import run_command
from flowdopr.evaluate import draw, measure
from flowdopr.evaluate.generate import ImageSampler


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_sample_goes_on_with_the_same_command(make_run, tmp_path, monkeypatch, capsys):
    run, out = make_run(), tmp_path / "out"
    command = ["sample", str(run.path), "--num", "4", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(draw, "grid", interrupt)
        assert run_command(command) == 130
    line = "flowdopr: sample stopped; complete batches are kept; the same command goes on\n"
    assert capsys.readouterr().err == line
    monkeypatch.setattr(ImageSampler, "draw", None)
    assert run_command(command) == 0
    assert (out / "sampling.json").is_file()


def test_evaluate_keeps_the_cards_that_are_there(make_run, monkeypatch, capsys):
    run = make_run()
    command = ["evaluate", str(run.path), "evaluate.metrics=[fd]"]
    assert run_command(command) == 0
    cards = list((run.path / "evaluation").iterdir())
    capsys.readouterr()
    monkeypatch.setattr(measure, "measure_model", interrupt)
    assert run_command([*command, "evaluate.seed=1"]) == 130
    said = capsys.readouterr()
    assert said.err.startswith("flowdopr: evaluate stopped; no card is written, others stay")
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert list((run.path / "evaluation").iterdir()) == cards
