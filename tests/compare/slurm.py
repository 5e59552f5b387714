"""SLURM's commands, as far as submitit uses them, for one machine without SLURM.

`install` puts a script for each command into a folder; a job is a process, whose number is in
JOB.pid there.
"""

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).parent


def install(folder: Path) -> None:
    folder.mkdir()
    (folder / "slurm.py").write_text(Path(__file__).read_text())
    for name in ("sbatch", "srun", "sacct", "scontrol", "scancel"):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {folder / "slurm.py"} {name} "$@"\n')
        script.chmod(0o755)


def start(job: str) -> None:
    subprocess.Popen(
        ["bash", (HERE / f"{job}.script").read_text()],
        env=os.environ | {"SLURM_JOB_ID": job, "SLURM_NTASKS": "1"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def process_of(job: str) -> int | None:
    """None before the job has begun, 0 after its end."""
    file = HERE / f"{job}.pid"
    if not file.exists():
        return None
    try:
        os.kill(int(file.read_text()), 0)
    except ProcessLookupError:
        return 0
    return int(file.read_text())


def sbatch(script: str) -> None:
    job = str(len(list(HERE.glob("*.script"))) + 1)
    (HERE / f"{job}.script").write_text(script)
    start(job)
    print(f"Submitted batch job {job}")


def srun(*arguments: str) -> None:
    job, options = os.environ["SLURM_JOB_ID"], list(arguments)
    command = options[options.index("--error") + 2 :]
    for stream, option in ((1, "--output"), (2, "--error")):
        path = options[options.index(option) + 1].replace("%j", job).replace("%t", "0")
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    (HERE / f"{job}.pid").write_text(str(os.getpid()))
    os.execvp(command[0], command)


def sacct(*arguments: str) -> None:
    print("JobID|State|NodeList")
    for option, job in pairwise(arguments):
        if option == "-j":
            state = {None: "PENDING", 0: "COMPLETED"}.get(process_of(job), "RUNNING")
            print(f"{job}|{state}|here")


def scontrol(action: str, job: str) -> None:
    """`requeue`, and what it starts for itself: `restart`, once the job has ended."""
    if action == "requeue":
        old = (HERE / f"{job}.pid").rename(HERE / f"{job}.old").read_text()
        again = [sys.executable, __file__, "scontrol", "restart", job]
        subprocess.Popen(again, env=os.environ | {"OLD": old}, start_new_session=True)
        return
    (HERE / f"{job}.requeued").touch()
    while Path("/proc", os.environ["OLD"]).exists():
        time.sleep(0.05)
    start(job)


def scancel(option: str, job: str) -> None:
    if option == "--signal=INT" and (process := process_of(job)):
        os.kill(process, signal.SIGINT)


if __name__ == "__main__":
    commands = {one.__name__: one for one in (sbatch, srun, sacct, scontrol, scancel)}
    commands[sys.argv[1]](*sys.argv[2:])
