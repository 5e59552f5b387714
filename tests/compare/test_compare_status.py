"""`flowdopr status`: what it says of a run and of a study, from their files alone."""

import json
import logging
import re
import shutil

import pytest

from flowdopr.cli import run_command
from flowdopr.compare.plan import expand
from flowdopr.compare.status import status
from flowdopr.config import to_yaml
from flowdopr.evaluate import evaluate
from flowdopr.runs import RunFolder
from flowdopr.terminal import watching
from flowdopr.train import train
from flowdopr.train.log import run_log


def cut(run: RunFolder) -> None:
    """Leave the run as it was after step 4 of 8."""
    shutil.rmtree(run.path / "checkpoints" / "step-00000008")
    metrics = run.path / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if json.loads(line)["step"] <= 4))


def test_a_run_complete_and_on_its_way(study, capsys):
    run = RunFolder.open(train(expand(study)[0].config))
    evaluate(run.path, ["evaluate.metrics=[fd]"])
    with run_log(run.path / "log.txt"):
        for _ in range(2):
            logging.getLogger("flowdopr.optim").warning("layer a: damping raised")
    capsys.readouterr()
    assert run_command(["status", str(run.path)]) == 0
    first, quality, speed, checkpoints, *health = capsys.readouterr().out.splitlines()
    assert first == f"{run.path}: step 8 of 8 (100 %), complete"
    assert re.fullmatch(
        r"loss [\d.]+ \(step 8\); .*FD [\d.]+ \(step 8\); gradient norm .*", quality
    )
    assert re.fullmatch(
        r"[\d,]+ images/s, .* a step, [\d,]+ MiB, \d+ % of the time waiting for images", speed
    )
    assert checkpoints == "checkpoints: 4, 8"
    assert health == ["health: 2 warnings", "  2 x layer a: damping raised"]
    cut(run)
    assert re.match(
        r".*: step 4 of 8 \(50 %\), 0:00:0\d left, last line 0:00:\d\d ago\n", status(run.path)
    )
    shutil.rmtree(run.path / "checkpoints" / "step-00000004")
    (run.path / "metrics.jsonl").unlink()
    assert "step 0 of 8 (0 %), nothing logged yet\ncheckpoints: none yet\n" in status(run.path)


def test_a_study_says_what_is_left_and_how_far_its_runs_are(study):
    first, second = (RunFolder.open(train(plan.config)) for plan in expand(study)[:2])
    folder = first.path.parent
    (folder / "study.yaml").write_text(to_yaml(study))
    cut(second)
    lines = status(folder).splitlines()
    assert lines[0] == f"{folder}: 2 runs begun"
    assert "DoPr-AdamW: 1 trial, 2 runs of 8 steps; left: 2 runs, 12 steps" in lines
    assert any(line.startswith(f"{second.path.name}: step 4 of 8 (50 %)") for line in lines)
    assert not any(line.startswith(f"{first.path.name}:") for line in lines)
    assert lines[-1] == "health: no warnings"


def test_other_folders_are_refused_in_one_line(tmp_path, capsys):
    assert run_command(["status", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith(
        "neither a run nor a study: no config.yaml and no study.yaml\n"
    )


def test_watching_goes_on_until_it_is_interrupted(monkeypatch):
    monkeypatch.setattr("flowdopr.terminal.SECONDS_BETWEEN_LOOKS", 0)
    looks = iter(["one", "two"])
    with pytest.raises(StopIteration):
        watching(lambda: next(looks))
