"""A run that was stopped, killed or extended equals the run that never was."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib import import_module

import pytest
from safetensors.torch import load_file
from tiny import again, assert_same_checkpoint, tiny, tiny_file, weights, without_times

from flowdopr.cli import run_command
from flowdopr.config import ConfigError
from flowdopr.runs import RunFolder, start_from
from flowdopr.train import train


@pytest.mark.parametrize("optimizer", ["adamw", "dopr-adamw", "muon", "dopr-muon", "dopr-sgd"])
def test_resumed_run_equals_the_straight_one(tmp_path, optimizer):
    config = tiny(tmp_path, f"optimizer.name={optimizer}", "train.steps=20", "train.warmup_steps=3")
    if optimizer.startswith("dopr"):
        config = again(config, "optimizer.dopr={refresh_every: 4, damping: 0.1}")
    straight = train(again(config, "name=straight"))
    train(again(config, "name=cut", "train.steps=7"))
    resumed = train(again(config, "name=cut"), resume=True)
    assert_same_checkpoint(straight, resumed, 20)
    losses = [
        [(line["step"], line["loss"]) for line in RunFolder.open(run).metrics() if "loss" in line]
        for run in (straight, resumed)
    ]
    assert losses[0][-3:] == losses[1][-3:]


def test_a_shorter_run_takes_over_the_steps_before_its_cooldown(tmp_path):
    cooling = ["train.lr_decay=cooldown", "train.cooldown_steps=4", "train.warmup_steps=2"]
    powers = ["train.ema_lengths=[0.1]", "train.checkpoint_every=2"]
    dopr = ["optimizer.name=dopr-muon", "optimizer.dopr.damping=0.1"]
    config = tiny(tmp_path, *cooling, *powers, *dopr, "train.steps=12", "name=long")
    longer = RunFolder.open(train(config))
    straight = train(again(config, "name=straight", "train.steps=9"))
    short = again(config, "name=short", "train.steps=9")
    assert start_from(longer, short) == 4  # the newest checkpoint before step 5
    before = (longer.checkpoint_path(4) / "state.pt").stat()
    taken = train(short, resume=True)
    assert_same_checkpoint(straight, taken, 9)
    assert without_times(taken) == without_times(straight)
    assert RunFolder.open(taken).made_by()["from_step"] == 4
    kept = taken / "averages" / "step-00000002" / "power-0.1.safetensors"
    assert load_file(kept).keys() == weights(longer.path, 2).keys()
    assert (longer.checkpoint_path(4) / "state.pt").stat().st_mtime_ns == before.st_mtime_ns
    brief = again(config, "name=brief", "train.steps=6")
    with pytest.raises(ConfigError, match=r"train\.warmup_steps was 2, now 1"):
        start_from(longer, again(brief, "train.warmup_steps=1"))
    for damping in ("[10, 1, 0.5]", "[10, 1, 3]"):
        with pytest.raises(ConfigError, match=r"damping was 0\.1, now \[10\.0, 1\.0, 3\]"):
            start_from(longer, again(brief, f"optimizer.dopr.damping={damping}"))
    shutil.rmtree(longer.checkpoint_path(2))
    assert start_from(longer, brief) == 0


def test_steps_cannot_change_under_a_decaying_rate(tmp_path):
    config = tiny(tmp_path, "train.lr_decay=cosine")
    train(config)
    remedy = rf"a run of its own by name=NEW train\.init_from={tmp_path}/runs/tiny$"
    with pytest.raises(ConfigError, match=rf"was 8, now 9: the cosine learning rate .*{remedy}"):
        train(again(config, "train.steps=9"), resume=True)


def test_steps_may_change_under_a_constant_rate_if_the_damping_keeps_its_schedule(tmp_path):
    config = tiny(tmp_path, "optimizer.name=dopr-adamw", "train.lr_decay=constant")
    train(config)
    longer = again(config, "train.steps=10")
    kept = "optimizer.dopr.damping=[100.0, 1.0, 4]"
    with pytest.raises(ConfigError, match=rf'keep it by "{re.escape(kept)}"$'):
        train(longer, resume=True)
    assert RunFolder.open(train(again(longer, kept), resume=True)).steps()[-1] == 10


def test_resuming_where_nothing_is_starts_and_says_so(tmp_path, capfd):
    run = train(tiny(tmp_path, "train.steps=1"), resume=True)
    assert f"no checkpoint in {run}: training starts at step 0\n" in capfd.readouterr().err
    train(tiny(tmp_path, "train.steps=1", "name=plain"))
    assert "no checkpoint" not in capfd.readouterr().err


def test_resuming_a_complete_run_does_nothing(tmp_path):
    config = tiny(tmp_path, "train.steps=2")
    path = train(config)
    before = (path / "metrics.jsonl").read_text()
    train(config, resume=True)
    assert (path / "metrics.jsonl").read_text() == before


def launch(path, settings, *more):
    command = [sys.executable, "-m", "flowdopr", "train", str(path), *settings, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_checkpoint(folder, process):
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/step-????????")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_loss_over_a_cut_is_the_loss_of_all_its_steps(tmp_path):
    config = tiny(tmp_path, "train.log_every=4", "train.checkpoint_every=3")
    straight = train(again(config, "name=straight"))
    cut = train(again(config, "name=cut"))
    shutil.rmtree(cut / "checkpoints" / "step-00000008")
    train(again(config, "name=cut"), resume=True)  # from step 6, between the lines of 4 and 8
    assert [line["step"] for line in without_times(cut)] == [4, 8, 8]
    assert without_times(cut) == without_times(straight)


@pytest.mark.parametrize(
    ("signum", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_stopped_at_any_moment(tmp_path, signum, code):
    settings = [
        "optimizer.name=dopr-adamw",
        "optimizer.dopr={refresh_every: 4, damping: 0.1}",
        "train.checkpoint_every=5",
    ]
    config = tiny(tmp_path, *settings, "train.steps=40")
    path, shared = tiny_file(tmp_path, *settings, "name=stopped")
    process = launch(path, shared, "train.steps=100000")
    run = tmp_path / "runs" / "stopped"
    wait_for_checkpoint(run, process)
    with pytest.raises(ValueError, match=f"process {process.pid} on .* is at work here; wait for"):
        train(again(config, "name=stopped", "train.steps=100000"), resume=True)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    if signum != signal.SIGKILL:
        assert "go on with the same command and --resume" in stderr.strip().split("\n")[-1]
    stopped_at = RunFolder.open(run).steps()[-1]
    total = stopped_at + 10
    straight = train(again(config, "name=straight", f"train.steps={total}"))
    resumed = train(again(config, "name=stopped", f"train.steps={total}"), resume=True)
    assert_same_checkpoint(straight, resumed, total)
    assert without_times(resumed) == without_times(straight)


def test_a_torn_checkpoint_or_metrics_line_does_no_harm(tmp_path):
    config = tiny(tmp_path, "train.steps=4")
    path = train(config)
    (path / "checkpoints" / "step-00000006.part").mkdir()
    with open(path / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 6, "lo')
    train(again(config, "train.steps=8"), resume=True)
    lines = (path / "metrics.jsonl").read_text().strip().split("\n")
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [2, 4, 4, 6, 8, 8]
    assert RunFolder.open(path).steps() == [4, 8]


def test_a_run_without_a_checkpoint_may_start_again(tmp_path):
    config = tiny(tmp_path)
    folder = tmp_path / "runs" / "tiny"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "versions.json").write_text("{}")  # stopped while the folder was being made
    (train(config) / "checkpoints" / "step-00000008").rename(tmp_path / "taken")
    assert RunFolder.open(train(again(config, "optimizer.lr=1e-4"))).config.optimizer.lr == 1e-4


def test_every_part_of_a_run_has_its_provenance(tmp_path, monkeypatch):
    config, provenance = tiny(tmp_path), import_module("flowdopr.runs.provenance")
    with monkeypatch.context() as of_old:
        of_old.setattr(provenance, "commit", lambda: "of old")
        path = train(again(config, "train.steps=3"))
    first = json.loads((path / "versions.json").read_text())
    assert (first["from_step"], first["earlier"]) == (0, [])
    launched = datetime.fromisoformat(first["launched"])
    assert abs((datetime.now(timezone.utc) - launched).total_seconds()) < 600
    train(again(config, "train.steps=5"), resume=True)
    for step in ("00000005", "00000008"):  # the last part leaves nothing that lasts
        shutil.rmtree(path / "checkpoints" / f"step-{step}", ignore_errors=True)
        train(config, resume=True)
        made_by = json.loads((path / "versions.json").read_text())
        assert [part["commit"] for part in made_by["earlier"]] == ["of old"]
        assert (made_by["from_step"], made_by["commit"]) == (3, provenance.commit())
        assert set(made_by["earlier"][0]) == set(first) - {"earlier", "checksum"}


def test_a_finished_run_keeps_its_provenance(tmp_path):
    path = train(tiny(tmp_path))
    before = json.loads((path / "versions.json").read_text())
    train(tiny(tmp_path), resume=True)
    assert json.loads((path / "versions.json").read_text()) == before
    assert "already complete at step 8" in (path / "log.txt").read_text()


def test_a_run_goes_on_with_changed_images_if_told_so(tmp_path, write_images, capsys):
    folder = write_images(tmp_path / "images", {"cat": 9, "dog": 9})
    settings = ["data.name=folder", f"data.root={folder}", "train.checkpoint_every=2"]
    path, shared = tiny_file(tmp_path, *settings)
    command = ["train", str(path), *shared]
    assert run_command([*command, "train.steps=2"]) == 0
    before = RunFolder.open(tmp_path / "runs" / "tiny").dataset
    assert (
        "data: folder, 16 images to train on, 2 held out, 3 x 8 x 8, 2 classes (cat, dog)"
        in capsys.readouterr().err
    )
    os.truncate(folder / "dog" / "3.png", 60)
    capsys.readouterr()
    more = [*command, "--resume", "data.on_bad_image=skip"]
    assert run_command(more) == 2
    assert "or go on with these by --resume --changed-data" in capsys.readouterr().err
    assert run_command([*command, "--changed-data"]) == 2
    assert "--changed-data: it belongs to --resume" in capsys.readouterr().err
    assert run_command([*more, "--changed-data"]) == 0
    assert "skipped as broken: 1, the first is" in capsys.readouterr().err
    run = RunFolder.open(tmp_path / "runs" / "tiny")
    assert (run.steps(), run.dataset.num_train) == ([2, 4, 6, 8], 15)
    assert run.made_by()["data"] == run.dataset.fingerprint
    assert run.made_by()["earlier"][0]["data"] == before.fingerprint
    assert run_command([*more, "train.steps=9"]) == 0  # these images are now the run's own
    write_images(folder, {"owl": 3})
    assert run_command([*more, "--changed-data"]) == 2
    assert "the class_names of the data was ('cat', 'dog'), now" in capsys.readouterr().err


def test_a_broken_image_ends_training_before_its_first_step(tmp_path, write_images):
    folder = write_images(tmp_path / "images", {"": 40})
    os.truncate(folder / "33.png", 60)
    config = tiny(tmp_path, "data.name=folder", f"data.root={folder}")
    with pytest.raises(
        ValueError, match=r"33.png' \(.*\); repair or remove it, or set data.on_bad"
    ):
        train(config)
    assert not (tmp_path / "runs").exists()
