"""Compare optimizers: run every arm x trial x seed, then report the results."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from flowdopr.callable_package import make_callable
from flowdopr.compare.cards import read_run
from flowdopr.compare.cluster import Cluster, ClusterExecutor
from flowdopr.compare.execute import Executor
from flowdopr.compare.plan import (
    RunPlan,
    check_overrides,
    reported,
    study_path,
    study_settings,
)
from flowdopr.compare.progress import Display
from flowdopr.compare.results import RunResult, read_result
from flowdopr.compare.statistics import chosen_trials
from flowdopr.compare.widen import searched
from flowdopr.compare.worker import train_and_evaluate
from flowdopr.config import Config, ConfigError, apply_overrides, to_yaml
from flowdopr.disk import locked, write_text
from flowdopr.evaluate import RealImages
from flowdopr.latents import build_datasets, build_pixel_datasets
from flowdopr.processes import device_of, this_process
from flowdopr.runs import RunFolder
from flowdopr.terminal import print_line, telling
from flowdopr.train import Interrupted

__all__ = ["StudyFailed", "check_overrides", "compare"]

make_callable(__name__)


class StudyFailed(RuntimeError):
    """Some runs of a study failed; the others and the report are complete."""

    exit_code = 1


def compare(
    config: Config,
    *,
    workers: int | None = None,
    report_only: bool = False,
    cluster: Cluster | None = None,
) -> Path:
    """Run the unfinished runs of the study in `config.compare`, then write its report.

    Finished runs are skipped, and stopped runs are continued. The report is made from the run
    folders alone. Prints the verdict and the paths of the report's files. A script of your own
    must call it under `if __name__ == "__main__":`, because the processes of the runs import it.

    Args:
        workers: runs at the same time, in place of `compare.workers`.
        report_only: run nothing, only make the report from the existing run folders.
        cluster: run each run as a job of SLURM, or of this machine, in place of a process.

    Returns:
        The study folder `<output>/<name>`: report.html, table.csv, table.tex, results.json, plots/,
        logs/ and one run folder for each run.

    Raises:
        ConfigError, ValueError: no `compare` section, wrong overrides, a training run in the study
            folder, a run folder of another config, a launch of several processes, another
            process is running this study, or `cluster` is not there.
        Interrupted: stopped by Ctrl-C or SIGTERM, after the runs have saved.
        StudyFailed: some runs failed; the report is written and lists them.
    """
    # Imported here because every worker imports this package, and importing matplotlib is slow.
    from flowdopr.compare.report import write_report
    from flowdopr.compare.study import build_study

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "compare starts the processes of its runs itself: run it without accelerate launch or "
            "torchrun, and set compare.workers"
        )
    if workers is not None:
        config = apply_overrides(config, [f"compare.workers={workers}"])
    if (study_path(config) / "config.yaml").exists():
        raise ConfigError(
            f"{study_path(config)}: a training run is here; choose another folder for the study by "
            "name=NEW"
        )
    failed: list[str] = []
    results = partial(_results, config, failed, report_only=report_only, cluster=cluster)
    runs = _tuned_and_reported(config, results)
    study = build_study(config, runs)
    write_report(study)
    print("\n".join([study.verdict.headline, *study.verdict.pairs]))
    for name in ("report.html", "table.csv", "table.tex", "results.json", "plots"):
        print(study.folder / name)
    if failed:
        raise StudyFailed(
            f"{study.folder}: {len(failed)} of {len(runs)} runs failed: {', '.join(failed)}"
        )
    return study.folder


def _tuned_and_reported(
    config: Config, results: Callable[[Sequence[RunPlan]], list[RunResult]]
) -> list[RunResult]:
    """All runs: those that choose the trials, then those that are reported.

    Args:
        results: runs what is unfinished of some plans.
    """
    runs = searched(config, results)
    found = {run.plan.name for run in runs}
    plans = reported(config, chosen_trials(runs))
    return runs + results([plan for plan in plans if plan.name not in found])


def _results(
    config: Config,
    failed: list[str],
    plans: Sequence[RunPlan],
    *,
    report_only: bool,
    cluster: Cluster | None,
) -> list[RunResult]:
    """The results of `plans`, after running the unfinished ones; names of failed runs go into
    `failed`."""
    runs = [read_run(plan) for plan in plans]
    unfinished = [run.plan for run in runs if not run.finished]
    if unfinished and not report_only:
        failed += _execute(config, unfinished, cluster, done=len(plans) - len(unfinished))
        runs = [read_run(plan) for plan in plans]
    return [read_result(run) for run in runs]


def _execute(
    config: Config, plans: Sequence[RunPlan], cluster: Cluster | None, *, done: int
) -> list[str]:
    """Train and evaluate `plans`; returns the names of the runs that failed."""
    folder = study_path(config)
    study_file = folder / "study.yaml"
    with locked(folder, "wait for it; --report-only shows what is there"):
        write_text(study_file, to_yaml(config))
        executor = _executor(config, cluster)
        _prepare(config)
        with Display(done + len(plans), done) as display, telling(display):
            executor.execute(plans, display)
    if executor.signum:
        raise Interrupted(
            f"{folder}: stopped; the same command, or flowdopr compare {study_file}, goes on",
            executor.signum,
        )
    return executor.failed


def _executor(config: Config, cluster: Cluster | None) -> Executor:
    settings = study_settings(config)
    if cluster is None:
        return Executor(train_and_evaluate, workers=settings.workers)
    return ClusterExecutor(
        train_and_evaluate,
        study_path(config),
        cluster,
        settings.cluster,
        workers=settings.workers,
    )


def _prepare(config: Config) -> None:
    """Find out before any run starts, and not after its training, whether the study's data and
    feature extractor are there; compute now what all runs need of the real images."""
    datasets = build_datasets(config)
    for path in sorted(study_path(config).glob("*/config.yaml")):
        if RunFolder.open(path.parent).dataset.fingerprint != datasets.info.fingerprint:
            raise ConfigError(
                f"{path.parent}: the images in {config.data.place} are not those this run was "
                "trained on; give those, or begin a study anew by name=NEW"
            )
    pixels = build_pixel_datasets(config) if datasets.info.autoencoder else datasets
    print_line(f"feature extractor for {config.data.name}")
    real = RealImages(pixels, config.evaluate, device_of(this_process()))
    if real.extractor.warning:
        print_line(f"warning: {real.extractor.warning}")
    real.prepare()
    del real
    torch.cuda.empty_cache()  # for the runs, which share the GPU with this process
