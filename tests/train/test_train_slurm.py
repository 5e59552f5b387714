"""The batch script of docs/operations.md, with scripts in the place of SLURM's commands: a job that
is signalled before its time limit saves, is queued again, and goes on."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny_file

from flowdopr.compare.progress import last_step
from flowdopr.runs import RunFolder

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
JOB = "123"
SRUN = """
import os, signal, subprocess, sys
tasks = [
    subprocess.Popen(sys.argv[1:], env=os.environ | {"SLURM_PROCID": i, "SLURM_LOCALID": i})
    for i in map(str, range(int(os.environ["SLURM_NTASKS"])))
]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
open("srun.pid", "w").write(str(os.getpid()))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """
import sys
print("127.0.0.1" if sys.argv[1] == "show" else open("requeued", "a").write(sys.argv[2]))
"""


@pytest.fixture
def commands(tmp_path):
    """A folder with `srun`, which hands SIGUSR1 on, and `scontrol`, which notes what it queues."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, code in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / name).write_text(f"#!{sys.executable}\n{code}")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [1, 2])
def test_a_job_before_its_time_limit_is_queued_again_and_goes_on(tmp_path, commands, tasks):
    (script,) = re.findall(r"```bash\n(#!/bin/bash.*?)```", PAGE.read_text(), re.DOTALL)
    path, shared = tiny_file(tmp_path, "train.checkpoint_every=1000")
    run = tmp_path / "runs" / "tiny"
    environment = {"SLURM_JOB_ID": JOB, "SLURM_NTASKS": str(tasks), "SLURM_JOB_NODELIST": "here"}
    environment = os.environ | environment | {"PATH": f"{commands}:{os.environ['PATH']}"}

    def start(steps):
        wanted = script.replace("configs/folder.yaml", " ".join([str(path), *shared, steps]))
        wanted = wanted.replace("exec python", f"exec {sys.executable}")
        return subprocess.Popen(["bash", "-c", wanted], cwd=tmp_path, env=environment)

    job = start("train.steps=1000000")
    while last_step(run) < 4:
        assert job.poll() is None
        time.sleep(0.05)
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGUSR1)
    assert job.wait(timeout=120) == 128 + signal.SIGUSR1
    assert (tmp_path / "requeued").read_text() == JOB
    (saved,) = RunFolder.open(run).steps()
    assert start(f"train.steps={saved + 6}").wait(timeout=200) == 0
    assert (tmp_path / "requeued").read_text() == JOB
    assert f"going on from step {saved}" in (run / "log.txt").read_text()
    assert RunFolder.open(run).steps() == [saved, saved + 6]
