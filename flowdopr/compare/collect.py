"""Read what a study's run folders hold. The report knows nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from flowdopr.compare.evaluations import Card, is_finished, known_cards, wanted_cards
from flowdopr.compare.execute import failure_path
from flowdopr.compare.plan import RunPlan
from flowdopr.compare.results import Evaluation, RunResult, Status
from flowdopr.runs.folder import RunFolder


def collect(study: Path, plans: Sequence[RunPlan]) -> list[RunResult]:
    """The state and the numbers of every planned run, in the plan's order."""
    return [_collect_run(study, plan) for plan in plans]


def _collect_run(study: Path, plan: RunPlan) -> RunResult:
    status = _status(study, plan)
    result = RunResult(
        arm=plan.arm,
        lr=plan.lr,
        seed=plan.seed,
        name=plan.name,
        path=plan.path,
        optimizer=plan.config.optimizer.name,
        dopr=getattr(plan.config.optimizer, "dopr", None) is not None,
        setting=plan.setting,
        status=status,
        **(_training(plan) | _evaluations(plan) if status == "done" else {}),
    )
    if status == "failed":
        reason = failure_path(study / "logs", plan).read_text(encoding="utf-8").strip()
        return replace(result, reason=reason)
    if status == "done" and result.fd is None:
        reason = f"the {result.metric} of its samples is not finite"
        return replace(result, status="failed", reason=reason)
    return result


def _status(study: Path, plan: RunPlan) -> Status:
    if is_finished(plan):
        return "done"
    if failure_path(study / "logs", plan).exists():
        return "failed"
    return "unfinished" if plan.path.exists() else "not started"


def _training(plan: RunPlan) -> dict[str, Any]:
    """What the run's log, its versions and its samples say."""
    run = RunFolder.open(plan.path)
    made_by = run.made_by()
    parts = [*made_by.get("earlier", []), made_by]
    windows = [line for line in run.metrics() if "seconds_per_step" in line]
    speeds = [line["seconds_per_step"] for line in windows[1:] or windows]  # the first warms up
    memory = [line["peak_memory_mib"] * 2**20 for line in windows]
    grids = sorted((plan.path / "samples").glob("step-*.png"))
    batch = plan.config.train.global_batch_size
    return {
        "global_batch_size": batch,
        "images_seen": batch * plan.config.train.steps,
        "seconds_per_step": median(speeds) if speeds else None,
        "peak_memory_bytes": max(memory, default=None),
        "hardware": " | ".join(dict.fromkeys(part["hardware"] for part in parts)),
        "commit": " | ".join(dict.fromkeys(part["commit"] for part in parts)),
        "versions": made_by["versions"],
        "sample_grid": grids[-1] if grids else None,
    }


def _evaluations(plan: RunPlan) -> dict[str, Any]:
    """What the run's cards say."""
    wanted, known = wanted_cards(plan), known_cards(plan)
    card = known[wanted.final]
    curve = [known[request] for request in (*wanted.curve, wanted.final) if request in known]
    by_nfe = [known[request] for request in wanted.by_nfe if request in known]
    extractor = card["extractor"]
    held_out = extractor.get("held_out_accuracy")
    accuracy = "" if held_out is None else f", {100 * held_out:.1f} % accurate on held-out images"
    return {
        "metric": "FID" if "fid" in card["metrics"] else "FD",
        "final": _evaluation(card),
        "curve": tuple(_evaluation(one) for one in curve),
        "by_nfe": tuple(_evaluation(one) for one in by_nfe),
        "extractor": f"{extractor['space']}{accuracy}",
        "sampling": _sampling(card),
    }


def _evaluation(card: Card) -> Evaluation:
    metrics, sampling = card["metrics"], card["sampling"]
    return Evaluation(
        step=card["step"],
        one_step_loss=metrics.get("one_step_loss"),
        fd=metrics.get("fid", metrics.get("fd")),
        label_accuracy=metrics.get("label_accuracy"),
        nfe=sampling["nfe"],
        num_images=sampling["num_images"],
    )


def _sampling(card: Card) -> str:
    sampling = card["sampling"]
    solver, guidance = sampling["solver"], sampling["guidance"]
    if "steps" in solver:
        accuracy = f"{solver['steps']} steps"
    else:
        accuracy = f"tolerances {solver['atol']}, {solver['rtol']}"
    guided = f"guidance scale {guidance['scale']:g}" if guidance else "no guidance"
    return (
        f"{solver['name']}, {accuracy}, {guided}, "
        f"{card['weights']} weights, {sampling['labels']} labels, seed {sampling['seed']}"
    )
