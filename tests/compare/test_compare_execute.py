"""Several runs at the same time: their failures are reported and signals reach them."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
from threadpoolctl import threadpool_info

from flowdopr.compare.execute import Executor, gpu_of, usable_cores
from flowdopr.compare.plan import expand, reported
from flowdopr.compare.progress import Display, last_step
from flowdopr.config import apply_overrides

BAD = "AdamW-lr0.001-s0"


def mark(plan, text=""):
    """Leave a file that shows that the run was here."""
    (plan.path.parent / f"{plan.name}.mark").write_text(text)


def marked(plan):
    path = plan.path.parent / f"{plan.name}.mark"
    return path.read_text() if path.exists() else None


def fail_once(plan):
    if plan.name == BAD:
        print("first words")
        sys.exit("the last words")
    mark(plan)


def fail(plan):
    print("a long log")
    raise ValueError("lower the learning rate")


def crash(plan):
    raise KeyError("no such thing")


def nothing(plan):
    pass


def tell_the_time(plan):
    began = time.time()
    time.sleep(0.5)
    print(began, time.time())


def tell_the_threads(plan):
    print(torch.get_num_threads(), max(pool["num_threads"] for pool in threadpool_info()))
    print(os.environ.get("CUDA_VISIBLE_DEVICES"))


def tell_a_variable(plan):
    print(os.environ["OF_THE_STUDY"])


def wait_for_a_signal(plan):
    def leave(number, frame):
        mark(plan, "saved")
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    mark(plan, "started")
    time.sleep(60)


@pytest.fixture
def run(study, capsys):
    """`run(work)` executes the tiny study with `work` in place of training; returns the executor
    and what it printed."""
    plans = expand(study)

    def execute(work, workers=2):
        executor = Executor(work, workers=workers)
        with Display(len(plans), 0) as display:
            executor.execute(plans, display)
        return executor, capsys.readouterr().err

    return execute


def test_a_failing_run_does_not_stop_the_others(run, study):
    executor, printed = run(fail_once)
    assert (executor.failed, executor.signum) == ([BAD], 0)
    assert "the last words" in printed
    assert "[4/4," in printed
    done = {plan.name for plan in expand(study) if marked(plan) is not None}
    assert done == {plan.name for plan in expand(study)} - {BAD}
    assert expand(study)[0].failure.read_text() == "first words\nthe last words\n"


def test_an_explained_failure_needs_no_log(run):
    _, printed = run(fail)
    assert "error: lower the learning rate" in printed
    assert "a long log" not in printed


def test_an_unexplained_failure_shows_where_it_happened(run):
    _, printed = run(crash)
    assert "KeyError: 'no such thing'" in printed
    assert "in crash" in printed


def test_a_worker_stops_when_its_study_dies(study, tmp_path):
    code = f"""
        import os, sys, threading, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from flowdopr.compare.execute import Executor
        from flowdopr.compare.plan import expand
        from flowdopr.compare.progress import Display
        from flowdopr.config import load_config
        from test_compare_execute import marked, wait_for_a_signal
        plans = expand(load_config({str(tmp_path / "study.yaml")!r}))[:1]
        def die():
            while marked(plans[0]) != "started":
                time.sleep(0.05)
            os.kill(os.getpid(), 9)
        threading.Thread(target=die).start()
        with Display(1, 0) as display:
            Executor(wait_for_a_signal, workers=1).execute(plans, display)
    """
    died = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert died.returncode == -signal.SIGKILL
    plan, deadline = expand(study)[0], time.monotonic() + 20
    while marked(plan) != "saved" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert marked(plan) == "saved"


def test_a_run_that_dies_before_it_prints_fails_with_a_likely_reason(study, tmp_path):
    script = tmp_path / "script.py"  # its processes import it, and fail because they start others
    script.write_text(f"""
from flowdopr.compare.execute import Executor
from flowdopr.compare.plan import expand
from flowdopr.compare.progress import Display
from flowdopr.config import load_config
plans = expand(load_config({str(tmp_path / "study.yaml")!r}))[:1]
with Display(1, 0) as display:
    Executor(print, workers=1).execute(plans, display)
