"""Several runs at the same time: their failures are reported and signals reach them."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from itertools import pairwise

import pytest

from flowdopr.compare.execute import Executor, usable_cores, worker_environment
from flowdopr.compare.plan import expand
from flowdopr.compare.progress import Display, last_step

FAIL = "import sys; print('first words'); sys.exit('the last words')"
WAIT = """
import pathlib, signal, sys, time
def leave(number, frame):
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, leave)
pathlib.Path(sys.argv[1]).write_text("started")
time.sleep(60)
"""


@pytest.fixture
def run(study, tmp_path, capsys):
    """`run(code_of)` executes the tiny study with `python -c` in place of its worker; returns the
    executor and what it printed."""
    plans = expand(study)

    def execute(code_of, workers=2):
        def command(plan):
            return [sys.executable, "-c", code_of(plan), str(tmp_path / plan.name)]

        executor = Executor(command, workers=workers)
        with Display(len(plans), 0) as display:
            executor.execute(plans, display)
        return executor, capsys.readouterr().err

    return execute


def test_a_failing_run_does_not_stop_the_others(run, study, tmp_path):
    bad = "AdamW-lr0.001-s0"
    touch = "import pathlib, sys; pathlib.Path(sys.argv[1]).touch()"
    executor, printed = run(lambda plan: FAIL if plan.name == bad else touch)
    assert (executor.failed, executor.signum) == ([bad], 0)
    assert "the last words" in printed
    assert "[4/4]" in printed
    done = {plan.name for plan in expand(study) if (tmp_path / plan.name).exists()}
    assert done == {plan.name for plan in expand(study)} - {bad}
    assert expand(study)[0].failure.read_text() == "first words\nthe last words\n"


def test_an_explained_failure_needs_no_log(run):
    code = "import sys; print('a long log'); sys.exit('error: lower the learning rate')"
    _, printed = run(lambda plan: code)
    assert "error: lower the learning rate" in printed
    assert "a long log" not in printed


def test_a_worker_stops_when_its_study_dies():
    code = """
        import os, threading, time
        from flowdopr.compare.worker import stop_when_closed
        threading.Thread(target=stop_when_closed, args=(0,), daemon=True).start()
        print("ready", flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as worker:
        assert worker.stdout.readline() == "ready\n"
        assert worker.poll() is None
        worker.communicate()  # closes its standard input, as the death of the study does
    assert worker.returncode == -signal.SIGTERM


def test_a_run_that_is_tried_again_is_no_longer_failed(run, study):
    run(lambda plan: FAIL)
    executor, _ = run(lambda plan: "")
    assert executor.failed == []
    assert not any(plan.failure.exists() for plan in expand(study))


def test_never_more_than_workers_at_a_time(run, study):
    code = "import sys, time; t = time.time(); time.sleep(0.5); print(t, time.time())"
    run(lambda plan: code, workers=1)
    logs = [plan.log.read_text() for plan in expand(study)]
    spans = sorted(tuple(map(float, log.split())) for log in logs)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_a_signal_reaches_the_runs_and_starts_no_more(run, study, tmp_path):
    first, second, *others = [tmp_path / plan.name for plan in expand(study)]

    def interrupt():
        while not (first.exists() and second.exists()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    executor, printed = run(lambda plan: WAIT)
    assert executor.signum == signal.SIGTERM
    assert executor.failed == []
    assert first.read_text() == second.read_text() == "saved"
    assert not any(path.exists() for path in others)
    assert printed.count("stopped") == 2
    assert "[0/4]" in printed


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    environments = [worker_environment(slot, 2) for slot in range(3)]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in environments] == ["3", "5", "3"]
    assert int(environments[0]["OMP_NUM_THREADS"]) == max(1, usable_cores() // 2)
    assert worker_environment(0, 10_000)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("text", "step"), [('{"step": 2}\n{"step": 4}\n', 4), ('{"step": 2}\n{"st', 2), ("", 0)]
)
def test_last_step_leaves_out_a_line_that_is_being_written(tmp_path, text, step):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert last_step(tmp_path) == step
    assert last_step(tmp_path / "nowhere") == 0
