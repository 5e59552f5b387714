"""Runs as jobs of submitit's local executor: the same numbers, failures alone, and going on after
an interruption, a preemption or the death of the study's process."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from slurm import install

from flowdopr.cli import run_command
from flowdopr.compare import StudyFailed, compare, execute
from flowdopr.compare.cards import read_run
from flowdopr.compare.cluster import job_file
from flowdopr.compare.plan import expand, study_path
from flowdopr.compare.progress import last_step
from flowdopr.compare.results import read_result
from flowdopr.config import ConfigError, apply_overrides, to_yaml
from flowdopr.evaluate import classifier
from flowdopr.runs import RunFolder
from flowdopr.train import Interrupted

LONG = 300  # steps of a run that is interrupted: more than a second on any machine

pytest.importorskip("submitit")


@pytest.fixture
def quick(study, tmp_path, monkeypatch):
    """Two runs, one after the other; a classifier of a few steps, kept with the test."""
    monkeypatch.setenv("FLOWDOPR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(classifier, "STEPS", 5)
    monkeypatch.setattr(execute, "usable_cores", lambda: 1)
    changes = ["compare.seeds=[0]", "compare.workers=1", "compare.nfe_steps=[1]"]
    return apply_overrides(study, changes)


@pytest.fixture
def long(quick):
    """One long run."""
    arms = "compare.arms=[{name: a, lrs: [1e-3]}]"
    return apply_overrides(quick, [arms, f"train.steps={LONG}", "train.checkpoint_every=null"])


def job_of(plan):
    """The process of the run's job, once it trains."""
    while last_step(plan.path) < 2:
        time.sleep(0.05)
    (task,) = psutil.Process(int(job_file(plan).read_text())).children()
    return task


def during(plan, action):
    thread = threading.Thread(target=lambda: action(job_of(plan)))
    thread.start()
    return thread


def finals(config):
    return [read_result(read_run(plan)).final for plan in expand(config)]


def weights(config):
    (plan,) = expand(config)
    return RunFolder.open(plan.path).weights_file(LONG, "raw").read_bytes()


@pytest.mark.slow
def test_jobs_give_the_numbers_of_processes(quick):
    compare(quick)
    again = apply_overrides(quick, ["name=again"])
    compare(again, cluster="local")
    assert finals(again) == finals(quick)
    assert not any(job_file(plan).exists() for plan in expand(again))


@pytest.mark.slow
def test_a_failing_run_fails_alone(quick):
    wild = "{name: wild, lrs: [1e-3], set: {sample.guidance.scale: 1e300}}"
    config = apply_overrides(quick, [f"compare.arms=[{{name: good, lrs: [1e-3]}}, {wild}]"])
    with pytest.raises(StudyFailed, match=r"1 of 2 runs failed: wild-lr0\.001-s0"):
        compare(config, cluster="local")
    good, bad = expand(config)
    assert read_run(good).finished
    assert "images 0 to 39 are not" in bad.failure.read_text()


@pytest.mark.slow
def test_an_interrupted_study_goes_on(long):
    (plan,) = expand(long)
    thread = during(plan, lambda job: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match="goes on"):
        compare(long, cluster="local")
    thread.join()
    saved = RunFolder.open(plan.path).steps()[-1]
    assert 0 < saved < LONG
    compare(long, cluster="local")
    assert read_run(plan).finished
    assert f"going on from step {saved}" in (plan.path / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("first", [None, signal.SIGTERM])
def test_a_preempted_job_is_queued_again_and_ends_bitwise_equal(long, first):
    """SIGUSR2 alone, as before a time limit, or after SIGTERM, as in a preemption."""

    def preempt(job):
        if first is not None:
            job.send_signal(first)
        job.send_signal(signal.SIGUSR2)

    whole = apply_overrides(long, ["name=whole"])
    compare(whole)
    (plan,) = expand(long)
    thread = during(plan, preempt)
    compare(long, cluster="local")
    thread.join()
    assert "going on from step" in (plan.path / "log.txt").read_text()
    assert weights(long) == weights(whole)
    assert finals(long) == finals(whole)


@pytest.mark.slow
def test_a_job_that_outlives_its_study_is_not_run_twice(long):
    """The study's process is killed; the next one's job waits for the lock of the run folder."""
    (plan,) = expand(long)
    config = study_path(long).parent / "long.yaml"
    config.write_text(to_yaml(long))
    command = [sys.executable, "-m", "flowdopr", "compare", str(config), "--cluster", "local"]
    with subprocess.Popen(command) as first:
        job_of(plan)
        first.kill()
    compare(long, cluster="local")
    assert read_run(plan).finished
    assert "going on from step" not in (plan.path / "log.txt").read_text()


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The folder of commands that behave as SLURM's."""
    install(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{tmp_path / 'slurm'}:{os.environ['PATH']}")
    return tmp_path / "slurm"


def wait_for(file):
    while not file.exists():
        time.sleep(0.05)


@pytest.mark.slow
def test_slurm_queues_a_run_again_and_the_next_study_watches_its_job_on(long, slurm):
    """The job is preempted, and the study's process killed; the next one submits nothing."""
    (plan,) = expand(long)
    config = study_path(long).parent / "long.yaml"
    config.write_text(to_yaml(long))
    command = [sys.executable, "-m", "flowdopr", "compare", str(config), "--cluster", "slurm"]
    with subprocess.Popen(command) as first:
        while last_step(plan.path) < 2:
            time.sleep(0.05)
        os.kill(int((slurm / "1.pid").read_text()), signal.SIGUSR2)
        wait_for(slurm / "1.requeued")
        first.kill()
    compare(long, cluster="slurm")
    assert read_run(plan).finished
    assert "going on from step" in (plan.path / "log.txt").read_text()
    assert not (slurm / "2.script").exists()


@pytest.mark.slow
def test_slurms_jobs_save_when_the_study_is_stopped(long, slurm):
    (plan,) = expand(long)

    def interrupt():
        while last_step(plan.path) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    parameters = "compare.cluster={timeout_min: 120, slurm_partition: gpu}"
    with pytest.raises(Interrupted):
        compare(apply_overrides(long, [parameters]), cluster="slurm")
    thread.join()
    script = Path((slurm / "1.script").read_text()).read_text()
    for flag in ("--partition=gpu", "--time=120", "--job-name=tiny", "--signal=USR2@90"):
        assert f"#SBATCH {flag}\n" in script
    assert 0 < RunFolder.open(plan.path).steps()[-1] < LONG


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ("{timeout_mim: 5}", "timeout_mim"),
        ("{slurm_partitoin: gpu}", "partitoin"),
        ("{tasks_per_node: 2}", "tasks_per_node: a run is one process"),
        ("{timeout_min: soon}", "timeout_min"),
    ],
)
def test_a_wrong_parameter_is_refused_in_one_line(quick, parameters, words):
    config = apply_overrides(quick, [f"compare.cluster={parameters}"])
    with pytest.raises(ConfigError, match=rf"^compare\.cluster.*{words}") as caught:
        compare(config, cluster="local")
    assert "\n" not in str(caught.value)


def test_without_slurm_or_submitit_one_line_says_so(quick, tmp_path, monkeypatch, capsys):
    config = tmp_path / "quick.yaml"
    config.write_text(to_yaml(quick))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_command(["compare", str(config), "--cluster", "slurm"]) == 2
    assert "sbatch and srun are not on the PATH" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert run_command(["compare", str(config), "--cluster", "slurm"]) == 2
    assert "pip install 'flowdopr[slurm]'" in capsys.readouterr().err
