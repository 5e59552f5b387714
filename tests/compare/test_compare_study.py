"""A real study, small: interrupted, gone on with, and then left alone because it is done."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from flowdopr.compare import StudyFailed, compare, execute, worker
from flowdopr.compare.cards import read_run
from flowdopr.compare.forecast import forecast
from flowdopr.compare.plan import expand, reported, study_path
from flowdopr.compare.progress import last_step
from flowdopr.compare.results import read_result
from flowdopr.config import ConfigError, apply_overrides
from flowdopr.disk import locked
from flowdopr.evaluate import classifier
from flowdopr.runs import RunFolder
from flowdopr.train import Interrupted, train

LONG = 300  # steps of the run that is interrupted: more than a second on any machine


@pytest.fixture
def quick(study, tmp_path, monkeypatch):
    """Two runs, one after the other; a classifier of a few steps, kept with the test."""
    monkeypatch.setenv("FLOWDOPR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(classifier, "STEPS", 5)
    monkeypatch.setattr(execute, "usable_cores", lambda: 1)
    return apply_overrides(
        study,
        [
            "compare.seeds=[0]",
            "compare.workers=1",
            "compare.nfe_steps=[1]",
            "train.checkpoint_every=null",
            "compare.arms=[{name: short, lrs: [1e-3]}, {name: long, lrs: [1e-3], "
            f"set: {{train.steps: {LONG}}}}}]",
        ],
    )


def interrupt_during(plan):
    while last_step(plan.path) < 2:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_interrupted_then_gone_on_with_then_left_alone(quick, capfd):
    short, long = expand(quick)
    thread = threading.Thread(target=interrupt_during, args=(long,))
    thread.start()
    with pytest.raises(Interrupted, match="goes on") as caught:
        compare(quick)
    thread.join()
    assert caught.value.exit_code == 143
    assert read_run(short).finished
    assert not read_run(long).finished
    saved = RunFolder.open(long.path).steps()
    assert 0 < saved[-1] < LONG
    before = stamps(short.path)

    folder = compare(quick)
    assert stamps(short.path) == before
    assert read_run(long).finished
    assert f"going on from step {saved[-1]}" in (long.path / "log.txt").read_text()
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert [row["arm"] for row in rows] == ["short", "long"]
    assert all(float(row["fd_mean"]) > 0 for row in rows)

    everything = stamps(study_path(quick) / long.name)
    capfd.readouterr()
    compare(quick)
    assert stamps(study_path(quick) / long.name) == everything
    assert "long" not in capfd.readouterr().err


def test_a_run_whose_samples_are_not_finite_is_a_failed_one(quick):
    arms = (
        "[{name: good, lrs: [1e-3]}, "
        "{name: wild, lrs: [1e-3], set: {sample.guidance.scale: 1e300}}]"
    )
    study = apply_overrides(quick, ["train.steps=8", f"compare.arms={arms}"])
    with pytest.raises(StudyFailed, match=r"1 of 2 runs failed: wild-lr0.001-s0"):
        compare(study)
    good, wild = [read_result(read_run(plan)) for plan in expand(study)]
    assert good.status == "done"
    assert wild.status == "failed"
    assert re.search(r"wild-lr0.001-s0: step 8: 40 of the images 0 to 39 are not", wild.reason)
    rows = list(csv.DictReader((study_path(study) / "table.csv").read_text().splitlines()))
    assert [(row["arm"], row["seeds"], row["seeds_failed"]) for row in rows] == [
        ("good", "1", "0"),
        ("wild", "0", "1"),
    ]
    page = (study_path(study) / "report.html").read_text()
    assert "1 run failed, which no mean includes: wild-lr0.001-s0" in page
    assert "<td>0, 1 failed</td>" in page


def test_a_study_and_a_run_never_share_a_folder(quick):
    run = apply_overrides(quick, ["train.steps=1", "compare=null"])
    folder = train(run)
    before = stamps(folder)
    for report_only in (False, True):
        with pytest.raises(ConfigError, match=r"a training run is here; .*by name=NEW") as caught:
            compare(quick, report_only=report_only)
        assert "\n" not in str(caught.value)
    assert stamps(folder) == before
    study = apply_overrides(quick, ["name=study"])
    compare(study, report_only=True)
    with pytest.raises(ConfigError, match="has files but is not a run; choose another by name=NEW"):
        train(apply_overrides(run, ["name=study"]))


def test_a_study_that_another_process_works_on_is_refused(quick):
    study = study_path(quick)
    code = f"""if True:
        from pathlib import Path
        from flowdopr.disk import locked
        with locked(Path({str(study)!r}), ""):
            input(print("locked", flush=True))
    """
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match=f"process {other.pid} on .* is at work") as caught:
            compare(quick)
        assert "\n" not in str(caught.value)
        assert not (study / "study.yaml").exists()
        compare(quick, report_only=True)
        other.communicate(b"\n")


def test_several_processes_may_not_run_one_study(quick, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without accelerate launch"):
        compare(quick)
    assert not study_path(quick).exists()


def test_tuning_runs_come_first_and_only_the_chosen_rate_is_reported(quick):
    config = apply_overrides(
        quick,
        [
            "compare.arms=[{name: a, lrs: [1e-4, 1e-2]}]",
            "compare.tuning_seeds=[7]",
            "compare.evaluation_seeds=[1]",
        ],
    )
    assert "a: 2 trials, 3 runs of 8 steps; left: 3 runs" in forecast(config)
    folder = compare(config)
    assert "a: 2 trials, 3 runs of 8 steps; left: 0 runs" in forecast(config)
    results = json.loads((folder / "results.json").read_text())
    finals = {run["lr"]: run["final"]["fd"] for run in results["runs"] if run["seed"] == 7}
    (reported,) = [run for run in results["runs"] if run["seed"] == 0]
    assert reported["lr"] == min(finals, key=finals.get) == results["arms"][0]["lr"]
    assert results["arms"][0]["fd_mean"] == reported["final"]["fd"]
    (other,) = reported["by_noise"]
    assert other["fd"] != reported["final"]["fd"]
    assert len(list(folder.glob("a-lr*"))) == 3


def test_a_wider_grid_shorter_runs_and_more_averages(quick):
    """One study uses them all: its runs, its cards, and what the shorter runs took over."""
    config = apply_overrides(
        quick,
        [
            "compare.arms=[{name: a, lrs: [1e-5, 1e-4]}, {name: b, lrs: [1e-5, 1e-4]}]",
            *("compare.tuning_seeds=[7]", "compare.widen=1", "compare.workers=2"),
            *("train.lr_decay=cooldown", "train.cooldown_steps=2", "train.checkpoint_every=4"),
            *("compare.train_steps=[6]", "compare.weights=[raw]"),
        ],
    )
    folder = compare(config)
    results = json.loads((folder / "results.json").read_text())
    names = {run["name"] for run in results["runs"]}
    wider = {name for name in names if re.fullmatch(r"[ab]-lr(0\.001|1e-06|3\.16e-05)-s7", name)}
    assert len(wider) == 2
    assert all(arm["trials"] == 3 for arm in results["arms"])
    ends = {run["name"]: run for run in results["runs"] if not run["tuning"]}
    assert len(ends) == 4
    for name, run in ends.items():
        assert [one["step"] for one in run["by_weights"]["raw"]] == (
            [6] if run["shorter"] else [4, 8]
        )
        assert run["by_weights"]["raw"][-1]["one_step_loss"] != run["final"]["one_step_loss"]
        if run["shorter"]:
            assert "going on from step 4" in (folder / name / "log.txt").read_text()
            assert name.removesuffix("-steps6") in ends
    *arms, time = forecast(config).splitlines()
    assert all("3 trials, 5 runs of 6 to 8 steps; left: 0 runs" in line for line in arms)
    assert time.startswith("Training time left: 0:00:00")
    before = {path: stamps(folder / path) for path in names}
    compare(config)
    assert {path: stamps(folder / path) for path in names} == before


def test_a_shorter_run_takes_nothing_over_while_another_process_works_on_it(quick, monkeypatch):
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 0.0)
    cooldown = ["train.lr_decay=cooldown", "train.cooldown_steps=2", "train.checkpoint_every=4"]
    config = apply_overrides(quick, [*cooldown, "compare.train_steps=[6]"])
    long, short, *_ = reported(config, expand(config))
    train(long.config)
    with locked(short.path, ""), pytest.raises(ValueError, match="is at work here"):
        worker.train_and_evaluate(short)
    assert not (short.path / "config.yaml").exists()


def test_optimizers_of_other_packages_are_arms_and_pair_by_their_class(quick):
    outside = "optimizer.name: outside, optimizer.class_path"
    free = "schedulefree.AdamWScheduleFree, train.ema_decays: []"
    arms = [
        f"{{name: free, lrs: [1e-3], set: {{{outside}: {free}}}}}",
        f"{{name: dopr-free, lrs: [1e-3], set: {{{outside}: {free}, optimizer.dopr: {{}}}}}}",
        f"{{name: lion, lrs: [1e-3], set: {{{outside}: pytorch_optimizer.Lion}}}}",
    ]
    settings = [f"compare.arms=[{', '.join(arms)}]", "train.checkpoint_every=4"]
    folder = compare(apply_overrides(quick, settings))
    results = json.loads((folder / "results.json").read_text())
    assert [arm["optimizer"] for arm in results["arms"]] == [
        "schedulefree.AdamWScheduleFree",
        "schedulefree.AdamWScheduleFree",
        "pytorch_optimizer.Lion",
    ]
    (pair,) = results["verdict"]["pairs"]
    assert pair.startswith("dopr-free over free: ")
