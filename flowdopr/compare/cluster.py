"""Runs of a study as jobs of a cluster, which submitit submits: `flowdopr compare --cluster`.

A job does what a worker on this machine does. This process submits the jobs and watches them; a run
has ended well if its folder says so. What a signal means to a job:

- SIGINT: it saves and ends. Ctrl-C in this process sends it, after taking back the jobs that wait.
- SIGUSR2: it saves and is queued again, where it goes on. SLURM sends it before the time limit, and
  before it preempts a job.
- SIGTERM: it saves and waits for one of the two, or for its end. It comes first where a job is
  preempted, but also where a user cancels a job, which must not be queued again.
"""

from __future__ import annotations

import math
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import psutil

from flowdopr.compare.cards import read_run
from flowdopr.compare.execute import Executor
from flowdopr.compare.plan import RunPlan
from flowdopr.compare.worker import Work, outcome, print_into
from flowdopr.config import ConfigError

Cluster = Literal["slurm", "local"]
TIMEOUTS = 1000
"""How often a job may reach its time limit: each time, the run gets on."""
ASKS_EVERY = 5.0
"""Seconds between questions to SLURM once the study is being stopped."""
ONE_PROCESS = ("nodes", "tasks_per_node", "slurm_ntasks_per_node")
"""Parameters that would let several processes train the same run."""


class Job:
    """What submitit calls in a job, and queues again."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, plan: RunPlan) -> None:
        print_into(plan.log)
        ending = outcome(self.work, plan)
        if ending == 128 + signal.SIGUSR2:
            signal.raise_signal(signal.SIGUSR2)  # now that it is saved, submitit deals with it
        while ending == 128 + signal.SIGTERM:
            signal.pause()
        if ending:
            print(ending, flush=True)

    def checkpoint(self, plan: RunPlan) -> Any:
        """What submitit queues again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, plan)


class JobWorker:
    """A worker that is a job of a cluster."""

    def __init__(self, plan: RunPlan, job: Any, cluster: Cluster) -> None:
        self.plan, self.job, self.cluster = plan, job, cluster
        self.asks_again = math.inf
        """When SLURM is asked next; submitit itself asks ever more seldom, up to ten minutes."""

    @property
    def exitcode(self) -> int | None:
        asks = time.monotonic() > self.asks_again
        if asks:
            self.asks_again = time.monotonic() + ASKS_EVERY
        if not self.job.done(force_check=asks):
            return None
        return 0 if read_run(self.plan).finished else 1

    def stop(self, signum: int) -> None:
        self.asks_again = 0.0
        if self.cluster == "slurm":
            for option in ("--state=PENDING", "--signal=INT"):
                subprocess.call(["scancel", option, self.job.job_id])
        elif psutil.pid_exists(int(self.job.job_id)):
            for task in psutil.Process(int(self.job.job_id)).children():
                task.send_signal(signal.SIGINT)

    def kill(self) -> None:
        self.job.cancel(check=False)

    def close(self) -> None:
        job_file(self.plan).unlink(missing_ok=True)
        errors = self.job.paths.stderr
        if not self.plan.log.stat().st_size and errors.exists():
            self.plan.log.write_bytes(errors.read_bytes())


def job_file(plan: RunPlan) -> Path:
    """Holds the number of the job that works on the run."""
    return plan.log.with_suffix(".job")


class ClusterExecutor(Executor):
    """Submits one job for each run of a study and watches them.

    Jobs outlive a study's process that was killed; the next one watches those of SLURM on. The lock
    of the run folder keeps two jobs from training the same run.

    Args:
        folder: of the study, which all machines of the cluster must see.
        parameters: submitit's, by its names.
        workers: the number of jobs that wait or run at the same time.

    Raises:
        ConfigError: submitit or SLURM is not installed, or a parameter is wrong.
    """

    def __init__(
        self,
        work: Work,
        folder: Path,
        cluster: Cluster,
        parameters: Mapping[str, Any],
        *,
        workers: int,
    ) -> None:
        super().__init__(work, workers=workers)
        self.folder = folder / "jobs"
        self.cluster: Cluster = cluster
        self.submitit = _submitit(cluster)
        if refused := [name for name in ONE_PROCESS if parameters.get(name, 1) != 1]:
            raise ConfigError(f"compare.cluster.{refused[0]}: a run is one process; remove it")
        try:
            self.jobs = self.submitit.AutoExecutor(
                self.folder, cluster, **{f"{cluster}_max_num_timeout": TIMEOUTS}
            )
            self.jobs.update_parameters(**{"name": folder.name, **parameters})
        except (NameError, ValueError, AssertionError) as error:
            raise ConfigError(f"compare.cluster: {_first_line(error)}") from None

    def _worker(self, plan: RunPlan, slot: int) -> JobWorker:
        job = self._running(plan)
        if job is None:
            plan.log.write_bytes(b"")  # of an earlier job
            job = self.jobs.submit(Job(self.work), plan)
            job_file(plan).write_text(job.job_id)
        return JobWorker(plan, job, self.cluster)

    def _running(self, plan: RunPlan) -> Any:
        """The job that an earlier process has submitted for this run, if it has not ended."""
        if not job_file(plan).exists():
            return None
        kind = self.submitit.SlurmJob if self.cluster == "slurm" else self.submitit.LocalJob
        job = kind(self.folder, job_file(plan).read_text())
        return None if job.done() else job


def _submitit(cluster: Cluster) -> Any:
    try:
        import submitit
    except ImportError:
        raise ConfigError(
            "--cluster needs the package submitit: pip install 'flowdopr[slurm]'"
        ) from None
    if cluster == "slurm" and not all(map(shutil.which, ("sbatch", "srun"))):
        raise ConfigError(
            "--cluster slurm: sbatch and srun are not on the PATH; run this on a login node of the "
            "cluster, or leave --cluster out"
        )
    return submitit


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