""")
    subprocess.run([sys.executable, script], check=True)
    assert "__main__" in expand(study)[0].failure.read_text()


def test_a_worker_has_the_variables_that_are_set_now(run, study, monkeypatch):
    for value in ("one", "other"):
        monkeypatch.setenv("OF_THE_STUDY", value)
        run(tell_a_variable)
        assert expand(study)[0].log.read_text() == f"{value}\n"


def test_ctrl_c_while_the_first_run_starts_stops_the_study(study, tmp_path):
    """It reaches all processes of the terminal, here of a session of their own."""
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from flowdopr.compare.execute import Executor
        from flowdopr.compare.plan import expand
        from flowdopr.compare.progress import Display
        from flowdopr.config import load_config
        from test_compare_execute import wait_for_a_signal
        plans = expand(load_config({str(tmp_path / "study.yaml")!r}))
        executor = Executor(wait_for_a_signal, workers=2)
        with Display(4, 0) as display:
            executor.execute(plans, display)
        print(executor.signum, executor.failed)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as started:
        own, deadline = psutil.Process(started.pid), time.monotonic() + 60
        while time.monotonic() < deadline and not any(
            "forkserver" in " ".join(child.cmdline()) for child in own.children()
        ):
            time.sleep(0.05)
        time.sleep(0.5)  # it imports torch now
        os.killpg(started.pid, signal.SIGINT)
        assert started.communicate(timeout=60)[0].split("\n")[0] == f"{signal.SIGINT:d} []"
    assert started.returncode == 0


def test_a_run_that_is_tried_again_is_no_longer_failed(run, study):
    run(fail)
    executor, _ = run(nothing)
    assert executor.failed == []
    assert not any(plan.failure.exists() for plan in expand(study))


def test_never_more_than_workers_at_a_time(run, study):
    run(tell_the_time, workers=1)
    logs = [plan.log.read_text() for plan in expand(study)]
    spans = sorted(tuple(map(float, log.split())) for log in logs)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_a_signal_reaches_the_runs_and_starts_no_more(run, study):
    first, second, *others = expand(study)

    def interrupt():
        while not (marked(first) and marked(second)):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    executor, printed = run(wait_for_a_signal)
    assert executor.signum == signal.SIGTERM
    assert executor.failed == []
    assert marked(first) == marked(second) == "saved"
    assert not any(map(marked, others))
    assert printed.count("stopped") == 2
    assert "[0/4," in printed


def test_a_shorter_run_waits_for_the_longer_one(study, capsys):
    cooling = ["train.lr_decay=cooldown", "train.cooldown_steps=2", "compare.train_steps=[6]"]
    config = apply_overrides(study, [*cooling, "compare.seeds=[0]"])
    plans = reported(config, expand(config)[::2])
    assert [plan.starts_from for plan in plans] == [None, "AdamW-lr0.001-s0"]
    executor = Executor(tell_the_time, workers=2)
    with Display(2, 0) as display:
        executor.execute(plans, display)
    (_, end), (start, _) = (map(float, plan.log.read_text().split()) for plan in plans)
    assert end <= start


def test_workers_share_the_cores_and_the_gpus(run, study, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [gpu_of(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["3", "5", "3"]
    run(tell_the_threads, workers=2)
    share = max(1, usable_cores() // 2)
    logs = [plan.log.read_text().split() for plan in expand(study)]
    assert {tuple(log[:2]) for log in logs} == {(str(share), str(share))}
    assert {log[2] for log in logs} == {"3", "5"}


def test_the_progress_of_a_study_has_loss_rate_and_time_left(study):
    plans = expand(study)
    metrics = plans[0].path / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    with Display(len(plans), 1) as display:
        display.started(plans[0].name)
        for step in (2, 4):
            line = {"step": step, "loss": 1 / step, "images_per_second": 1234.5}
            skipped = {"step": step + 1, "skipped": 1}
            metrics.write_text(f"{json.dumps(line)}\n{json.dumps(skipped)}\n")
            display.update(plans[:1])
            time.sleep(0.1)
    words = rf"\[1/4\] 0:00:0\d left, {plans[0].name}: step 5 of 8, loss 0.2500, 1,23\d images/s"
    assert re.fullmatch(words, str(display))


@pytest.mark.parametrize(
    ("text", "step"), [('{"step": 2}\n{"step": 4}\n', 4), ('{"step": 2}\n{"st', 2), ("", 0)]
)
def test_last_step_leaves_out_a_line_that_is_being_written(tmp_path, text, step):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert last_step(tmp_path) == step
    assert last_step(tmp_path / "nowhere") == 0
