"""`flowdopr status`: what it says of a run and of a study, from their files alone."""

import json
import logging
import re
import shutil

import pytest
import torch
from torch import nn

from flowdopr.cli import run_command
from flowdopr.compare.plan import expand
from flowdopr.compare.status import status
from flowdopr.config import to_yaml
from flowdopr.evaluate import evaluate
from flowdopr.optim.dopr.reports import Reporter
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


def warn_of_three_layers() -> None:
    """Let DoPr report of layer a.0 what it says of inputs that are not finite, twice, of a.0 and b
    that their damping was raised, and of c that it has no statistics."""
    weights = {name: nn.Parameter(torch.zeros(1)) for name in ("a.0", "b", "c")}
    for weight in weights.values():
        weight.grad = torch.zeros(1)
    reporter = Reporter(weights)
    for skipped in (1, 2):
        rows = [[1, 1, skipped, 0.1, 1], [1, 1, 0, 0.1, 1], [0, 0, 0, 0.1, 0]]
        reporter.send(list(weights), torch.tensor(rows))
        reporter.log_sent()


def test_a_run_complete_and_on_its_way(study, capsys):
    run = RunFolder.open(train(expand(study)[0].config))
    for n in (64, 32):
        evaluate(run.path, ["evaluate.metrics=[fd]", f"evaluate.fid_num_images={n}"])
    with run_log(run.path / "log.txt"):
        trainer = logging.getLogger("flowdopr.train")
        warn_of_three_layers()
        trainer.warning("step 5: the loss or the gradient is not finite; the step is skipped")
        trainer.warning("no sample grid of step 8: memory")
    capsys.readouterr()
    assert run_command(["status", str(run.path)]) == 0
    first, quality, speed, shares, checkpoints, *health = capsys.readouterr().out.splitlines()
    assert first == f"{run.path}: step 8 of 8 (100 %), complete"
    assert re.fullmatch(
        r"loss [\d.]+ \(step 8\); .*; gradient norm [\d.]+ \(step 8\); "
        r"FD [\d.]+ \(step 8, 64 images against digits train, flowdopr-classifier\)",
        quality,
    )
    assert re.fullmatch(r"[\d,]+ images/s, .* a step, [\d,]+ MiB", speed)
    parts = {word: int(share) for share, word in re.findall(r"(\d+) % ([a-z ]+)", shares)}
    assert list(parts) == ["waiting for data", "forward", "backward", "optimizer", "evaluation"]
    assert 50 < sum(parts.values()) <= 103  # rounded
    assert checkpoints == "checkpoints: 4, 8"
    assert health[0] == (
        "health: 7 warnings; skipped steps: 1; layers with inputs that are not finite: 1; layers "
        "with damping raised: 2; layers without statistics: 1"
    )
    assert health[-1] == "  1 x no sample grid of step 8: memory"
    assert health[-3].startswith("  2 x layer a.0: inputs are not finite")
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
    moved = folder.rename(folder.parent / "moved")
    assert status(moved).splitlines()[1:] == lines[1:]


def test_the_health_of_a_study_counts_the_layers_of_every_run(study):
    runs = [RunFolder.open(train(plan.config)) for plan in expand(study)[:2]]
    for run in runs:
        with run_log(run.path / "log.txt"):
            warn_of_three_layers()
    folder = runs[0].path.parent
    (folder / "study.yaml").write_text(to_yaml(study))
    alone, both = status(runs[0].path), status(folder)
    assert "layers with damping raised: 2;" in alone
    assert "layers with damping raised: 4;" in both


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
