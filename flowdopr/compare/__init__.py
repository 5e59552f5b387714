"""Compare optimizers: run every arm x learning rate x seed, then report what the runs hold."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flowdopr.compare.collect import collect
from flowdopr.compare.evaluations import is_finished
from flowdopr.compare.execute import Executor, worker_command
from flowdopr.compare.plan import RunPlan, expand, study_path, study_settings
from flowdopr.compare.progress import Display
from flowdopr.config import Config, ConfigError, apply_overrides, to_yaml
from flowdopr.disk import locked, write_text
from flowdopr.evaluate import trained_classifier
from flowdopr.latents import build_pixel_datasets
from flowdopr.runs.folder import RunFolder, check_same_run
from flowdopr.train import Interrupted

__all__ = ["StudyFailed", "compare"]


class StudyFailed(RuntimeError):
    """Some runs of a study failed; the others and the report are complete."""

    exit_code = 1


def compare(config: Config, *, workers: int | None = None, report_only: bool = False) -> Path:
    """Run what is missing of the study in `config.compare`, then write its report.

    Runs that are done are skipped, runs that were cut go on. The report is made of the run folders
    alone. Prints the verdict and the paths of what it made.

    Args:
        workers: runs at a time, in place of `compare.workers`.
        report_only: run nothing, rebuild the report from what is there.

    Returns:
        The study folder `<output>/<name>`: report.html, table.csv, results.json, plots/, logs/ and
        one run folder for each run.

    Raises:
        ConfigError, ValueError: no `compare` section, wrong overrides, a run folder of another
            config, a launch of several processes, or another process is at work on this study.
        Interrupted: stopped by Ctrl-C or SIGTERM, after the runs have saved.
        StudyFailed: some runs failed; the report is written and lists them.
    """
    # Here, because the workers import this package and draw nothing: half a second a run.
    from flowdopr.compare.report import write_report

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "compare starts the processes of its runs itself: run it without accelerate launch or "
            "torchrun, and set compare.workers"
        )
    if workers is not None:
        config = apply_overrides(config, [f"compare.workers={workers}"])
    study, plans = study_path(config), expand(config)
    _refuse_other_runs(plans)
    failed: list[str] = []
    if not report_only:
        failed = _run_missing(config, plans, study_settings(config).workers)
    runs = collect(study, plans)
    said = write_report(config, runs)
    print("\n".join([said.headline, *said.pairs]))
    for name in ("report.html", "table.csv", "results.json", "plots"):
        print(study / name)
    if failed:
        raise StudyFailed(
            f"{study}: {len(failed)} of {len(plans)} runs failed: {', '.join(failed)}"
        )
    return study


def _refuse_other_runs(plans: Sequence[RunPlan]) -> None:
    for plan in plans:
        if (plan.path / "config.yaml").exists():
            run = RunFolder.open(plan.path)
            check_same_run(run, plan.config, run.dataset)


def _run_missing(config: Config, plans: Sequence[RunPlan], workers: int) -> list[str]:
    """Run and evaluate what is not done; returns the names of the runs that failed."""
    study = study_path(config)
    waiting = [plan for plan in plans if not is_finished(plan)]
    if not waiting:
        return []
    with locked(study, "wait for it; --report-only shows what is there"):
        write_text(study / "study.yaml", to_yaml(config))
        _train_classifiers(waiting)
        executor = Executor(study, worker_command(study / "study.yaml"), workers=workers)
        with Display(len(plans), done=len(plans) - len(waiting)) as display:
            outcome = executor.execute(waiting, display)
    if outcome.signum:
        raise Interrupted(
            f"{study}: stopped; the same command, or flowdopr compare {study}/study.yaml, goes on",
            outcome.signum,
        )
    return outcome.failed


def _train_classifiers(plans: Sequence[RunPlan]) -> None:
    """Train the feature extractor of each data set once, before workers would race for it."""
    chosen = [plan.config for plan in plans if plan.config.evaluate.extractor.name == "classifier"]
    for config in {config.data.model_dump_json(): config for config in chosen}.values():
        print(f"feature extractor for {config.data.name}", file=sys.stderr)
        trained_classifier(build_pixel_datasets(config))
